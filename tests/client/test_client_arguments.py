"""Odd arguments: whatever a method is called with, what it raises is an error of modelhost, with the argument's name."""

import enum
import inspect
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelhost import AsyncClient, Client, InvalidArgument, ModelhostError
from modelhost._arguments import shown
from modelhost.v1 import models_pb2
from tests.client.double import Double


class Strange:
    """A thing that tells nothing of itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


HALF = "\ud800"
ODD = [
    *(None, True, -1, 0, 2**31, 2**63, -(2**63) - 1, 10**5000, 1.5, math.nan, math.inf, -1e300),
    *("", "x", "a b", HALF, "\0", "x" * 100_000, b"", b"x", bytearray(b"x"), Decimal("1.5"), Path("x")),
    *([], ["x"], [HALF], [None], [b"x"], [["x"], ["y", "z"]], {}, {"x": 1}, {HALF: HALF}, {1: None}),
    *(np.zeros(()), np.array([None]), np.array(["x"]), np.float32("nan"), np.int64(2**62), 1j),
    *(object(), Strange(), Strange, [Strange()], {"x": Strange()}, {"x": HALF}, {"x": 2**63}, {"config": {"keep_alive": 1e300}}),
]  # fmt: skip

GOOD: Mapping[str, Any] = {
    "source": "hf://o/n", "sources": ["a"], "model": "a", "device": "cpu", "slot": "s", "file": "f",
    "operation": "o", "changes": {"description": "x"}, "document": b"{}", "inputs": {"x": [1]}, "texts": ["x"],
    "prompt": "x", "paths": [__file__], "handles": [], "budget_bytes": 5,
}  # fmt: skip
"""What the parameters without a default are given."""

METHODS = [
    name
    for name, method in inspect.getmembers(Client, inspect.isfunction)
    if not name.startswith("_") and name != "close"
]
CALLABLE = {"progress", "reconnecting", "handles"}
"""What is no value."""


def calls(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a method is called with: one argument of each call is odd."""
    parameters = inspect.signature(getattr(Client, name)).parameters.values()
    plain = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [name for name in plain if name not in ("self", *CALLABLE)]
    if name == "generate":
        names += ["max_tokens", "temperature", "stop", "seed", "ignore_eos"]
    needed = {p.name: GOOD[p.name] for p in parameters if p.name in GOOD and p.default is p.empty}
    for odd in names:
        for value in ODD:
            yield odd, {**needed, odd: value}


@pytest.mark.parametrize("name", METHODS)
def test_no_plain_error_comes_of_an_odd_argument(double: Double, client: Client, name: str) -> None:
    """Each parameter of each method with each odd value: an error of modelhost, or a request that can be sent."""
    for odd, arguments in calls(name):
        try:
            made = getattr(client, name)(**arguments)
            if inspect.isgenerator(made):
                next(made, None)
        except (ModelhostError, OSError) as error:
            str(error).encode()
        except Exception as error:
            pytest.fail(f"{name}({odd}={shown(arguments[odd])}): {type(error).__name__}: {error}")


async def test_the_asynchronous_client_refuses_the_same(double: Double) -> None:
    """Its methods take the arguments of the others; what is awaited or iterated over raises the same errors."""
    async with AsyncClient(double.target, retries=False) as client:
        for name in METHODS:
            if name in ("upload", "wait_all"):
                continue
            for odd, arguments in calls(name):
                if not isinstance(arguments[odd], int | str | None):
                    continue
                try:
                    made = getattr(client, name)(**arguments)
                    if inspect.isasyncgen(made):
                        await anext(made, None)
                    elif inspect.isawaitable(made):
                        await made
                except ModelhostError:
                    continue


def test_a_refusal_names_the_argument_and_what_came(double: Double, both) -> None:
    """The field is the argument as it is written; a bare text is no list; nothing is sent."""
    for call, field in (
        (lambda c: c.update_operation("o", rate_limit_bytes_per_second=2**63), "rate_limit_bytes_per_second"),
        (lambda c: c.set_budget("cpu", 2**63), "budget_bytes"),
        (lambda c: c.load("a", priority=2**31), "priority"),
        (lambda c: c.load(None), "model"),
        (lambda c: c.load("a", timeout=math.nan), "timeout"),
        (lambda c: c.lease("a", seconds=math.inf), "seconds"),
        (lambda c: c.pull("hf://o/n", allow_patterns="*.x"), "allow_patterns"),
        (lambda c: c.upload("m", "/dev"), "paths"),
        (lambda c: c.embed("m", ["a", "\ud800"]), "texts[1]"),
        (lambda c: c.models(labels={"a": 1}), "labels[a]"),
        (lambda c: c.events(since=-1), "since"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument) as caught:
            both(call)
        assert caught.value.metadata["field"] == field
    assert double.calls == []


class Mine(str, enum.Enum):  # noqa: UP042 (a StrEnum is written as its value anyway)
    """Models as a program may name them."""

    EMBEDDER = "e5"


def test_an_enum_of_texts_stands_for_its_values(double: Double, both) -> None:
    """A member goes as what it is worth, not by its name."""
    double.on("GetModel", models_pb2.Model(name="models/e5"))
    both(lambda c: c.get(Mine.EMBEDDER))
    assert {request.name for request in double.requests("GetModel")} == {"models/e5"}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"target": b"x"}, "target"),
        ({"target": "\udcff:1"}, "target"),
        ({"target": "h:" + "1" * 5000}, "target"),
        ({"timeout": None}, "timeout"),
        ({"timeout": math.inf}, "timeout"),
        ({"max_message_bytes": 2**63}, "max_message_bytes"),
        ({"retries": "no"}, "retries"),
    ],
)
def test_a_client_is_not_made_of_odd_arguments(kind, arguments, field) -> None:
    """What a client is made with is looked at as well."""
    with pytest.raises(InvalidArgument) as caught:
        kind(**arguments)
    assert caught.value.metadata["field"] == field


def test_a_target_of_the_environment_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is not UTF-8 is told by its name."""
    monkeypatch.setenv("MODELHOST_TARGET", "\udcff")
    with pytest.raises(InvalidArgument, match="MODELHOST_TARGET"):
        Client()
