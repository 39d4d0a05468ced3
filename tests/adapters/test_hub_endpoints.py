"""Mirrors of the Hub: who is asked when, whose word counts, and who sees which token."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.hub_endpoints import HubEndpoints
from modelhostd.core.errors import Reason
from modelhostd.core.origins import parse_target
from modelhostd.core.transfer import RetryPolicy
from tests.adapters.downloads_support import PATIENT, tiny
from tests.adapters.source_desk import SourceDesk

FILES = tiny(300_000)
URI = "hf://org/tiny"


@pytest.fixture
def first() -> Iterator[LoopbackHub]:
    """The Hub."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as hub:
        yield hub


@pytest.fixture
def mirror(first: LoopbackHub) -> Iterator[LoopbackHub]:
    """A mirror of it: the same commits."""
    with LoopbackHub({"org/tiny": first.repos["org/tiny"]}) as hub:
        yield hub


def desk_for(
    tmp_path: Path,
    *hubs: LoopbackHub,
    retry: RetryPolicy = PATIENT,
    tokens: Credentials | None = None,
) -> SourceDesk:
    """Return a home that knows these endpoints."""
    credentials = tokens or Credentials()
    made = [
        Hub(HubConfig(endpoint=hub.endpoint, credential=credentials.for_origin, retry=retry))
        for hub in hubs
    ]
    return SourceDesk(tmp_path / "home", HubEndpoints(made))


async def test_the_first_answers_while_it_can(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub
) -> None:
    """The mirror is not asked at all."""
    desk = desk_for(tmp_path, first, mirror)
    await desk.fetch(URI)
    assert desk.content() == FILES
    assert mirror.requests == []


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_mirror_answers_for_one_that_fails(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub, status: int
) -> None:
    """For plan and files, without a wait for the one that fails."""
    first.fault(Fault("*", status=status, times=1000))
    desk = desk_for(tmp_path, first, mirror, retry=RetryPolicy(tries=2, base_s=0.001))
    await desk.fetch(URI)
    assert desk.content() == FILES


async def test_a_mirror_answers_for_one_that_is_gone(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub
) -> None:
    """Nobody listens at the first."""
    with LoopbackHub() as gone:
        pass
    desk = desk_for(tmp_path, gone, mirror)
    await desk.fetch(URI)
    assert desk.content() == FILES


async def test_a_file_goes_on_at_the_mirror(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub
) -> None:
    """The plan is the first's; its files fail there."""
    first.fault(Fault("*/resolve/*", status=503, times=1000))
    desk = desk_for(tmp_path, first, mirror)
    await desk.fetch(URI)
    assert desk.content() == FILES
    assert [request for request in mirror.requests if "/resolve/" in request.path]


async def test_a_refusal_of_the_first_is_believed(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub
) -> None:
    """A mirror may still have what the Hub took away."""
    del first.repos["org/tiny"]
    error = await desk_for(tmp_path, first, mirror).refused(URI)
    assert error.reason is Reason.SOURCE_NOT_FOUND
    assert mirror.requests == []


async def test_a_refusal_of_a_mirror_is_not(tmp_path: Path, first: LoopbackHub) -> None:
    """It lacks the repository: what the first said stands."""
    first.fault(Fault("*", status=503, times=1000))
    with LoopbackHub() as empty:
        error = await desk_for(tmp_path, first, empty).refused(URI)
    assert error.reason is Reason.NETWORK_ERROR


async def test_a_mirror_with_other_bytes_changes_nothing(
    tmp_path: Path, first: LoopbackHub
) -> None:
    """Its digests are not those of the plan."""
    first.fault(Fault("*/resolve/*", status=503, times=1000))
    with LoopbackHub({"org/tiny": Repo(tiny(300_000, seed=7))}) as other:
        error = await desk_for(tmp_path, first, other).refused(URI)
    assert error.reason in {
        Reason.SOURCE_NOT_FOUND, Reason.BAD_SOURCE_REPLY, Reason.NETWORK_ERROR,
        Reason.CHECKSUM_MISMATCH,
    }  # fmt: skip


async def test_each_endpoint_sees_its_own_token(
    tmp_path: Path, first: LoopbackHub, mirror: LoopbackHub
) -> None:
    """The Hub's never reaches a mirror."""
    first.tokens, mirror.tokens = {"hf_first"}, {"hf_mirror"}
    first.fault(Fault("*/resolve/*", status=503, times=1000))
    tokens = Credentials(
        (),
        {
            parse_target(first.endpoint, "x").origin: ("HF_TOKEN", "hf_first"),
            parse_target(mirror.endpoint, "x").origin: ("a file", "hf_mirror"),
        },
    )
    await desk_for(tmp_path, first, mirror, tokens=tokens).fetch(URI)
    for hub, token in ((first, "hf_first"), (mirror, "hf_mirror")):
        told = {r.headers.get("authorization") for r in hub.requests if r.where == "hub"}
        assert told == {f"Bearer {token}"}
