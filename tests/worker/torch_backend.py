"""A backend with a torch module of awkward memory, for the tests of images: tied, odd, half, non-persistent.

Its weights come of the seed in option ``seed``. The answer to any request is FP32 ``out``, one number per row
of what the module makes of a fixed input: whatever goes wrong with a weight changes it.
"""

from collections.abc import Mapping

import torch

from modelhostd.worker.backend import (
    Backend,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
)


class Awkward(torch.nn.Module):
    """Tied weights, sizes that nothing divides, three dtypes, buffers in and out of the state dict."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, width)
        self.head = torch.nn.Linear(width, 11, bias=True)
        self.head.weight = self.embedding.weight
        self.brief = torch.nn.Linear(width, 3).to(torch.bfloat16)
        self.norm = torch.nn.BatchNorm1d(width)
        self.lstm = torch.nn.LSTM(width, 5, batch_first=True)
        self.register_buffer("scale", torch.rand(1), persistent=False)
        self.register_buffer("mask", torch.rand(13) > 0.5)
        self.register_buffer("count", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("nothing", torch.empty(0, 4))
        fused = torch.rand(2, width, width)
        self.query = torch.nn.Parameter(fused[0])
        self.key = torch.nn.Parameter(fused[1].t())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return one number per row of ids ``[n, 4]``, of which every tensor has its part."""
        hidden = self.embedding(rows) @ self.query @ self.key
        hidden = self.norm(hidden.mean(1)) * self.scale
        memory = self.lstm(hidden.unsqueeze(1))[0].sum((1, 2))
        brief = self.brief(hidden.to(torch.bfloat16)).float().sum(1)
        return self.head(hidden).sum(1) + brief + memory + self.mask.sum() + self.count


class TorchBackend(Backend):
    """Hosts an :class:`Awkward`; options ``seed``, ``width``, ``opaque`` (no module), ``hoard`` (a view is kept)."""

    tasks = frozenset({"awkward"})
    packages = ("torch",)

    def __init__(self) -> None:
        self._module: Awkward | None = None
        self._opaque = False
        self._hoard: list[torch.Tensor] = []
        self._hoards = False

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Import nothing more: torch is here."""
        return {"torch": torch.__version__}

    def load(self, context: LoadContext) -> None:
        """Make the module of its seed."""
        if context.options.get("fail"):
            raise LoadError("as it was told")
        torch.manual_seed(int(context.options.get("seed", 1)))
        self._opaque = bool(context.options.get("opaque"))
        self._hoards = bool(context.options.get("hoard"))
        self._module = Awkward(int(context.options.get("width", 7))).eval()
        self._module.requires_grad_(False)

    def signature(self) -> Signature:
        """Return the empty signature."""
        return Signature()

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Answer the fixed rows."""
        assert self._module is not None
        if self._hoards:
            self._hoard = [self._module.head.bias[:2].detach()]
        with torch.inference_mode():
            rows = torch.arange(32).reshape(8, 4) % 11
            return {"out": self._module(rows).numpy()}

    def health_check(self) -> HealthReport:
        """Report that it is there."""
        return HealthReport(ok=self._module is not None, message="It is there.")

    def unload(self) -> None:
        """Drop the module."""
        self._module = None
        self._hoard = []

    def torch_module(self) -> torch.nn.Module | None:
        """Return the module, unless it plays an opaque runtime."""
        return None if self._opaque else self._module

    @property
    def measured_bytes(self) -> int:
        """Return the bytes of all storages."""
        if self._module is None:
            return 0
        tensors = (*self._module.parameters(), *self._module.buffers())
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )
