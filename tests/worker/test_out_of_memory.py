"""What a worker says where a model found too little memory."""

import numpy as np
import pytest
import torch

from modelhostd.core.errors import Reason
from modelhostd.worker import failures

HUGE = 1 << 60


def _by_torch() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def _by_numpy() -> None:
    np.empty(HUGE, dtype=np.uint8)


def _by_cuda() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
    )


@pytest.mark.parametrize(
    ("work", "asked"), [(_by_torch, HUGE), (_by_numpy, HUGE), (_by_cuda, 5 << 29)]
)
def test_a_lack_of_memory_says_what_was_asked_for(work: object, asked: int) -> None:
    """Every library's error is OUT_OF_DEVICE_MEMORY with the bytes of the allocation that failed."""
    assert callable(work)
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        work()
    error = failures.from_infer(caught.value, "a", "cpu")
    assert error.reason is Reason.OUT_OF_DEVICE_MEMORY
    assert int(error.metadata["neededBytes"]) == asked


def test_one_that_names_no_bytes_is_one_all_the_same() -> None:
    """Without a number in its text the key is left out."""
    error = failures.from_infer(MemoryError(), "a", "cpu")
    assert error.reason is Reason.OUT_OF_DEVICE_MEMORY
    assert "neededBytes" not in error.metadata
