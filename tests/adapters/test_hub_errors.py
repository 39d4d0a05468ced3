"""Every way the Hub says no, against a hub on loopback: the reason, the message, nothing left behind."""

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy
from tests.adapters.downloads_support import URI, Site, tiny

TOKEN = "hf_canary_0123456789"
OTHER_TOKEN = "hf_other_0123456789"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with a public, a private, a gated and a disabled repository."""
    repos = {
        "org/tiny": Repo(tiny(), pipeline_tag="sentence-similarity", tags=("a", "b")),
        "org/private": Repo(tiny(), private=True, readers=(TOKEN,)),
        "org/gated": Repo(tiny(), gated=True, readers=(TOKEN,)),
        "org/disabled": Repo(tiny(), disabled=True),
        "org/empty": Repo({}),
    }
    with LoopbackHub(repos, tokens=(TOKEN, OTHER_TOKEN), page_size=2) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Site:
    """A home that talks to it."""
    return Site(tmp_path / "home", hub)


async def failure(site: Site, uri: str = URI) -> ModelhostError:
    """Return how fetching fails; nothing may be visible after it."""
    with pytest.raises(ModelhostError) as caught:
        await site.fetch(uri)
    assert site.visible() == []
    assert TOKEN not in caught.value.message
    assert TOKEN not in str(caught.value.metadata)
    assert uri.partition("@")[0] in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("uri", "token", "reason"),
    [
        ("hf://org/missing", None, Reason.SOURCE_NOT_FOUND),
        ("hf://org/missing", TOKEN, Reason.SOURCE_NOT_FOUND),
        ("hf://org/private", None, Reason.SOURCE_NOT_FOUND),
        ("hf://org/private", OTHER_TOKEN, Reason.SOURCE_NOT_FOUND),
        ("hf://org/gated", None, Reason.GATED),
        ("hf://org/gated", OTHER_TOKEN, Reason.GATED),
        ("hf://org/disabled", None, Reason.ACCESS_DENIED),
        ("hf://org/tiny", "hf_unknown", Reason.AUTHENTICATION_REQUIRED),
        ("hf://org/tiny", "bad\r\ntoken", Reason.AUTHENTICATION_REQUIRED),
        ("hf://org/tiny@nowhere", None, Reason.SOURCE_NOT_FOUND),
        ("hf://org/empty", None, Reason.SOURCE_NOT_FOUND),
    ],
)
async def test_a_refusal_has_its_reason(
    site: Site, uri: str, token: str | None, reason: Reason
) -> None:
    """Missing, private, gated, disabled, a bad token, a missing revision."""
    site.token = token
    if token and "\r" in token:
        with pytest.raises(ModelhostError) as caught:
            await site.fetch(uri)
        assert caught.value.reason is reason
        assert "canary" not in caught.value.message
        return
    error = await failure(site, uri)
    assert error.reason is reason
    assert site.parts() == []


async def test_hints_depend_on_the_token(site: Site) -> None:
    """Without one the message names HF_TOKEN; with one it does not send people in circles."""
    assert "HF_TOKEN" in (await failure(site, "hf://org/private")).message
    site.token = OTHER_TOKEN
    assert "HF_TOKEN" not in (await failure(site, "hf://org/private")).message
    assert (await failure(site, "hf://org/gated")).metadata["credential"] == "HF_TOKEN is set"


@pytest.mark.parametrize("uri", ["hf://org/private", "hf://org/gated"])
async def test_a_token_with_access_opens_the_door(site: Site, uri: str) -> None:
    """And is asked for anew: it was set while the daemon ran."""
    await failure(site, uri)
    site.token = TOKEN
    await site.fetch(uri)
    assert site.visible() == ["tiny/1"]


async def test_a_gated_repository_can_be_inspected(site: Site) -> None:
    """Its facts are public, its files are not: no memory is predicted, and gated says why."""
    facts = await site.downloads.inspect(Source("hf://org/gated"))
    assert facts.gated
    assert facts.predicted_bytes == 0
    site.token = TOKEN
    assert (await site.downloads.inspect(Source("hf://org/gated"))).predicted_bytes == 1000


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (500, Reason.NETWORK_ERROR),
        (502, Reason.NETWORK_ERROR),
        (503, Reason.NETWORK_ERROR),
        (504, Reason.NETWORK_ERROR),
        (408, Reason.NETWORK_ERROR),
        (429, Reason.RATE_LIMITED),
        (400, Reason.BAD_SOURCE_REPLY),
        (403, Reason.ACCESS_DENIED),
        (404, Reason.SOURCE_NOT_FOUND),
        (204, Reason.BAD_SOURCE_REPLY),
        (304, Reason.BAD_SOURCE_REPLY),
    ],
)
@pytest.mark.parametrize(
    "match",
    ["/api/models/org/tiny", "/api/models/org/tiny/tree/*", "*/resolve/*/model.safetensors"],
)
async def test_a_status_that_stays_has_its_reason(
    site: Site, hub: LoopbackHub, match: str, status: int, reason: Reason
) -> None:
    """For each request of a plan; the ones that may pass were tried as often as the policy says."""
    fault = hub.fault(Fault(match, status=status, times=1000))
    assert (await failure(site)).reason is reason
    transient = reason in {Reason.NETWORK_ERROR, Reason.RATE_LIMITED}
    assert fault.used == (site.retry.tries if transient else 1)


@pytest.mark.parametrize(
    "match",
    [
        "/api/models/org/tiny",
        "/api/models/org/tiny/tree/*",
        "*/resolve/*/model.safetensors",
        "*/resolve/*/config.json",
    ],
)
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"drop": True, "reset": True}])
async def test_a_failure_that_passes_is_not_noticed(
    site: Site, hub: LoopbackHub, match: str, fault: dict[str, int]
) -> None:
    """Tried again, and the attempt shows in the progress at most."""
    hub.fault(Fault(match, times=2, **fault))  # type: ignore[arg-type]
    await site.fetch()
    assert site.content() == tiny()


@pytest.mark.parametrize("value", ["0", "garbage", "-5", "Tue, 14 Nov 2000 22:13:30 GMT"])
async def test_odd_retry_after_headers_do_no_harm(site: Site, hub: LoopbackHub, value: str) -> None:
    """A number, a date in the past, garbage."""
    hub.fault(Fault("/api/models/org/tiny", status=429, headers={"Retry-After": value}, times=2))
    await site.fetch()


async def test_a_year_of_waiting_is_told_not_waited(site: Site, hub: LoopbackHub) -> None:
    """RATE_LIMITED at once, with the seconds."""
    headers = {"Retry-After": "31536000"}
    fault = hub.fault(Fault("/api/models/org/tiny", status=429, headers=headers, times=9))
    error = await failure(site)
    assert (error.reason, error.retry_delay_s) == (Reason.RATE_LIMITED, 31_536_000.0)
    assert error.metadata["retryAfterSeconds"] == "3.1536e+07" or error.metadata[
        "retryAfterSeconds"
    ].startswith("31536000")
    assert fault.used == 1


async def test_the_hubs_own_rate_limit_header_is_read(site: Site, hub: LoopbackHub) -> None:
    """t seconds to the reset."""
    headers = {
        "RateLimit": '"api";r=0;t=4000',
        "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
    }
    hub.fault(Fault("/api/models/org/tiny", status=429, headers=headers, times=9))
    assert (await failure(site)).retry_delay_s == 4000.0


async def test_a_hub_that_is_not_there_is_a_network_error(site: Site, hub: LoopbackHub) -> None:
    """Refused connections are tried again, then told."""
    hub.stop()
    error = await failure(site)
    assert error.reason is Reason.NETWORK_ERROR
    assert "ECONNREFUSED" in error.message


async def test_a_name_that_does_not_resolve_is_told(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has it: that ends. What the resolver says without a network would be waited out."""

    def unknown(*_: object, **__: object) -> None:
        # Not the machine's resolver: it may have nobody to ask, and is beyond loopback.
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    site = Site(tmp_path / "home", hub, endpoint="http://hub.invalid")
    assert (await failure(site)).reason is Reason.NETWORK_ERROR


