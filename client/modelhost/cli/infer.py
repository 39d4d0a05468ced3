"""infer: ask a model, from the command line."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from modelhost.cli.output import Output
from modelhost.cli.registry import to_pairs
from modelhost.cli.session import Command, Session, model_argument, pass_session

if TYPE_CHECKING:
    from modelhost._tensors import Array
    from modelhost.oip.open_inference_pb2 import ModelMetadataResponse

SHOWN_VALUES = 6
"""How many numbers of a row people see."""


@click.command(cls=Command)
@model_argument
@click.argument("texts", nargs=-1, metavar="[TEXT...|-]")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME[:DATATYPE]=JSON",
    help="An input tensor as nested JSON lists; @FILE reads them from a file. Repeatable.",
)
@click.option("-o", "--output", "outputs", multiple=True, metavar="NAME", help="Only this output.")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE",
              help="A request parameter; repeatable.")  # fmt: skip
@click.option("--version", "version", type=click.IntRange(min=1), help="The model's version.")
@pass_session
def infer(
    session: Session,
    model: str,
    texts: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    parameters: tuple[str, ...],
    version: int | None,
) -> None:
    """Run a model on texts or tensors; it is loaded first where need be.

    TEXTs go to the input `text`; - reads them from standard input, one a line. Embeddings, labels and
    scores come back.

    \b
    modelhost infer minilm "one text" "another"
    modelhost infer detector -i 'image:FP32=@pixels.json' --json
    """  # noqa: D301 (click wants the character)
    if bool(texts) == bool(inputs):
        raise click.UsageError("give texts, or tensors with --input")
    with session.client() as client:
        if texts:
            arrays: dict[str, Any] = {"text": _texts(texts)}
            datatypes: dict[str, str] = {}
        else:
            named = [_read_input(text) for text in inputs]
            if len({name for name, _, _ in named}) < len(named):
                raise click.UsageError("an input is given twice; put all its values into one")
            said = {name: datatype for name, datatype, _ in named if datatype}
            known = {} if len(said) == len(named) else _datatypes(client.metadata(model))
            datatypes = {
                name: said.get(name) or known.get(name) or _guess(value) for name, _, value in named
            }
            arrays = {name: _to_array(name, value, datatypes[name]) for name, _, value in named}
        answer = client.infer(
            model,
            arrays,
            outputs=outputs,
            version=version or 0,
            datatypes=datatypes,
            parameters={
                key: scalar(value) for key, value in to_pairs(parameters, "--parameter").items()
            },
        )
    _show(session.output, model, answer)


def _texts(texts: Sequence[str]) -> "Array":
    from modelhost._tensors import text_array

    if tuple(texts) == ("-",):
        texts = sys.stdin.read().splitlines()
    return text_array(texts)


def _read_input(text: str) -> tuple[str, str, Any]:
    """Return name, datatype and value of ``NAME[:DATATYPE]=JSON``."""
    name, equals, value = text.partition("=")
    name, _, datatype = name.partition(":")
    if not equals or not name:
        raise click.BadParameter(f"{text!r} is not NAME=JSON", param_hint="--input")
    if value.startswith("@"):
        with open(value[1:], "rb") as file:
            data = file.read()
        try:
            value = data.decode()
        except UnicodeDecodeError as error:
            told = f"{value[1:]} is not text: byte {error.start} is not UTF-8"
            raise click.BadParameter(told, param_hint="--input") from None
    try:
        return name, datatype.upper(), json.loads(value)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{name} is not JSON: {error}", param_hint="--input") from None


def _datatypes(metadata: "ModelMetadataResponse") -> dict[str, str]:
    """Return what a model wants, by input; nothing while it is not known."""
    return {tensor.name: tensor.datatype for tensor in metadata.inputs}


def _guess(value: Any) -> str:
    """Return the datatype of JSON that nobody has named one for."""
    kinds = _kinds(value)
    if kinds == {int, float}:
        return "FP32"
    kind = kinds.pop() if len(kinds) == 1 else str
    return {bool: "BOOL", int: "INT64", float: "FP32"}.get(kind, "BYTES")


def _kinds(value: Any) -> set[type]:
    """Return the types of what is in nested lists, however deep they are."""
    kinds = set()
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += item
        else:
            kinds.add(type(item))
    return kinds


def _to_array(name: str, value: Any, datatype: str) -> "Array":
    import numpy as np

    from modelhost import InvalidArgument

    try:
        array = np.array(value, dtype=object if datatype == "BYTES" else None)
    except ValueError as error:
        raise InvalidArgument(f"--input {name}: {error}", reason="INVALID_ARGUMENT") from None
    # JSON has one kind of number: 1 is as good as 1.0.
    return (
        array.astype("f8")
        if datatype.startswith(("FP", "BF")) and array.dtype.kind == "i"
        else array
    )


def scalar(text: str) -> bool | int | float | str:
    """Return the number or truth value that a text is in JSON, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _show(output: Output, model: str, answer: "Mapping[str, Array]") -> None:
    from modelhost._names import model_id
    from modelhost._tensors import datatype_of

    if output.json:
        output.document(
            {
                "model_name": model_id(model),
                "outputs": [
                    {
                        "name": name,
                        "datatype": datatype_of(name, array),
                        "shape": list(array.shape),
                        "data": plain_values(array.tolist()),
                    }
                    for name, array in answer.items()
                ],
            }
        )
        return
    for name, array in answer.items():
        for index, row in enumerate(array.tolist() if array.ndim else [array.tolist()]):
            values = plain_values(row)
            output.line([name, index, short_row(values) if output.table else _exact(values)])


def plain_values(value: Any) -> Any:
    """Return nested values as JSON has them: bytes as text, what is no number as a word."""
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _exact(values: Any) -> str:
    return values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)


def short_row(values: Any) -> str:
    """Return the first few values of a row, and how many there are."""
    if not isinstance(values, list) or len(values) <= SHOWN_VALUES:
        return _exact(values)
    head = ", ".join(
        f"{v:.4g}" if isinstance(v, float) else _exact(v) if not isinstance(v, list) else "[...]"
        for v in values[:SHOWN_VALUES]
    )
    return f"[{head}, ...] ({len(values)})"
