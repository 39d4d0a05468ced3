"""Random commands on a whole daemon with real workers, and what must hold after each of them.

Nothing is waited for on the way: loads, requests, crashes and changes of budgets overlap as they come. A step that
settles (and the end of each run) waits for all of it, and then the books must balance to the byte.
"""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec

import grpc
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bench.faulty_scene import CALL_S
from modelhost import BudgetTooSmall, Cancelled, Client, Lease, ModelhostError, OperationHandle
from modelhost._status import error_from_rpc
from modelhost.oip import open_inference_pb2
from modelhost.v1 import host_pb2, operations_pb2
from modelhost.v1.instances_pb2 import Instance, InstanceActivity
from tests.live.world import HOST_ROOM, ROOM, SIZES, World
from tests.support import ConditionNotMetError, wait_until


def _answer(size: int) -> int:
    """Return the sum of the weights, each by its place: see ``bench/imaged_backend.py``."""
    places = np.arange(size, dtype=np.int64)
    return int(((places * 31 % 251) * (places % 97)).sum())


CRASHES = ("segv", "kill", "exit", "poison")
OPEN = (operations_pb2.Operation.QUEUED, operations_pb2.Operation.RUNNING)

HELD = {InstanceActivity.PINNED, InstanceActivity.LEASED}

ANSWERS = {size: _answer(size) for size in SIZES.values()}
"""What ``imaged`` models answer: each of their bytes changes it."""

MODELS = st.sampled_from(sorted(SIZES))

P = ParamSpec("P")


def step(
    work: Callable[Concatenate["Residents", P], None],
) -> Callable[Concatenate["Residents", P], None]:
    """Note each step of a run, and with them what did not hold after one."""

    @functools.wraps(work)
    def noted(self: "Residents", *args: P.args, **kwargs: P.kwargs) -> None:
        if work.__name__ != "within_the_budget":
            self.world.done.append(
                f"{work.__name__} {' '.join(f'{k}={v}' for k, v in kwargs.items())}"
            )
        try:
            work(self, *args, **kwargs)
        except Exception as error:
            self.world.found("".join(traceback.format_exception(error)))
            raise

    return noted


