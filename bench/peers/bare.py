"""A bare model in a loop, in a process of its own: what a server of it is held against.

As a program it reads lines of JSON, ``{"passes": n, ...}``, and answers each with what the model made, and the
seconds and the CPU time that the passes took, after one pass more.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ANSWER_S = 300.0


class Bare:
    """The process, for as long as it is entered. ``kind`` is one of ``KINDS``, ``folder`` has the model."""

    def __init__(self, kind: str, folder: Path) -> None:
        from bench.peers.servers import ENVIRONMENT

        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, *, passes: int = 0, **what: object) -> Mapping[str, Any]:
        """Return ``made``, ``seconds`` and ``cpu_s``. ``what`` are the arguments of the model's call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"passes": passes, **what}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare model ended with {self._process.wait(ANSWER_S)}")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


def _minilm(folder: Path) -> Callable[..., object]:
    from bench.peers.minilm import MiniLM

    model = MiniLM(folder)
    return lambda texts: model.embed(texts).tolist()


def _generator(folder: Path) -> Callable[..., object]:
    import torch
    import transformers

    quiet: Any = transformers.utils.logging
    quiet.disable_progress_bar()
    own = {"local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **own)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **own)

    def generate(prompts: list[str], tokens: int) -> list[str]:
        """Return the text of each prompt, one after the other, always of so many tokens."""
        texts = []
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**given, do_sample=False, max_new_tokens=tokens)
            new = out[0, given["input_ids"].shape[1] :]
            texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
        return texts

    return generate


KINDS: Mapping[str, Callable[[Path], Callable[..., object]]] = {
    "minilm": _minilm,
    "generator": _generator,
}


def main() -> None:
    """Answer lines until there are no more."""
    call = KINDS[sys.argv[1]](Path(sys.argv[2]))
    for line in sys.stdin:
        asked = json.loads(line)
        passes = asked.pop("passes")
        made = call(**asked)
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(passes):
            call(**asked)
        took, spent = time.perf_counter() - begun, time.process_time() - used
        print(json.dumps({"seconds": took, "cpu_s": spent, "made": made}), flush=True)


if __name__ == "__main__":
    main()
