"""Linear layers in FP32 on CPUs that MKL was not made for: by oneDNN, with the weights as they lie in memory.

torch gives FP32 products to MKL, and those in half precision to oneDNN. On an AMD CPU (Zen 4, torch 2.13, MiniLM) MKL is the slower one of
the two from some twenty rows on, and oneDNN adds the bias and applies GELU while it has the product at hand: 1.05x to 1.1x for a pass of
one text or of many (bench/RESULTS.md). Its own layout of weights would give more, and be a second copy of them: not used.

oneDNN makes a program for each shape: 0.6 ms and 0.57 MiB for each number of rows with each kind of layer. Very few rows would
cost more than they save, so they stay with MKL; and the number of programs that are kept is bounded (torch's is 1,024).

torch's operator is private. So it is tried once, and where it is absent or answers otherwise MKL goes on.
"""

import functools
import logging
import os
from collections import Counter
from typing import Any, TypeGuard

import torch
from torch.nn import functional

log = logging.getLogger("modelhost.worker")

MIN_ROWS = 16
"""Of a product (items x tokens). Passes of one text on a quiet machine, with programs made along the way: 1.05x to 1.1x with 16 and with 24,
no more with 8, where the products of a step of eight texts begin, at 0.7x to 1x."""
MIN_WEIGHTS = 2 * 2**20
"""Of all layers of a model that share a shape, and so its programs: with fewer, a program costs more than it saves."""
CAPACITY, TORCH_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
"""Variables of oneDNN and of the layer that torch has before it; each of them keeps half of a program. An operator sets the first for both:
0 leaves all products to MKL."""
PROGRAMS = "128"
"""Kept of all models of a worker: 73 MiB."""
CPUINFO_CHARACTERS = 256
TOLERANCE = 1e-4
"""Of the trial, absolute, for sums of a hundred products of about 1."""


def use_onednn(model: torch.nn.Module, device: torch.device) -> None:
    """Have a model's linear layers computed by oneDNN where that is faster; elsewhere leave it as it is.

    For models that are not compiled, as their weights lie in RAM. Their tensors stay the same objects, looked up at each pass.
    """
    if device.type == "cpu" and is_of_use():
        adapt(model, MIN_WEIGHTS)


@functools.cache
def is_of_use() -> bool:
    """Whether this is a CPU where oneDNN is the faster one, and torch has the operator."""
    backends: Any = torch.backends
    try:
        # Its beginning is the first CPU; the kernel asks each one whose lines are read.
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            cpuinfo = file.read(CPUINFO_CHARACTERS)
    except OSError:
        return False
    if not mkl_is_slower(cpuinfo, backends.cpu.get_cpu_capability()):
        return False
    # They are read when the first program is made, which is below or later.
    kept = os.environ.setdefault(CAPACITY, PROGRAMS)
    if not (kept.isdecimal() and int(kept)):
        # Torch's layer is not told of it: with room for none it ends the process at its first product, be it of BF16.
        return False
    os.environ.setdefault(TORCH_CAPACITY, kept)
    return bool(backends.mkl.is_available()) and works()


def mkl_is_slower(cpuinfo: str, capability: str) -> bool:
    """Whether it is a CPU of the kind on which it was measured: AMD, and torch uses AVX-512.

    By its name, not by a trial: a worker that replaces another one must give the same numbers to the last bit.
    """
    vendors = (line for line in cpuinfo.splitlines() if line.startswith("vendor_id"))
    vendor = next(vendors, "").rpartition(":")[2].strip()
    return vendor == "AuthenticAMD" and capability == "AVX512"


def works() -> bool:
    """Whether the operator is there and answers as torch's own does. Logs if not."""
    random = torch.Generator().manual_seed(1)
    rows, weight, bias = (
        torch.randn(size, generator=random) for size in ((3, 32), (48, 32), (48,))
    )
    expected = functional.linear(rows, weight, bias)
    try:
        with torch.inference_mode():
            near = [
                torch.allclose(_linear(rows, weight, bias), expected, atol=TOLERANCE),
                torch.allclose(
                    _linear(rows, weight, bias, gelu=True),
                    functional.gelu(expected),
                    atol=TOLERANCE,
                ),
            ]
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("linear layers stay with MKL: torch %s: %s", torch.__version__, error)
        return False
    if not all(near):
        log.info("linear layers stay with MKL: torch %s answers otherwise", torch.__version__)
    return all(near)


def adapt(model: torch.nn.Module, min_weights: int) -> None:
    """Have the FP32 layers of a model compute by oneDNN from ``MIN_ROWS`` rows on, those of shapes with ``min_weights`` together.

    A layer's class is changed, not its ``forward``: a method kept in a layer would be a cycle that holds the weights after an unload.
    """
    weights: Counter[torch.Size] = Counter()
    layers = {module for module in model.modules() if _is_plain(module)}
    for layer in layers:
        weights[layer.weight.shape] += layer.weight.numel()
    layers = {layer for layer in layers if weights[layer.weight.shape] >= min_weights}
    proven: dict[type, bool] = {}
    # What holds a layer comes before it: it is looked at while that is what it was.
    for module in model.modules():
        kind: Any = type(module)
        if module in layers:
            module.__class__ = OneDnnLinear
        elif _looks_like_gelu_of_linear(module) and module.dense in layers:
            if kind not in proven:
                proven[kind] = _is_gelu_of_linear(module)
            if proven[kind]:
                module.__class__ = _with_gelu(kind)


class OneDnnLinear(torch.nn.Linear):
    """A linear layer that takes oneDNN for many rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input`` [..., in] times the weights, plus the bias: [..., out]."""
        if input.numel() < MIN_ROWS * self.in_features:
            return functional.linear(input, self.weight, self.bias)
        return _linear(input, self.weight, self.bias)


class _WithGelu(torch.nn.Module):
    """Mixed into a class of modules that are GELU of a linear layer: one operator for many rows, what it was for few."""

    dense: torch.nn.Linear

    def forward(self, hidden_states: torch.Tensor) -> Any:
        dense = self.dense
        if hidden_states.numel() < MIN_ROWS * dense.in_features:
            return super().forward(hidden_states)
        return _linear(hidden_states, dense.weight, dense.bias, gelu=True)


@functools.cache
def _with_gelu(kind: Any) -> type:
    return type(kind.__name__, (_WithGelu, kind), {})


def _looks_like_gelu_of_linear(module: torch.nn.Module) -> bool:
    """Whether it has the parts of the Intermediate of BERT and those after it, and no others; its class is not asked for its name."""
    from transformers.activations import GELUActivation

    parts = dict(module.named_children())
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if own or parts.keys() != {"dense", "intermediate_act_fn"}:
        return False
    act = parts["intermediate_act_fn"]
    return _is_plain(parts["dense"]) and type(act) is GELUActivation and act.act is functional.gelu


def _is_plain(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    return type(module) is torch.nn.Linear and module.weight.dtype == torch.float32


def _is_gelu_of_linear(module: Any) -> bool:
    """Whether that is what it answers: another class may do more with the same parts."""
    dense: torch.nn.Linear = module.dense
    rows = torch.linspace(-3, 3, 2 * dense.in_features).reshape(1, 2, dense.in_features)
    with torch.inference_mode():
        answer = module(rows)
        expected = functional.gelu(functional.linear(rows, dense.weight, dense.bias))
    return isinstance(answer, torch.Tensor) and torch.allclose(answer, expected, atol=TOLERANCE)


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False
) -> torch.Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - there is no public one
    made: torch.Tensor = operator(
        rows, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else ""
    )
    return made