class Residents(RuleBasedStateMachine):
    """Clients that load, ask, hold and break models; ``world`` is set by who runs it."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.begin()
        self.handles: list[OperationHandle] = []
        self.calls: list[Any] = []
        self.gates: list[Path] = []
        self.leases: list[Lease] = []
        self.size = ROOM
        """The device's budget."""
        self.roof = ROOM
        """The largest budget since all was settled."""

    @property
    def client(self) -> Client:
        return self.world.scene.client

    @initialize()
    def begin(self) -> None:
        self.client.set_budget(self.world.device, ROOM)

    # --- what clients do ------------------------------------------------------------------------

    @rule(model=MODELS, priority=st.sampled_from([0, 0, 5]))
    @step
    def load(self, model: str, priority: int) -> None:
        self.ask(lambda: self.client.load(model, priority=priority, wait=False))

    @rule(model=MODELS, warm=st.booleans())
    @step
    def unload(self, model: str, warm: bool) -> None:
        self.ask(lambda: self.client.unload(model, keep_warm=warm, wait=False))

    @rule(model=MODELS)
    @step
    def reload(self, model: str) -> None:
        self.ask(lambda: self.client.reload(model, wait=False))

    @rule(model=MODELS)
    @step
    def switch(self, model: str) -> None:
        self.ask(lambda: self.client.switch("role", model, wait=False))

    @rule(model=st.sampled_from([*SIZES, "role"]), count=st.integers(1, 3))
    @step
    def infer(self, model: str, count: int) -> None:
        for _ in range(count):
            self.calls.append(self.world.scene.infer(model))

    @rule(model=MODELS)
    @step
    def infer_impatiently(self, model: str) -> None:
        self.calls.append(self.world.scene.infer(model, timeout_s=0.05))

    @rule(model=MODELS)
    @step
    def give_up(self, model: str) -> None:
        call = self.world.scene.infer(model)
        call.cancel()

    @rule(model=MODELS)
    @step
    def hold(self, model: str) -> None:
        gate = self.world.scene.folder / f"gate{self.world.steps}"
        self.gates.append(gate)
        self.calls.append(self.world.scene.infer(model, f"advance:{gate}"))

    @rule()
    @step
    def let_go(self) -> None:
        if self.gates:
            self.gates.pop(0).touch()

    @rule(model=MODELS, how=st.sampled_from(CRASHES))
    @step
    def crash(self, model: str, how: str) -> None:
        self.world.crashes += 1
        self.calls.append(self.world.scene.infer(model, how))

    @rule(model=MODELS)
    @step
    def sicken(self, model: str) -> None:
        self.calls.append(self.world.scene.infer(model, "sicken"))

    @rule(size=st.sampled_from([0, 500_000, HOST_ROOM, HOST_ROOM]))
    @step
    def host_budget(self, size: int) -> None:
        self.attempt(lambda: self.client.update_settings({"host_budget_bytes": size}))

    @rule(model=MODELS, pinned=st.sampled_from([True, False, False]))
    @step
    def pin(self, model: str, pinned: bool) -> None:
        self.attempt(lambda: self.client.pin(model) if pinned else self.client.unpin(model))

    @rule(model=MODELS, seconds=st.sampled_from([1.0, 60.0]))
    @step
    def lease(self, model: str, seconds: float) -> None:
        self.attempt(lambda: self.leases.append(self.client.lease(model, seconds)))

    @rule()
    @step
    def release(self) -> None:
        if self.leases:
            self.attempt(self.leases.pop(0).release)

    @rule(size=st.sampled_from([200_000, 500_000, 800_000, ROOM, 1_300_000]))
    @step
    def budget(self, size: int) -> None:
        """A budget is taken, or below what pins and leases hold: then it is what it was."""
        self.roof = max(self.roof, size)
        refusal = None
        try:
            self.size = self.client.set_budget(self.world.device, size).budget_bytes
        except BudgetTooSmall as error:
            self.refused(error)
            refusal = error
        assert refusal is None or (refusal.held_by and size < (refusal.needed_bytes or 0))
        assert self.client.device(self.world.device).budget_bytes == self.size

    @rule(model=MODELS)
    @step
    def unblock(self, model: str) -> None:
        self.attempt(lambda: self.client.unblock(model))

    @rule(model=MODELS)
    @step
    def check(self, model: str) -> None:
        self.attempt(lambda: self.client.check_instance(model))

    @rule(model=MODELS)
    @step
    def plan(self, model: str) -> None:
        self.attempt(lambda: self.client.plan(model))

    @rule(model=MODELS, keep=st.sampled_from([0.2, -1.0]))
    @step
    def keep_alive(self, model: str, keep: float) -> None:
        self.attempt(lambda: self.client.update(model, {"config.keep_alive": keep}))

    @rule(which=st.integers(0, 20))
    @step
    def cancel(self, which: int) -> None:
        if self.handles:
            self.attempt(self.handles[which % len(self.handles)].cancel)

    @rule()
    @step
    def settle(self) -> None:
        """Wait until everything that was begun has ended, each thing in an allowed way."""
        for gate in self.gates:
            gate.touch()
        self.gates.clear()
        for call in self.calls:
            self.answered(call)
        self.calls.clear()
        for handle in self.handles:
            self.attempt(lambda handle=handle: handle.result(CALL_S))
        self.handles.clear()
        self.balanced()
        self.roof = max(self.size, self.books()[0])

    # --- what must hold -------------------------------------------------------------------------

    def ask(self, begin: Any) -> None:
        """Begin an operation; a refusal at once is as good, where it says why."""
        self.attempt(lambda: self.handles.append(begin()))

    def attempt(self, work: Any) -> None:
        """Do something that may be refused: with a reason, and never with INTERNAL."""
        try:
            work()
        except Cancelled:
            pass
        except ModelhostError as error:
            self.refused(error)

    def answered(self, call: Any) -> None:
        """Wait for a request's answer, which may be a typed error."""
        try:
            self.checked(call.result(timeout=CALL_S))
        except grpc.FutureTimeoutError:
            raise AssertionError("a request has no answer") from None
        except grpc.FutureCancelledError:
            pass
        except grpc.RpcError as error:
            self.refused(error_from_rpc(error, call="ModelInfer", target="", timeout=None))

    def checked(self, response: open_inference_pb2.ModelInferResponse) -> None:
        """A model that has weights answers what they say, wherever they have been."""
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == "sum":
                size, total = np.frombuffer(raw, np.int64)
                assert total == ANSWERS[int(size)], response.model_name

    def refused(self, error: ModelhostError) -> None:
        """Take note of a refusal."""
        assert error.reason, f"an error without a reason: {error!r} {error}"
        assert error.reason != "INTERNAL", error
        self.world.reasons[error.reason] = self.world.reasons.get(error.reason, 0) + 1

    @invariant()
    @step
    def within_the_budget(self) -> None:
        """Reserved and resident bytes are the instances', and never above the budget."""
        self.world.steps += 1
        used, held, _ = self.books()
        assert held <= used, f"{held} of {used} bytes"
        assert used <= self.roof, f"{used} bytes in a budget of {self.roof}"

    def books(self) -> tuple[int, int, host_pb2.Statistics]:
        """Return the bytes in the ledger, those of all instances, and where both are from."""
        found = self.client.statistics()
        name = f"devices/{self.world.device}"
        device = next(d for d in found.devices if d.device == name)
        held = sum(i.device_bytes for i in found.instances if i.device == name)
        return device.reserved_bytes + device.resident_bytes, held, found

    def balanced(self) -> None:
        """Once all is settled: the ledger is what the READY models take, to the byte, and nothing is open."""

        def at_rest() -> bool:
            used, held, found = self.books()
            moving = {Instance.QUEUED, Instance.LOADING, Instance.DRAINING}
            busy = any(i.state in moving for i in found.instances) or found.in_flight
            ready = sum(
                self.world.taken[i.model.removeprefix("models/")]
                for i in found.instances
                if i.state == Instance.READY
            )
            fits = used <= self.size
            warm = found.host_tier_bytes == sum(i.host_bytes for i in found.instances)
            # Copies beside devices go for a smaller budget as warm ones do, but for those that somebody holds.
            only_held = all(
                i.state == Instance.WARM and HELD & {*i.activity.evict_blockers}
                for i in found.instances
                if i.host_bytes
            )
            fits &= warm and (found.host_tier_bytes <= found.host_tier_budget_bytes or only_held)
            return not busy and fits and used == held == ready and not found.operations

        try:
            wait_until(at_rest, CALL_S, what="the books balance at rest")
        except ConditionNotMetError as error:
            raise AssertionError(f"{error}\n{self.world.taken}\n{self.books()[2]}") from error

    @step
    def teardown(self) -> None:
        """Settle, and find every model as usable as on the first day."""
        self.settle()
        for lease in self.leases:
            self.attempt(lease.release)
        self.restore()
        for model in SIZES:
            self.client.unpin(model)
            self.client.unblock(model)
            self.client.update(model, {"config.keep_alive": -1.0})
        self.client.set_budget(self.world.device, ROOM)
        self.size, self.roof = ROOM, max(self.roof, ROOM)
        for model in SIZES:
            self.calls.append(self.world.scene.infer(model))
        for call in self.calls:
            self.checked(call.result(timeout=CALL_S))
        self.calls.clear()
        self.balanced()

    def restore(self) -> None:
        """Give back what steps of the run took away for good: here, nothing."""
