"""The interface that a backend implements: the code in a worker that knows one kind of model.

A backend is a class derived from :class:`Backend`, one object per instance. To add one:

1. Derive from :class:`Backend` and implement its five methods.
2. Register the class in your distribution under the entry point group ``modelhost.backends``::

       [project.entry-points."modelhost.backends"]
       mine = "my_package.my_module:MyBackend"

3. Have the operator allow it: a backend that the daemon's configuration does not name is never imported.

What the worker promises to a backend: ``load``, ``signature`` and the first ``health_check`` are called once, in
this order, in one thread. ``infer`` and later health checks come from other threads, at most ``concurrency`` of
them at a time for one object. Inputs are validated against the signature before ``infer`` sees them. ``unload`` is the last
call and comes when nothing runs; it also comes after a ``load`` that failed or was cancelled.

What a backend may raise: :class:`BadInputError` for what the caller can mend, :class:`UnsupportedModelError` and
:class:`LoadError` from ``load``, ``MemoryError`` (or torch's own) where there is no memory, and :class:`Cancelled`
through ``check_cancelled``. Anything else is a bug: the caller gets INFERENCE_FAILED with an opaque id, and the
traceback goes to the log.
"""

import abc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from modelhostd.core.values import dataclass

Array = npt.NDArray[Any]
Result = TypeVar("Result")


