"""An answer that no message holds is refused before its work, where the signature tells its size."""

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker.backend import Signature, TensorSpec
from modelhostd.worker.classification import Top
from modelhostd.worker.jobs import Activity
from modelhostd.worker.matching import check_answer
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from tests.worker.executor_scene import Channel, StepBackend, hosted, job

WIDE = TensorSpec("wide", "FP32", (-1, 1000))
TEXT = TensorSpec("text", "BYTES", (-1,))
LOOSE = TensorSpec("loose", "FP32", (-1, -1))
FIXED = TensorSpec("fixed", "INT8", (8, 1000))


class Wide(StepBackend):
    """Would answer each item with a thousand numbers."""

    stepwise = False

    def signature(self):
        """Return what it takes and gives."""
        return Signature((TensorSpec("x", "FP32", (-1,)),), (WIDE,), batched=True)

    def infer(self, inputs, context):
        """Note the work."""
        del inputs, context
        self.log.append("infer")
        return {}


@pytest.mark.parametrize(("items", "worked"), [(262, True), (263, False)])
def test_nothing_is_computed_that_cannot_be_sent(items, worked):
    """A model of a thousand numbers an item gets no more items than a message of 1 MiB holds."""
    backend, channel = Wide(), Channel()
    asked = job(channel, items=items)
    box = BlackBox(memoryview(bytearray(PAGE_BYTES)))
    asked.run(hosted(backend), Activity("test", box, 0))
    assert backend.log == ["infer"] * worked
    assert (channel.answers == [(asked.request, Reason.MESSAGE_TOO_LARGE)]) is not worked


@pytest.mark.parametrize(
    ("outputs", "wanted", "least"),
    [
        ((WIDE,), (), 12_000),
        ((WIDE, TEXT), (), 12_012),
        ((WIDE, TEXT), ("text",), 12),
        ((WIDE, LOOSE), (), 12_000),
        ((FIXED,), (), 8_000),
        ((TensorSpec("one", "FP64", ()),), (), 8),
        ((), ("y",), 0),
    ],
    ids=["numbers", "texts, too", "of those wanted", "unknown", "no items", "no dimension", "any"],
)
def test_what_the_signature_tells_of_an_answer(outputs, wanted, least):
    """Of three items, in bytes: one less than that is refused and says how many; as many are let through."""
    signature = Signature(outputs=outputs, batched=True)
    check_answer(signature, wanted, {}, 3, least)
    with pytest.raises(ModelhostError) as caught:
        check_answer(signature, wanted, {}, 3, least - 1)
    assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
    assert caught.value.metadata == {"limitBytes": str(least - 1), "actualBytes": str(least)}


def test_what_the_signature_does_not_tell_is_let_through():
    """Of an output only the highest are wanted; a response of several holds as many items as it likes."""
    check_answer(Signature(outputs=(WIDE,), batched=True), (), {"wide": Top(1)}, 3, 0)
    check_answer(Signature(outputs=(WIDE,), batched=True, decoupled=True), (), {}, 3, 0)