async def test_a_hub_that_says_nothing_is_given_up_on(tmp_path: Path, hub: LoopbackHub) -> None:
    """No headers within the stall limit is a failure like any other."""
    site = Site(
        tmp_path / "home",
        hub,
        limits=Limits(stall_s=0.2),
        retry=RetryPolicy(tries=2, base_s=0.001),
    )
    hub.fault(Fault("/api/models/org/tiny", delay_s=30, times=9))
    error = await failure(site)
    assert error.reason is Reason.NETWORK_ERROR
    assert "no progress" in error.message


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("/api/models/org/tiny", b"<html>log in</html>"),
        ("/api/models/org/tiny", b"[]"),
        ("/api/models/org/tiny", b'{"id": "org/tiny"}'),
        ("/api/models/org/tiny", b'{"id": "org/tiny", "sha": "../../etc"}'),
        ("/api/models/org/tiny", b'{"id": "org/tiny", "sha": 5}'),
        ("/api/models/org/tiny", b'{"a":' + b"[" * 100_000),
        ("/api/models/org/tiny/tree/*", b"null"),
        ("/api/models/org/tiny/tree/*", b'[{"type": "file"}]'),
        (
            "/api/models/org/tiny/tree/*",
            b'[{"type":"file","path":"a","size":-1,"oid":"%b"}]' % (b"a" * 40),
        ),
        (
            "/api/models/org/tiny/tree/*",
            b'[{"type":"file","path":"a","size":1e9,"oid":"%b"}]' % (b"a" * 40),
        ),
        ("/api/models/org/tiny/tree/*", b'[{"type":"file","path":"a","size":1,"oid":"../x"}]'),
        (
            "/api/models/org/tiny/tree/*",
            b'[{"type":"file","path":7,"size":1,"oid":"%b"}]' % (b"a" * 40),
        ),
        (
            "/api/models/org/tiny/tree/*",
            b'[{"type":"file","path":"a","size":1,"oid":"%b","lfs":{"oid":"../../x","size":1,"pointerSize":9}}]'
            % (b"a" * 40),
        ),
    ],
    ids=[str(number) for number in range(13)],
)
async def test_an_answer_that_is_not_the_hubs_is_refused(
    site: Site, hub: LoopbackHub, match: str, body: bytes
) -> None:
    """A login page, the wrong JSON, malformed digests, lying sizes: BAD_SOURCE_REPLY."""
    hub.fault(Fault(match, status=200, body=body, times=9))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY


