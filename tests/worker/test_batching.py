"""Which of the requests that wait run together."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.worker.batching import LENGTH_FLOOR, LENGTH_RATIO, Candidate, choose

waiting = st.lists(
    st.builds(Candidate, st.sampled_from("ab"), st.integers(1, 12), st.integers(0, 500)),
    min_size=1,
    max_size=40,
)


def test_one_that_waits_alone_runs_alone():
    """There is no waiting for company: the only request runs, whatever its size."""
    assert choose([Candidate("a", 100, 7)], 8) == [0]


def test_alike_requests_run_together_up_to_the_limit():
    """The limit counts items, not requests; one that does not fit any more leaves room to a smaller one."""
    candidates = [Candidate("a", items) for items in (3, 4, 2, 1)]
    assert choose(candidates, 8) == [0, 1, 3]


def test_long_and_short_ones_do_not_run_together():
    """What would be padded to more than twice its length waits for its like."""
    lengths = (100, 210, 150, 60, 450)
    assert choose([Candidate("a", 1, length) for length in lengths], 8) == [0, 2]


def test_short_lengths_count_as_the_same():
    """Below the floor it is not worth telling lengths apart."""
    assert choose([Candidate("a", 1, length) for length in (1, 60, 64, 128)], 8) == [0, 1, 2, 3]


@given(waiting, st.integers(1, 20))
def test_what_runs_together_fits_together(candidates, limit):
    """The first always runs; the rest is of its kind and length, within the limit, each once, in order."""
    chosen = choose(candidates, limit)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    batch = [candidates[index] for index in chosen]
    assert {one.kind for one in batch} == {batch[0].kind}
    if len(batch) > 1:
        assert sum(one.items for one in batch) <= limit
        lengths = [max(one.length, LENGTH_FLOOR) for one in batch]
        assert max(lengths) <= LENGTH_RATIO * min(lengths)


@given(waiting, st.integers(1, 20))
def test_nobody_who_fits_is_left(candidates, limit):
    """Whoever was left would have broken a rule together with those who were chosen."""
    chosen = choose(candidates, limit)
    batch = [candidates[index] for index in chosen]
    for index in set(range(len(candidates))).difference(chosen):
        one = candidates[index]
        # Chosen before its turn, so that what came after it does not count.
        earlier = [candidates[other] for other in chosen if other < index]
        lengths = [max(other.length, LENGTH_FLOOR) for other in (*earlier, one)]
        assert (
            one.kind != batch[0].kind
            or sum(other.items for other in earlier) + one.items > limit
            or max(lengths) > LENGTH_RATIO * min(lengths)
        )


@given(waiting, st.integers(1, 20))
def test_everybody_runs_within_as_many_turns_as_there_are_requests(candidates, limit):
    """Nothing is passed over for ever: each turn serves the first, so n requests take at most n turns."""
    left = candidates
    for _ in range(len(candidates)):
        chosen = set(choose(left, limit))
        left = [one for index, one in enumerate(left) if index not in chosen]
        if not left:
            return
    raise AssertionError(left)
