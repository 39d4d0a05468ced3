"""The command run: what each task takes and gives, and a chat on a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import inference_service_pb2 as pb
from modelhost.v1 import models_pb2
from tests.client.double import Double
from tests.support import DEADLINE_S, wait_until

STOP, LENGTH = pb.GenerateResponse.STOP, pb.GenerateResponse.LENGTH


def of_task(double: Double, task: str, **config: int) -> None:
    """Have the double know one model."""
    model = models_pb2.Model(name="models/m", task=task)
    model.config.MergeFrom(models_pb2.ModelConfig(**config))
    double.on("GetModel", model)


def embed(request: oip.ModelInferRequest, _: object) -> oip.ModelInferResponse:
    """Answer each text with two numbers."""
    (count,) = request.inputs[0].shape
    array = np.arange(count * 2, dtype="<f4").reshape(count, 2)
    response = oip.ModelInferResponse(raw_output_contents=[array.tobytes()])
    response.outputs.add(name="embedding", datatype="FP32", shape=array.shape)
    return response


# --- embeddings and labels --------------------------------------------------------------------------


def test_embeddings_are_json_lines(double: Double, run) -> None:
    """A vector on a line for each text; with --json the text beside it, in a table its size."""
    of_task(double, "feature-extraction")
    double.on("ModelInfer", embed)
    assert run("run", "m", "one", "two").stdout == "[0.0, 1.0]\n[2.0, 3.0]\n"
    lines = run("run", "m", "one", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "one", "embedding": [0.0, 1.0]}]
    assert run("run", "m", "one", "--format", "table").stdout == "0\tone\t[0.0, 1.0]\n"


def test_a_file_and_standard_input_give_a_text_a_line(double: Double, run, tmp_path: Path) -> None:
    """Lines of a file, of - and of a pipe; anything else is a text. No more at once than the model takes."""
    of_task(double, "feature-extraction", max_batch_size=2)
    double.on("ModelInfer", embed)
    file = tmp_path / "texts.txt"
    file.write_text("a\n\nbé\n")
    assert run("run", "m", str(file), "c\nd", "-", input="e\n").exit_code == 0
    assert run("run", "m", input="f\n").exit_code == 0
    sent = [request.raw_input_contents[0] for request in double.requests("ModelInfer")]
    assert sent == [
        b"\x01\x00\x00\x00a\x03\x00\x00\x00b\xc3\xa9",
        b"\x03\x00\x00\x00c\nd\x01\x00\x00\x00e",
        b"\x01\x00\x00\x00f",
    ]


def test_a_slot_is_named_as_a_model_is(double: Double, run) -> None:
    """With its kind in front or without."""
    of_task(double, "feature-extraction")
    double.on("ModelInfer", embed)
    for name in ("m", "slots/m", "models/m"):
        assert run("run", name, "one").exit_code == 0
    assert [request.name for request in double.requests("GetModel")] == ["models/m"] * 3


def test_labels_have_their_scores(double: Double, run) -> None:
    """A line for each label of each text: the text's number, label, score; as JSON a document a text."""
    of_task(double, "text-classification")
    response = pb.ClassifyResponse()
    response.classifications.add(labels=[{"name": "good", "score": 0.75}, {"name": "bad\x1b"}])
    double.on("Classify", response)
    done = run("run", "m", "nice", "--top-k", "2")
    assert done.stdout == "0\tgood\t0.750000\n0\tbad\\x1b\t0.000000\n"
    assert double.requests("Classify")[0].top_k == 2
    labels = [{"name": "good", "score": 0.75}, {"name": "bad\x1b", "score": 0.0}]
    assert json.loads(run("run", "m", "nice", "--json").stdout) == {
        "text": "nice",
        "labels": labels,
    }


# --- text -------------------------------------------------------------------------------------------


def test_text_comes_as_it_is_made(double: Double, run, tmp_path: Path) -> None:
    """The prompt is what the user says; --system comes first; parameters go along; a file is one prompt."""
    of_task(double, "text-generation")
    double.on(
        "Generate",
        [pb.GenerateResponse(text="a\n"), pb.GenerateResponse(text="b", finish_reason=STOP)],
    )
    assert run("run", "m", "hi", "--system", "be", "-p", "max_tokens=3").stdout == "a\nb\n"
    (tmp_path / "p").write_text("two\nlines")
    assert run("run", "m", str(tmp_path / "p"), "--raw").stdout == "a\nb\n"
    first, second = double.requests("Generate")
    assert [(one.role, one.content) for one in first.messages] == [("system", "be"), ("user", "hi")]
    assert first.sampling.max_tokens == 3
    assert (second.prompt, len(second.messages)) == ("two\nlines", 0)


