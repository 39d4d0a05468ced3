"""run: give a model what its task takes, and show what comes back."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from modelhost._names import model_id
from modelhost.cli.infer import scalar, short_row
from modelhost.cli.output import Output
from modelhost.cli.registry import to_pairs
from modelhost.cli.session import Command, Session, model_argument, pass_session

if TYPE_CHECKING:
    from modelhost import Client
    from modelhost.v1.models_pb2 import Model

INPUT_BYTES_MAX = 4 * 1024 * 1024
TEXTS_AT_ONCE = 32
"""Texts of one request: what comes back of them is shown while the next ones are at work."""
EXCERPT = 40
TOP_K = 5


@click.command(cls=Command)
@model_argument
@click.argument("inputs", nargs=-1, metavar="[INPUT|FILE|-]...")
@click.option("--top-k", type=click.IntRange(1, 1000), metavar="N",
              help="Classification: how many labels of each text (5).")  # fmt: skip
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE",
              help="Generation: max_tokens=100, temperature=0.7, stop=END, ...; repeatable, stop with itself too.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="Generation: what the model is told first.")
@click.option(
    "--raw", is_flag=True, help="Generation: go on from the text, without a chat template."
)
@pass_session
def run(
    session: Session,
    model: str,
    inputs: tuple[str, ...],
    top_k: int | None,
    parameters: tuple[str, ...],
    system: str | None,
    raw: bool,
) -> None:
    """Run a model on texts; it is loaded first where need be.

    An INPUT that names a file stands for its content, - for standard input, anything else for itself.
    Embeddings and classifications take each line of these as a text. For text generation the whole is
    one prompt; without one, on a terminal, there is a chat: Ctrl-C ends an answer, /bye the chat.

    \b
    modelhost run minilm "one text" "another"
    modelhost run sentiment reviews.txt --top-k 1
    modelhost run llama "Why is the sky blue?" -p max_tokens=100
    """  # noqa: D301 (click wants the character)
    from modelhost.cli import chat

    output = session.output
    if raw and system:
        raise click.UsageError("--system is for a chat template, --raw does without: choose one")
    with session.client() as client:
        found = client.get(model_id(model))
        _refuse_options(
            model,
            found,
            {
                "text-classification": {"--top-k": top_k},
                "text-generation": {"--parameter": parameters, "--system": system, "--raw": raw},
            },
        )
        if found.task == "text-generation":
            talk = chat.Talk(client, model, _sampling(parameters), system=system, raw=raw)
            if not inputs and sys.stdin.isatty():
                if output.json:
                    raise click.UsageError("a chat has no --json; give a prompt")
                chat.interactive(talk)
                return
            chat.once(talk, _prompt(inputs), output)
            return
        show = _BY_TASK.get(found.task)
        if show is None:
            raise _other_task(model, found)
        at_once = min(TEXTS_AT_ONCE, found.config.max_batch_size or TEXTS_AT_ONCE)
        texts = _texts(inputs)
        for start in range(0, len(texts), at_once):
            show(client, model, texts[start : start + at_once], start, top_k or TOP_K, output)


def _sampling(parameters: Sequence[str]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as the client's sampling; there may be several texts to stop at."""
    stops = [one.removeprefix("stop=") for one in parameters if one.startswith("stop=")]
    others = tuple(one for one in parameters if not one.startswith("stop="))
    sampling: dict[str, Any] = {
        key: scalar(value) for key, value in to_pairs(others, "--parameter").items()
    }
    return {**sampling, "stop": stops} if stops else sampling


def _refuse_options(
    model: str, found: "Model", by_task: Mapping[str, Mapping[str, object]]
) -> None:
    """Refuse what was said for a model of another task."""
    for task, options in by_task.items():
        given = [name for name, value in options.items() if value]
        if given and found.task in (*_BY_TASK, "text-generation") and found.task != task:
            raise click.UsageError(f"{given[0]} is for {task}; {model} is of the task {found.task}")


def _embed(
    client: "Client", model: str, texts: Sequence[str], start: int, _: int, output: Output
) -> None:
    """Show a line for each text: the vector, or on a terminal its beginning and its size."""
    for number, (text, row) in enumerate(
        zip(texts, client.embed(model, texts), strict=True), start
    ):
        vector = row.tolist()
        if output.json:
            output.json_line({"text": text, "embedding": vector})
        elif output.table:
            output.line([number, text[:EXCERPT], short_row(vector)])
        else:
            output.json_line(vector)


def _classify(
    client: "Client", model: str, texts: Sequence[str], start: int, top_k: int, output: Output
) -> None:
    """Show a line for each label of each text: the text's number, the label, its score."""
    answers = client.classify(model, texts, top_k=top_k)
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True), start):
        if output.json:
            labels = [{"name": one.name, "score": one.score} for one in answer.labels]
            output.json_line({"text": text, "labels": labels})
            continue
        for one in answer.labels:
            output.line([number, one.name, f"{one.score:.6f}"])


_BY_TASK: Mapping[str, Callable[["Client", str, Sequence[str], int, int, Output], None]] = {
    "feature-extraction": _embed,
    "text-classification": _classify,
}


def _other_task(model: str, found: "Model") -> Exception:
    """Return the error for a model that `run` has no words for."""
    from modelhost import InvalidArgument

    task = f"is of the task {found.task}" if found.task else "has no task yet"
    served = ", ".join([*_BY_TASK, "text-generation"])
    return InvalidArgument(
        f"{model} {task}; `modelhost run` has words for {served}",
        reason="INVALID_ARGUMENT",
        metadata={"field": "model", "expected": served, "actual": found.task},
        hint=f"`modelhost show {model}` says what it takes; `modelhost infer {model} -i NAME=JSON` sends it"
        if found.task
        else f"`modelhost pull {model}` finds it out, `modelhost pull {model} --task TASK` sets it",
    )


# --- what goes in ---------------------------------------------------------------------------------


def _prompt(inputs: Sequence[str]) -> str:
    """Return the one prompt that there is."""
    if len(inputs) > 1:
        raise click.UsageError("text generation takes one prompt; put it in quotes")
    (text,) = [_read(one)[0] for one in inputs or ("-",)]
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _texts(inputs: Sequence[str]) -> Sequence[str]:
    """Return the texts that there are, at least one; empty lines of files are left out."""
    if not inputs and sys.stdin.isatty():
        raise click.UsageError("give a text, a file or -")

    def each() -> Iterator[str]:
        for one in inputs or ("-",):
            text, is_file = _read(one)
            yield from (line for line in text.splitlines() if line.strip()) if is_file else (text,)

    texts = list(each())
    if not texts:
        raise click.UsageError("there is no text in it")
    return texts


def _read(one: str) -> tuple[str, bool]:
    """Return the text that an argument stands for, and whether it is that of a file."""
    if one == "-":
        data = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
    elif os.path.isfile(one):
        with open(one, "rb") as file:
            data = file.read(INPUT_BYTES_MAX + 1)
    else:
        return one, False
    name = "standard input" if one == "-" else one
    if len(data) > INPUT_BYTES_MAX:
        raise click.UsageError(f"{name} has more than {INPUT_BYTES_MAX} bytes; give less at once")
    try:
        return data.decode(), True
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name} is not text: byte {error.start} is not UTF-8") from None