@pytest.mark.parametrize(
    "name",
    ["../../escape.json", "/etc/passwd.json", "a\\b.json", "a\x00b.json", "x\n.json", "A.JSON"],
)
async def test_a_hostile_listing_is_refused_before_a_byte(
    site: Site, hub: LoopbackHub, name: str
) -> None:
    """UNSAFE_FILE, whatever the trick; nothing is asked of the CDN."""
    hub.repos["org/tiny"].commit({**tiny(), "a.json": b"{}", name: b"{}"})
    assert (await failure(site)).reason is Reason.UNSAFE_FILE
    assert hub.sent_bytes("cdn") == 0


async def test_endless_pages_end(site: Site, hub: LoopbackHub) -> None:
    """A next link that leads back is not followed for ever, nor is the same file listed twice."""
    hub.next_link = f"{hub.endpoint}/api/models/org/tiny/tree/{hub.repos['org/tiny'].head}"
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY
    assert len(hub.requests) < 50


@pytest.mark.parametrize(
    "link", ["http://127.0.0.2:9/x", "file:///etc/passwd", "http://[", "ftp://x/"]
)
async def test_a_page_link_to_elsewhere_gets_neither_token_nor_request(
    site: Site, hub: LoopbackHub, link: str
) -> None:
    """The library would follow any next link with the token; the policy does not."""
    site.token = TOKEN
    hub.next_link = link
    assert (await failure(site)).reason in {Reason.SOURCE_NOT_ALLOWED, Reason.BAD_SOURCE_REPLY}


async def test_a_page_link_to_another_allowed_origin_gets_no_token(
    site: Site, hub: LoopbackHub
) -> None:
    """Another port of the operator's host may be asked; the token is the endpoint's alone."""
    site.token = TOKEN
    with LoopbackHub() as other:
        hub.next_link = f"{other.endpoint}/api/models/org/tiny/tree/main"
        await failure(site)
        assert [request.headers.get("authorization") for request in other.requests] == [None]


async def test_a_renamed_repository_is_followed(site: Site, hub: LoopbackHub) -> None:
    """As the Hub does it: a relative redirect, here of API and files."""
    hub.renames["org/old"] = "org/tiny"
    await site.fetch("hf://org/old")
    assert site.content() == tiny()


async def test_a_branch_that_moves_meanwhile_does_not_mix(site: Site, hub: LoopbackHub) -> None:
    """After the plan only its commit is asked for."""
    repo = hub.repos["org/tiny"]
    commit = repo.head
    gate = threading.Event()
    fault = hub.fault(Fault("/api/models/org/tiny/tree/*", gate=gate))
    task = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    repo.commit(tiny(seed=9))
    gate.set()
    fetched = await task
    assert fetched.facts.revision == commit
    assert site.content() == tiny()


async def test_a_file_that_changed_on_the_way_is_refused(site: Site, hub: LoopbackHub) -> None:
    """The location's digest must be the listing's."""
    headers = {"X-Linked-Etag": f'"{"0" * 64}"'}
    hub.fault(Fault("*/resolve/*/model.safetensors", headers=headers, times=9))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY


async def test_offline_mode_is_honoured(
    site: Site, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE, which the library reads when it is imported: OFFLINE, and no request."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (await failure(site)).reason is Reason.OFFLINE
    assert hub.requests == []


async def test_the_facts_come_clean(site: Site, hub: LoopbackHub) -> None:
    """Tags and licence as texts of bounded length, whatever the card holds."""
    repo = hub.repos["org/tiny"]
    repo.tags = ("x" * 5000, "line\nbreak", "\ud800")
    facts = await site.downloads.inspect(Source(URI))
    assert facts.licence == "apache-2.0"
    assert facts.task == "sentence-similarity"
    assert all(len(tag) <= 256 and tag.isprintable() for tag in facts.tags)
    "".join(facts.tags).encode()


async def test_the_library_is_imported_late_and_quietly(site: Site) -> None:
    """The daemon's start does not pay for it, and it sends nothing by itself."""
    code = (
        "import sys; import modelhostd.adapters.downloads, modelhostd.adapters.files; "
        "print([m for m in ('huggingface_hub', 'httpx2', 'torch', 'numpy') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    out, _ = await process.communicate()
    assert out.strip() == b"[]"