def test_text_as_json_has_its_counts(double: Double, run) -> None:
    """One document: the text, why it ended, tokens."""
    of_task(double, "text-generation")
    double.on(
        "Generate",
        [
            pb.GenerateResponse(
                text="a", finish_reason=LENGTH, input_token_count=4, output_token_count=9
            )
        ],
    )
    assert json.loads(run("run", "m", "-", "--json", input="hi").stdout) == {
        "text": "a", "finishReason": "length", "inputTokens": 4, "outputTokens": 9,
    }  # fmt: skip


def without_template(
    request: pb.GenerateRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateResponse]:
    """Answer as a model without a chat template does."""
    if request.messages:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages: expected text_input: the model has no chat template, got messages",
        )
    yield pb.GenerateResponse(text=f"<{request.prompt}>", finish_reason=STOP)


def test_a_model_without_a_chat_template_goes_on_from_the_text(double: Double, run) -> None:
    """It is asked again with the text as it is, and that is said."""
    of_task(double, "text-generation")
    double.on("Generate", without_template)
    done = run("run", "m", "hi")
    assert done.stdout == "<hi>\n"
    assert "no chat template" in done.stderr


def with_template_that_refuses(
    request: pb.GenerateRequest, context: grpc.ServicerContext
) -> Iterator[pb.GenerateResponse]:
    """Answer as a model whose chat template raises an error."""
    if request.messages:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages: expected messages that the model's chat template takes, got 'no system'",
        )
    yield pb.GenerateResponse(text="raw", finish_reason=STOP)


def test_a_template_that_refuses_is_not_taken_for_none(double: Double, run) -> None:
    """What a chat template does not take fails: the text does not go to the model in another form."""
    of_task(double, "text-generation")
    double.on("Generate", with_template_that_refuses)
    done = run("run", "m", "hi", "--system", "be brief")
    assert done.exit_code == 2
    assert "no system" in done.stderr
    assert len(double.requests("Generate")) == 1


def test_a_text_may_stop_at_several(double: Double, run) -> None:
    """Each `-p stop=` adds a text, as it is: what looks like a number too."""
    of_task(double, "text-generation")
    double.on("Generate", [pb.GenerateResponse(text="a", finish_reason=STOP)])
    run("run", "m", "hi", "-p", "stop=END", "-p", "stop=3", "-p", "max_tokens=4")
    (sent,) = double.requests("Generate")
    assert (list(sent.sampling.stop), sent.sampling.max_tokens) == (["END", "3"], 4)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_written_out(double: Double, encoding: str) -> None:
    """A text beyond the output's encoding is shown as far as may be; as JSON it is the same document."""
    of_task(double, "text-generation")
    double.on("Generate", [pb.GenerateResponse(text="é 東京 🙂", finish_reason=STOP)])

    def shown(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "modelhost.cli", "--target", double.target, "run", "m", "hi", *more],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True,
        )  # fmt: skip
        return done.stdout.decode(encoding)

    assert shown() == ("\\xe9" if encoding == "ascii" else "é") + " \\u6771\\u4eac \\U0001f642\n"
    assert json.loads(shown("--json"))["text"] == "é 東京 🙂"


# --- what is refused --------------------------------------------------------------------------------


def test_another_task_is_told_with_what_to_do(double: Double, run) -> None:
    """The error names the task, and the commands that do it."""
    of_task(double, "depth-estimation")
    done = run("run", "m", "x")
    assert done.exit_code == 2
    for words in ("depth-estimation", "text-generation", "modelhost infer m", "modelhost show m"):
        assert words in done.stderr
    of_task(double, "")
    assert "no task yet" in run("run", "m", "x").stderr


