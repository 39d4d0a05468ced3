"""Logging: form, level, context, and what no line may hold."""

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from modelhostd.adapters import logs
from tests.adapters.database_support import ROOT


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Yield what stands for stderr; logging is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return the JSON lines that were written."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_are_json_with_the_context_they_were_written_in(stream: io.StringIO) -> None:
    """A line has level, logger, time, its own values and those of its context."""
    logs.configure("info", "json", stream)
    log = logs.get_logger("modelhostd.some")
    with logs.context(request_id="r1", model="minilm"):
        log.info("it happened", bytes=5)
    log.warning("later")
    first, second = lines(stream)
    assert first["event"] == "it happened"
    assert (first["level"], first["logger"], first["bytes"]) == ("info", "modelhostd.some", 5)
    assert (first["request_id"], first["model"]) == ("r1", "minilm")
    assert first["timestamp"].endswith("Z")
    assert "request_id" not in second


def test_lines_of_the_standard_library_look_the_same(stream: io.StringIO) -> None:
    """Other libraries' records have the same form, context and formatting."""
    logs.configure("info", "json", stream)
    with logs.context(operation="o1"):
        logging.getLogger("other").warning("%d of %s", 3, "x")
    (line,) = lines(stream)
    assert (line["event"], line["operation"], line["level"]) == ("3 of x", "o1", "warning")


async def test_tasks_inherit_the_context(stream: io.StringIO) -> None:
    """A task begun in a context logs with it, and concurrent ones do not mix."""
    logs.configure("info", "json", stream)
    log = logs.get_logger("x")

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        log.info("done", own=name)

    tasks = []
    for name in ("a", "b"):
        with logs.context(request_id=name):
            tasks.append(asyncio.create_task(work(name)))
    await asyncio.gather(*tasks)
    assert all(line["own"] == line["request_id"] for line in lines(stream))


def test_the_level_changes_at_once(stream: io.StringIO) -> None:
    """Loggers that are already in use follow; libraries that chatter do so only with debug."""
    logs.configure("warning", "json", stream)
    log, library = logs.get_logger("x"), logging.getLogger("httpx2")
    log.info("hidden")
    library.info("hidden")
    logs.set_level("info")
    log.info("shown")
    library.info("hidden")
    logs.set_level("debug")
    log.debug("shown")
    library.info("shown")
    logs.set_level("error")
    log.warning("hidden")
    assert [line["event"] for line in lines(stream)] == ["shown"] * 3


def test_clients_that_leave_fill_no_log(stream: io.StringIO) -> None:
    """gRPC's traceback for a client that left before its answer was read is a line at debug alone."""

    class ExecuteBatchError(Exception):
        pass

    grpc_log = logging.getLogger("grpc._cython.cygrpc")
    for level in ("info", "debug"):
        logs.configure(level, "json", stream)
        grpc_log.error("%s raised in core", "x", exc_info=ExecuteBatchError("batch"))
        grpc_log.error("%s raised in core", level, exc_info=RuntimeError("news"))
    told = [line["event"] for line in lines(stream)]
    assert told == ["info raised in core", "x raised in core", "debug raised in core"]


@pytest.mark.parametrize("format_", ["json", "console"])
def test_no_line_holds_a_secret(stream: io.StringIO, format_: str) -> None:
    """Tokens, credentials in URLs, presigned queries and known secrets go, wherever they stand."""
    logs.configure("info", format_, stream)
    logs.hide('odd"token\\1')
    log = logs.get_logger("x")
    try:
        raise ValueError("failed with hf_InException1 at https://u:pw1@h/p?X-Amz-Signature=sig1")
    except ValueError:
        log.exception("no", header="Authorization: Bearer abc.def-1", odd='x odd"token\\1 y')
    logging.getLogger("other").error("GET %s", "https://cdn/x?signature=sig2&a=b", exc_info=False)
    log.info("nested", values={"a": ["hf_nested123"]}, url="http://user@host/path")
    text = stream.getvalue()
    for secret in ("InException1", "pw1", "sig1", "abc.def", "sig2", "nested123", "user@", "token"):
        assert secret not in text, secret
    assert "https://cdn/x?***" in text
    assert "ValueError" in text


def test_a_traceback_shows_no_variables(stream: io.StringIO) -> None:
    """Local variables are not part of a line."""
    logs.configure("info", "console", stream)
    hidden_value = "x" * 3 + "local-secret"
    try:
        raise RuntimeError("broken " + str(len(hidden_value)))
    except RuntimeError:
        logs.get_logger("x").exception("no")
    assert "broken 15" in stream.getvalue()
    assert "local-secret" not in stream.getvalue()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_name_cannot_forge_a_line(stream: io.StringIO, format_: str) -> None:
    """Line breaks and escape sequences in values stay values."""
    logs.configure("info", format_, stream)
    logs.get_logger("x").info("real", name="a\nforged \x1b[2J\r")
    logging.getLogger("other").warning("got %s", "b\nforged")
    text = stream.getvalue()
    assert len(text.splitlines()) == 2
    assert "\x1b[2J" not in text


def test_the_journal_gets_json_and_levels() -> None:
    """With JOURNAL_STREAM naming stderr, lines are JSON with the level in front; else readable."""
    program = (
        "import os, sys\n"
        "status = os.fstat(2)\n"
        "if sys.argv[1] == 'yes': os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}'\n"
        "from modelhostd.adapters import logs\n"
        "logs.configure()\n"
        "logs.get_logger('x').error('bad')\n"
    )

    def written(journal: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, journal],
            env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip

    assert written("yes").startswith("<3>{")
    assert json.loads(written("yes")[3:])["event"] == "bad"
    assert not written("no").startswith("<")
    assert "bad" in written("no")


def test_the_module_costs_little(stream: io.StringIO) -> None:
    """Importing it does not import rich, whose modules are a good part of a start."""
    program = (
        "import sys, modelhostd.adapters.logs; print([m for m in sys.modules if m[:5] == 'rich.'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"
