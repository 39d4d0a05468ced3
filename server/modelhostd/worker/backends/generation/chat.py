"""Turns chat messages into a prompt by the model's own template, in a process that can be ended."""

import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelhostd.worker.backend import BadInputError
from modelhostd.worker.backends.generation.parameters import read_json

log = logging.getLogger("modelhostd.worker")

MAX_MESSAGES_BYTES = 2**20
MAX_MESSAGES = 1024
MAX_DEPTH = 8
WALL_S = 20.0
"""Patience with the process, which limits its own CPU time: more only where the machine is swamped."""

_PROGRAM = Path(__file__).with_name("chat_process.py")
_EXPECTED = {
    "refused": "messages that the model's chat template takes",
    "forbidden": "a chat template that keeps to its messages",
    "syntax": "a chat template without errors",
    "time": "a chat template that ends",
    "memory": "a chat template that takes little memory",
    "depth": "a chat template that takes few levels",
}


class ChatTemplate:
    """The chat template of one model. ``render`` may be called from one thread at a time."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._template = template
        self._variables = dict(special_tokens)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, encoded: bytes) -> str:
        """Return the prompt for messages in JSON. Raises :class:`BadInputError` naming ``messages``."""
        request = {
            "template": self._template,
            "variables": {
                **self._variables,
                "messages": read_messages(encoded),
                "add_generation_prompt": True,
                "tools": None,
                "documents": None,
            },
        }
        answer = self._ask(json.dumps(request).encode() + b"\n")
        if "text" in answer:
            # A template can write half a character, which no tokenizer takes.
            return str(answer["text"]).encode(errors="replace").decode()
        kind = str(answer.get("error"))
        expected = _EXPECTED.get(kind, _EXPECTED["refused"])
        raise BadInputError("messages", expected, str(answer.get("message")))

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _ask(self, line: bytes) -> Mapping[str, Any]:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = _start()
            reply = _exchange(process, line)
            if not reply:
                # It ended, by its own limit, or it was swamped: the next request gets a new one.
                self._process = None
        if not reply:
            _end(process)
            log.warning("a chat template did not end, or ended its process")
            return {"error": "time", "message": "it was stopped"}
        answer: Mapping[str, Any] = json.loads(reply)
        return answer


def read_messages(encoded: bytes) -> list[Any]:
    """Return the messages of a request, after checking what every template takes for granted."""
    found = read_json("messages", encoded, MAX_MESSAGES_BYTES, "a JSON list")
    if not isinstance(found, list) or not 0 < len(found) <= MAX_MESSAGES:
        count = len(found) if isinstance(found, list) else type(found).__name__
        raise BadInputError("messages", f"a list of 1 to {MAX_MESSAGES} messages", count)
    for index, message in enumerate(found):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise BadInputError(f"messages[{index}]", "an object with 'role' and 'content'", kind)
        if not isinstance(role := message.get("role"), str):
            raise BadInputError(f"messages[{index}].role", "a text", type(role).__name__)
        _check_content(f"messages[{index}].content", message)
        if _depth(message) > MAX_DEPTH:
            raise BadInputError(f"messages[{index}]", f"at most {MAX_DEPTH} levels", "more")
    return found


def _check_content(field: str, message: Mapping[str, Any]) -> None:
    """Raise unless a message says something: most templates write what is not there as ``None``, or fail."""
    content = message.get("content")
    if isinstance(content, str | list):
        return
    calls = message.get("tool_calls")
    if content is None and isinstance(calls, list) and calls:
        return
    expected = "a text or a list; only a message with tool_calls may be without"
    raise BadInputError(field, expected, "nothing" if content is None else type(content).__name__)


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _start() -> "subprocess.Popen[bytes]":
    # Isolated from the environment; its standard error has nothing to say that the answer does not.
    process = subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"LANG": "C.UTF-8"},
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _exchange(process: "subprocess.Popen[bytes]", line: bytes) -> bytes:
    """Send one line and return the answer's; empty = the process ended or is swamped."""
    assert process.stdin is not None
    assert process.stdout is not None
    end = time.monotonic() + WALL_S
    unsent = memoryview(line)
    reply = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while not reply.endswith(b"\n"):
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready or time.monotonic() > end:
                return b""
            try:
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        unsent = unsent[os.write(key.fd, unsent) :]
                        if not unsent:
                            selector.unregister(process.stdin)
                    elif part := os.read(key.fd, 2**16):
                        reply += part
                    else:
                        return b""
            except OSError:
                return b""
    return bytes(reply)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                log.debug("a pipe was broken", exc_info=True)
