"""The planner's two places together, step by step: whatever is decided, neither ever holds more than it may."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelhostd.core import host_tier as host_rules
from modelhostd.core.budgets import check_budget, over_budget
from modelhostd.core.errors import ModelhostError
from modelhostd.core.eviction import COST_AWARE, LRU, Holding, Policy
from modelhostd.core.host_tier import HOST
from modelhostd.core.ledger import Ledger
from modelhostd.core.residency import DeviceView, Evict, Fits, Want, plan
from modelhostd.core.resources import InstanceState

SIZES = {"a": 40, "b": 30, "c": 30, "d": 20, "e": 10}
MODELS = st.sampled_from(sorted(SIZES))


class Tiers(RuleBasedStateMachine):
    """A device and host memory, of which every decision of core is carried out at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.budgets = {"d": 70, HOST: 80}
        self.policy = Policy()
        self.now = 0.0
        self.used: dict[str, float] = {}
        self.pinned: set[str] = set()

    def view(self, place: str) -> DeviceView:
        on_device = self.ledger.of("d")
        holdings = [
            Holding(
                model,
                place,
                size,
                InstanceState.READY if model in on_device else InstanceState.WARM,
                last_used=self.used[model],
                second_last_use=self.used[model] - 1,
                load_s=size / 10,
                pinned=model in self.pinned,
            )
            for model, size in self.ledger.of(place).items()
        ]
        return DeviceView(place, self.budgets[place], holdings)

    def leave(self, models: Sequence[str]) -> None:
        """Take models off the device: to host memory where their copies are, if that is not above its budget."""
        for model in models:
            self.ledger.release("d", model)
            if self.view(HOST).free_bytes < 0:
                self.ledger.release(HOST, model)

    @rule(model=MODELS, more=st.integers(0, 3))
    def use(self, model: str, more: int) -> None:
        """Load a model where it can be, with a copy where there is room for one; it may take less than predicted."""
        self.now += 1
        self.used[model] = self.now
        if self.ledger.held("d", model):
            return
        views = {"d": self.view("d")}
        decided = plan(Want(model, SIZES[model], since=self.now), views, self.now, self.policy)
        if isinstance(decided, Evict):
            self.leave(decided.victims)
            views = {"d": self.view("d")}
            decided = plan(Want(model, SIZES[model], since=self.now), views, self.now, self.policy)
            assert isinstance(decided, Fits), "an eviction in vain"
        if not isinstance(decided, Fits):
            return
        if not self.ledger.held(HOST, model):
            room = host_rules.make_room(self.view(HOST), SIZES[model], self.now, self.policy)
            if room is not None:
                for victim in room.victims:
                    self.ledger.release(HOST, victim)
                self.ledger.hold(HOST, model, SIZES[model] - more)
        self.ledger.reserve("d", model, SIZES[model])
        self.ledger.true_up("d", model, SIZES[model] - more)

    @rule(model=MODELS)
    def unload(self, model: str) -> None:
        self.ledger.release("d", model)
        self.ledger.release(HOST, model)

    @rule(model=MODELS)
    def pin(self, model: str) -> None:
        self.pinned ^= {model}
        self.enforce()

    @rule(name=st.sampled_from([LRU, COST_AWARE]))
    def choose(self, name: str) -> None:
        self.policy = Policy(name)

    @rule(place=st.sampled_from(["d", HOST]), size=st.integers(0, 90))
    def set_budget(self, place: str, size: int) -> None:
        view = self.view(place)
        if size < sum(h.bytes for h in view.holdings if h.held):
            with pytest.raises(ModelhostError):
                check_budget(view, place, size)
            return
        check_budget(view, place, size)
        self.budgets[place] = size
        self.enforce()

    def enforce(self) -> None:
        """Take out who is above a budget."""
        leaving = over_budget(self.view("d"), self.now, self.policy, busy=True)
        self.leave([h.model for h in leaving])
        for model in host_rules.over_budget(self.view(HOST), self.now, self.policy):
            self.ledger.release(HOST, model)

    @invariant()
    def nothing_is_above_its_budget(self) -> None:
        """Pins, too, hold no more than that: a budget below them is refused."""
        for place in ("d", HOST):
            assert self.ledger.used(place) <= self.budgets[place]


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
