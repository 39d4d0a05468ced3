"""Counting calls: what a scrape will find after them."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.rpc_stats import BOUNDS_S, RpcStats, kind_of

PATH = "/modelhost.v1.ModelService/GetModel"


def test_a_method_is_counted_once_for_all_listeners() -> None:
    """The same path gives the same counts, named as go-grpc names service and method."""
    stats = RpcStats()
    first = stats.method(PATH, "unary")
    assert stats.method(PATH, "unary") is first
    assert (first.service, first.method) == ("modelhost.v1.ModelService", "GetModel")
    assert list(stats) == [first]


def test_a_call_is_started_before_it_is_handled() -> None:
    """A call under way shows as started only; its end adds its code and its seconds."""
    counts = RpcStats().method(PATH, "unary")
    counts.begin()
    assert (counts.started, counts.seconds.count, counts.handled) == (1, 0, {})
    counts.end(5, 0.25)
    assert (counts.started, counts.seconds.count, counts.handled) == (1, 1, {5: 1})
    assert counts.seconds.total == 0.25


def test_what_nobody_offers_is_one_series() -> None:
    """Unknown methods are counted together, and show only once there was one."""
    stats = RpcStats()
    assert list(stats) == []
    stats.unknown.begin()
    assert [(c.service, c.method) for c in stats] == [("_unknown", "_unknown")]


@given(st.lists(st.floats(min_value=0.0, max_value=1e6), max_size=50))
def test_every_call_is_in_the_bucket_of_its_time(seconds: list[float]) -> None:
    """A bound counts exactly the calls that took at most it, and nothing is lost above the last."""
    counts = RpcStats().method(PATH, "unary")
    for one in seconds:
        counts.begin()
        counts.end(0, one)
    assert counts.seconds.count == counts.started == len(seconds)
    at_most = 0
    for bound, count in zip(BOUNDS_S, counts.seconds.counts, strict=False):
        at_most += count
        assert at_most == sum(one <= bound for one in seconds)


def test_kinds_are_go_grpcs_words() -> None:
    """What streams decides the kind."""
    kinds = {
        (client, server): kind_of(client_streaming=client, server_streaming=server)
        for client in (False, True)
        for server in (False, True)
    }
    assert kinds == {
        (False, False): "unary",
        (False, True): "server_stream",
        (True, False): "client_stream",
        (True, True): "bidi_stream",
    }
