"""What to send to a model and what comes back, as `modelhost show` tells it."""

from typing import TYPE_CHECKING

from modelhost._errors import ModelhostError
from modelhost.cli.output import Column, Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelhost import Client
    from modelhost.v1.inference_service_pb2 import ModelDescription
    from modelhost.v1.instances_pb2 import Instance

PATIENCE_S = 5.0
"""How long `show` waits for it where nobody has asked for it."""


def find_usage(
    client: "Client", model: str, instances: "Sequence[Instance]", *, wanted: bool
) -> "ModelDescription | None":
    """Return what a model that is loaded says of itself; one that is not is loaded only where it is ``wanted``."""
    if wanted:
        return client.describe(model)
    if not any(one.state == one.READY for one in instances):
        return None
    try:
        return client.describe(model, timeout=PATIENCE_S)
    except ModelhostError:
        # An older daemon, or a model that left at this moment: the rest is worth showing all the same.
        return None


def show_usage(output: Output, found: "ModelDescription", *, wanted: bool) -> None:
    """Write inputs, outputs and examples; for scripts a line for each, the examples only where they are ``wanted``."""
    columns: list[Column[tuple[str, ModelDescription.Tensor]]] = [
        Column("TENSOR", lambda row: row[0]),
        Column("NAME", lambda row: row[1].name),
        Column("DATATYPE", lambda row: row[1].datatype),
        Column("SHAPE", lambda row: list(row[1].shape)),
        Column("WHAT IT IS", lambda row: row[1].description, prose=True),
    ]
    rows = [("input", one) for one in found.inputs] + [("output", one) for one in found.outputs]
    output.blank()
    if rows:
        output.rows(rows, columns)
    else:
        output.say("It takes any tensors, and gives them back.")
    if not (output.table or wanted):
        return
    for example in found.examples:
        for line in ("", f"{example.tool}:", ""):
            output.say(line)
        # As it is, not indented: it is there to be copied.
        for line in example.text.splitlines():
            output.say(line)