@pytest.mark.parametrize(
    ("task", "arguments", "given", "says"),
    [
        ("text-generation", ["a", "b"], "", "one prompt"),
        ("text-generation", ["-"], " \n", "empty"),
        ("text-generation", ["-"], b"\xff", "UTF-8"),
        ("feature-extraction", ["-"], "\n", "no text"),
        ("feature-extraction", ["-"], "x" * (4 * 2**20 + 1), "bytes"),
        ("text-generation", ["a", "-p", "colour=red"], "", "colour"),
        ("text-generation", ["a", "-p", "seed=red"], "", "an integer of 64 bits, got 'red'"),
        ("text-classification", ["a", "--top-k", "0"], "", "top-k"),
        ("text-generation", ["a", "--top-k", "2"], "", "--top-k is for text-classification"),
        ("feature-extraction", ["a", "-p", "seed=1"], "", "--parameter is for text-generation"),
        ("text-classification", ["a", "--system", "x"], "", "--system is for text-generation"),
        ("text-generation", ["a", "--system", "x", "--raw"], "", "choose one"),
    ],
)
def test_wrong_input_is_a_clear_error(double: Double, run, task, arguments, given, says) -> None:
    """Exit code 2, and what is wrong; nothing is asked of the model."""
    of_task(double, task)
    done = run("run", "m", *arguments, input=given)
    assert done.exit_code == 2
    assert says in done.stderr
    assert {name for name, _ in double.calls} <= {"GetModel"}


# --- a chat -----------------------------------------------------------------------------------------


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, target: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 200))
        command = [sys.executable, "-m", "modelhost.cli", "--target", target, "run", "m"]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "dumb"}
        )
        os.close(slave)
        self.seen = b""

    def read_until(self, text: str) -> str:
        """Return what is shown up to ``text``, which is then forgotten."""
        end = time.monotonic() + DEADLINE_S
        while text.encode() not in self.seen:
            assert time.monotonic() < end, self.seen.decode(errors="replace")
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(text.encode())
        return before.decode()

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C at a prompt until ``text`` is shown.

        One that comes after the prompt is written and before input() waits is seen with the next key only (CPython).
        """

        def pressed() -> bool:
            os.kill(self.process.pid, signal.SIGINT)
            while text.encode() not in self.seen:
                if not select.select([self.master], [], [], 5.0)[0]:
                    return False
                self.seen += os.read(self.master, 65536)
            return True

        wait_until(pressed, what=text)
        self.read_until(text)

    def type(self, line: str) -> None:
        """Type a line at the prompt."""
        self.read_until(">>> ")
        os.write(self.master, line.encode() + b"\n")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(double: Double) -> Iterator[Terminal]:
    """A chat with a model that repeats what it hears, and never ends where it hears `endless`."""
    of_task(double, "text-generation")

    def answer(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        said = request.messages[-1].content
        if said == "fail":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")
        ended = threading.Event()

        def end() -> None:
            double.calls.append(("ended", None))
            ended.set()

        # Before the first piece: gRPC goes on with no answer whose client has gone while a piece was sent.
        if said == "endless":
            assert context.add_callback(end)
        yield pb.GenerateResponse(text=f"<{len(request.messages)} {said}\x1b")
        if said == "endless":
            ended.wait(DEADLINE_S)
        yield pb.GenerateResponse(text=">", finish_reason=STOP)

    double.on("Generate", answer)
    made = Terminal(double.target)
    yield made
    made.close()


def test_a_chat_goes_on_through_ctrl_c_and_errors_until_bye(
    double: Double, terminal: Terminal
) -> None:
    """Ctrl-C ends the answer and its work, not the program; an error is shown; each answer knows those before."""
    terminal.type("one")
    terminal.read_until("<1 one\\x1b>")
    terminal.type("endless")
    terminal.read_until("<3 endless")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.read_until("(stopped)")
    terminal.type("fail")
    terminal.read_until("no such thing")
    terminal.read_until(">>> ")
    terminal.interrupt_until("/bye ends")
    terminal.type("two")
    terminal.read_until("<5 two\\x1b>")
    wait_until(lambda: ("ended", None) in double.calls)
    terminal.type("/clear")
    terminal.type("/what")
    terminal.read_until("/what is no command")
    terminal.type("three")
    terminal.read_until("<1 three\\x1b>")
    terminal.type("/bye")
    assert terminal.process.wait(DEADLINE_S) == 0


def test_a_chat_ends_with_its_input(terminal: Terminal) -> None:
    """Ctrl-D ends it in order."""
    terminal.read_until(">>> ")
    os.write(terminal.master, b"\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