class BadInputError(Exception):
    """The request cannot be served as it is; becomes INVALID_ARGUMENT.

    ``field`` is the tensor or parameter, ``expected`` what it must be, ``actual`` what it was.
    """

    def __init__(self, field: str, expected: str, actual: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {actual!r}")
        self.field = field
        self.expected = expected
        self.actual = actual


class UnsupportedModelError(Exception):
    """The files are not of a model that this backend serves; the text says what was found instead."""


class LoadError(Exception):
    """The files cannot be loaded; the text says which and why."""


class Cancelled(BaseException):
    """Nobody waits for this work any more. Not an ``Exception``, so that no handler swallows it."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, Open Inference Protocol datatype, and shape (-1 = any size)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    description: str = ""
    optional: bool = False
    """Whether a request may leave this input out."""
    labels: tuple[str, ...] = ()
    """Of an output: what its elements stand for, by index, for clients that ask for the highest ones."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What requests and responses look like.

    ``inputs`` empty = any tensors are taken as they are. ``alternatives`` are further sets of inputs, of which a request
    may carry one in place of ``inputs`` (token ids in place of text, say). ``batched`` = the first
    dimension of each input and output counts the items; ``max_batch_size`` then bounds it (0 = no bound).
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    alternatives: tuple[tuple[TensorSpec, ...], ...] = ()
    batched: bool = False
    max_batch_size: int = 0
    joinable: bool = False
    """Whether ``infer`` may be given the items of several requests at once, put together by ``join``: for models that
    answer each item by itself. Only where ``batched``."""
    decoupled: bool = False
    """Whether ``infer_stream`` may give several responses to one request."""
    parameters: frozenset[str] | None = None
    """Request parameters that mean something to it, beside the worker's own: others are refused. None = ``infer`` gets any."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor by its datatype and a numpy array of its shape.

    The arrays' dtypes: BOOL ``bool``, INT8..64 and UINT8..64 the same, FP16/32/64 ``float16/32/64``, BF16 ``uint16``
    (the bits; numpy has no such type), BYTES ``object`` with one ``bytes`` per element.

    Arrays of a request are views into shared memory: read-only, not always aligned, and valid only until ``infer``
    returns. Copy what shall live longer.
    """

    datatype: str
    array: Array


Output = Tensor | Array
"""What ``infer`` may return for a tensor; a plain array's datatype follows from its dtype."""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What a health check found: ``ok``, and one sentence why."""

    ok: bool
    message: str


class Compute(Protocol):
    """Runs what computes, and returns what that returns or raises what it raises."""

    def __call__(self, run: Callable[[], Result]) -> Result:
        """Run it, here or in another thread."""


def compute_here(run: Callable[[], Result]) -> Result:
    """Run it in this thread."""
    return run()


@dataclass
class LoadContext:
    """Everything that a load needs to know, and the way to tell how far it is."""

    model: str
    model_dir: Path
    """Files of the artifact: read-only, and to be left so."""
    task: str
    device: str
    """Id of the device: ``cpu``, ``cuda-0``, ``sim-0``."""
    precision: str = ""
    """``fp32``, ``fp16``, ``bf16``, or empty = as the files are stored."""
    max_batch_size: int = 0
    """Most items that the operator allows in a request; 0 = the backend decides."""
    max_sequence_length: int = 0
    """Longest input in tokens that the operator allows; 0 = the model's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """``backend_options`` of the model's configuration. Refuse keys that mean nothing to you."""
    report: Callable[[int, int], None] = lambda done_bytes, total_bytes: None
    """Call with (bytes in memory, bytes in all) as often as you like; 0 in all = not known."""
    cancelled: Callable[[], bool] = lambda: False
    memory: Callable[[int], Any] | None = None
    """Gives memory for weights, by its bytes: ``tensor`` (torch, uint8), ``prepare(start, length)``, to be called for each part
    before it is filled, and ``filled(start, length)``, which may be called after it so that the part goes to the device at once. Parameters that are views of it are not copied once more; it is read-only after the
    load. None = there is none to be had."""
    kept: Any | None = None
    """Weights that an earlier load of just this model left in memory, to be taken in place of reading the files:
    ``tensors(asked)`` has them by name (see :attr:`Backend.takes_state`). Whoever reads into ``memory`` tells by ``describe(text)`` of it what lies where, else
    there never are any. None = read."""

    compute_threads: int = 0
    """Threads that requests will compute with on the CPU (a load has one); 0 = torch's own number."""

    def check_cancelled(self) -> None:
        """Raise :class:`Cancelled` when the load is not wanted any more. Call it between files."""
        if self.cancelled():
            raise Cancelled


@dataclass
class InferContext:
    """What belongs to one request beside its tensors."""

    parameters: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Request parameters that the worker does not act on itself."""
    outputs: frozenset[str] = frozenset()
    """Names of the outputs that are wanted; empty = all. Others may be left out."""
    cancelled: Callable[[], bool] = lambda: False
    """Whether the caller is gone, or its deadline has passed."""
    progress: Callable[[], None] = lambda: None
    """Call between batches or tokens of long work: a thread without progress counts as hung."""
    let_pass: Callable[[], None] = lambda: None
    """Call between batches of long work, where ``infer`` may be entered again in this thread: what is much shorter goes first."""
    compute: Compute = compute_here
    """Runs one pass of a model; see :attr:`Backend.hands_over`."""

    def check_cancelled(self) -> None:
        """Report progress, and raise :class:`Cancelled` when nobody waits. Call between batches."""
        self.progress()
        if self.cancelled():
            raise Cancelled


class Answer(abc.ABC):
    """Where a backend that works in steps answers one request. Call it from ``begin`` and ``step`` only."""

    streaming: bool
    """Whether the reader takes several responses."""
    priority: int = 0
    """The higher goes first, where not all can be worked on."""

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether the reader takes another response now; until then the request is to rest."""

    @property
    @abc.abstractmethod
    def unwanted(self) -> bool:
        """Whether nobody waits any more; :meth:`fail` it then, with :class:`Cancelled`."""

    @abc.abstractmethod
    def send(self, outputs: Mapping[str, "Output"], *, last: bool) -> None:
        """Send a response; ``last`` = it is the only one, or the end of several."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """End the request with an error."""


class Backend(abc.ABC):
    """One model in a worker. See this module's text for who calls what, when."""

    tasks: ClassVar[frozenset[str]] = frozenset()
    """Tasks that it serves by itself; empty = only where a model's configuration names it."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of what it needs; where one is missing the backend is not available. With ``torch`` among them, and on the
    CPU, its requests run in the one thread of the worker where torch has several threads."""
    platform: ClassVar[str] = "python"
    """Platform in a model's metadata."""
    concurrency: int = 1
    """How many ``infer`` calls of one object may run at a time."""

    hands_over: ClassVar[bool] = False
    """Whether ``infer`` has all that torch computes on the CPU run by ``context.compute``, a batch at a time. Then only that
    waits for the thread where torch has several threads, and long requests of two models share it batch by batch."""

    stepwise: ClassVar[bool] = False
    """Whether it works on many requests at once: ``begin`` takes one, ``step`` gets all of them on. The worker calls them
    by turns with other models' work, never two at a time; ``infer`` is then called by nobody but the backend itself."""

    takes_state: ClassVar[bool] = False
    """Whether a load may find in ``kept``, in place of what is in the files, the ``state_dict`` that ``torch_module`` had, where
    that was made of what was read. Then ask ``kept.suit(module)`` whether it is what it was."""

    may_leave_cycles: ClassVar[bool] = True
    """Whether memory may be left in cycles when the backend itself has gone. An unload then looks for these: half a millisecond for
    each model of the worker, in which no request runs."""

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Import what is needed, before the worker takes requests; return library -> version.

        An import while requests run would hold them up. Called once for each allowed backend.
        """
        return {}

    @abc.abstractmethod
    def load(self, context: LoadContext) -> None:
        """Load the model. Raise rather than leave anything half; ``unload`` follows either way."""

    @abc.abstractmethod
    def signature(self) -> Signature:
        """Return what requests and responses look like; asked once, after ``load``."""

    @abc.abstractmethod
    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Answer one request: outputs by name, in the order in which they are sent."""

    @abc.abstractmethod
    def health_check(self) -> HealthReport:
        """Run a small inference for real and judge the answer. An exception counts as not ok."""

    @abc.abstractmethod
    def unload(self) -> None:
        """Let go of all memory. Must be harmless when nothing, or only a part, was loaded."""

    @property
    def measured_bytes(self) -> int:
        """Device memory that the loaded model holds, in bytes; 0 = none worth counting."""
        return 0

    def torch_module(self) -> Any | None:
        """Return the ``torch.nn.Module`` that holds the weights; None = the model cannot be imaged.

        A module that is given here may be left in RAM by ``load``: the worker puts it on its device, and moves it between
        tiers while nothing runs, by swapping the storage of its parameters and buffers. They are read-only after the
        load: a write ends the process.
        """
        return None

    def alike(self, inputs: Mapping[str, Tensor]) -> tuple[Hashable, int]:
        """Return what requests must have in common to be joined, and how long this one's longest item is.

        Requests of very different length are not joined, since their items are padded to the longest; 0
        where that does not matter. By default names, datatypes and shapes must be the same, but for the items.
        """
        kind = tuple((n, t.datatype, t.array.shape[1:]) for n, t in sorted(inputs.items()))
        return kind, 0

    def join(self, requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return inputs with the items of all requests, which are alike; by default one behind the other."""
        return {
            name: Tensor(first.datatype, np.concatenate([r[name].array for r in requests]))
            for name, first in requests[0].items()
        }

    def infer_stream(
        self, inputs: Mapping[str, Tensor], context: InferContext
    ) -> Iterator[Mapping[str, Output]]:
        """Answer one request in several responses. By default the one of ``infer``."""
        yield self.infer(inputs, context)

    def begin(self, inputs: Mapping[str, Tensor], context: InferContext, answer: Answer) -> None:
        """Take a request that ``step`` will answer. What it raises ends the request. See ``stepwise``."""
        raise NotImplementedError

    def step(self) -> bool:
        """Get all requests on by one step; whether any can go on (those that rest are waited for)."""
        raise NotImplementedError

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether after ``error`` nothing in this process can be trusted any more.

        True for device faults that leave a broken context behind: the worker then answers this
        request and ends, and a new process takes its place.
        """
        return False
