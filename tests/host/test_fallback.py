"""Fallback models: who answers while a model cannot be loaded, and how far that goes."""

from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.stand_ins import mark
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def failing(run: Running, *models: str) -> None:
    for model in models:
        run.workers.load_errors[model] = ModelhostError(
            Reason.UNSUPPORTED_MODEL, f"not {model}", {"model": model}
        )


async def test_a_fallback_answers_and_says_so(world: World) -> None:
    """Where a model's load fails its fallback answers, marked; ModelReady says that requests are served."""
    async with world.host() as run:
        await run.have("a", fallback_model="b")
        await run.have("b")
        failing(run, "a")
        for _ in range(3):
            assert await run.infer("a", DEADLINE_S) == b"x" + mark("b")
        assert run.host.inference.ready("a")
        assert await run.infer("b", DEADLINE_S) == b"x"
        run.workers.load_errors.clear()
        await run.load("a")
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_a_model_that_can_be_loaded_needs_no_fallback(world: World) -> None:
    """The fallback is not loaded beside a model that does without."""
    async with world.host() as run:
        await run.have("a", fallback_model="b")
        await run.have("b")
        assert await run.infer("a", DEADLINE_S) == b"x"
        assert set(run.workers.resident) == {"a"}


@pytest.mark.parametrize("case", ["chain", "loop", "missing", "not there"])
async def test_there_is_no_second_fallback(world: World, case: str) -> None:
    """A fallback that cannot be loaded either has no fallback here: the error is the model's own."""
    async with world.host() as run:
        await run.have("a", fallback_model="b" if case != "missing" else "nobody")
        if case in ("chain", "loop"):
            await run.have("b", fallback_model="a" if case == "loop" else "c")
        elif case == "not there":
            await run.add("b")
        await run.have("c")
        failing(run, "a", "b")
        with pytest.raises(ModelhostError) as caught:
            await run.infer("a", DEADLINE_S)
        assert caught.value.message == "not a"
        assert "c" not in run.workers.resident
        assert not run.host.inference.ready("a")


async def test_an_error_of_the_request_is_no_case_for_a_fallback(world: World) -> None:
    """What a loaded model refuses, and a deadline, stay as they are."""
    async with world.host() as run:
        await run.have("a", fallback_model="b")
        await run.have("b")
        run.workers.infer_errors["a"] = ModelhostError(Reason.INVALID_ARGUMENT, "no", {})
        with pytest.raises(ModelhostError) as caught:
            await run.infer("a", DEADLINE_S)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        await run.end(await run.host.residency.unload("a"))
        run.workers.load_gate("a").close()
        request = run.infer("a", 1.0)
        await world.clock.advance(2.0)
        with pytest.raises(ModelhostError) as caught:
            await request
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        run.workers.load_gate("a").open()
        assert "b" not in run.workers.resident


async def test_a_refused_load_falls_back(world: World) -> None:
    """A model that is too large for its device, or that pins keep out, has its fallback, too."""
    async with world.host(budget=1000) as run:
        await run.have("huge", 2000, fallback_model="b")
        await run.have("b")
        assert await run.infer("huge", DEADLINE_S) == b"x" + mark("b")
        await run.host.models.pin("b", pinned=True)
        await run.have("large", 800, fallback_model="b")
        assert await run.infer("large", DEADLINE_S) == b"x" + mark("b")


async def test_a_stream_falls_back_too(world: World) -> None:
    """A streamed request to a model that cannot be loaded has one response, its fallback's."""
    async with world.host() as run:
        await run.have("a", fallback_model="b")
        await run.have("b")
        failing(run, "a")
        found = [r async for r in run.host.inference.stream("a", "", b"x", DEADLINE_S)]
        assert [(several, reply.payload) for several, reply in found] == [(False, b"x" + mark("b"))]
