"""Which of the requests that wait run together."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.worker.batching import LENGTH_FLOOR, LENGTH_RATIO, Candidate, choose, passes

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


def test_items_of_like_length_share_a_pass():
    """Where padding would cost more than a pass, there is one more pass; else all stay together in their order."""
    lengths = [40, 5, 38, 6, 5, 39]
    assert passes(lengths, 10) == [[1, 4, 3], [2, 5, 0]]
    assert passes(lengths, float("inf")) == [[0, 1, 2, 3, 4, 5]]
    assert passes([7, 3, 7], 10) == [[0, 1, 2]]


@given(st.lists(st.integers(0, 200), max_size=40), st.integers(0, 300))
def test_no_pass_has_more_padding_than_another_pass_costs(lengths, price):
    """Each item is in one pass, no pass has padding beyond the price, and only where it would is there another."""
    found = passes(lengths, price)
    assert sorted(position for one in found for position in one) == list(range(len(lengths)))
    for one in found:
        longest = max((lengths[position] for position in one), default=0)
        assert sum(longest - lengths[position] for position in one) <= price
    for one, after in pairwise(found):
        joined = [*one, after[0]]
        assert sum(lengths[after[0]] - lengths[position] for position in joined) > price
