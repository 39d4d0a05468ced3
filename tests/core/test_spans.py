"""Spans of a file: against the set of offsets that they stand for."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.spans import Spans, next_piece, parse_spans

SIZE = 60
offsets = st.integers(0, SIZE)
pairs = st.tuples(offsets, offsets).map(lambda p: (min(p), max(p)))
many = st.lists(pairs, max_size=12)


def offsets_of(spans: Spans) -> set[int]:
    return {offset for start, end in spans for offset in range(start, end)}


@given(many)
def test_spans_are_the_set_of_their_offsets(added: list[tuple[int, int]]) -> None:
    """Whatever is added in whatever order: the same offsets, in the fewest spans, sorted."""
    spans = Spans(added)
    expected = {offset for start, end in added for offset in range(start, end)}
    assert offsets_of(spans) == expected
    assert spans.total == len(expected)
    ends = [offset for span in spans for offset in span]
    assert ends == sorted(set(ends))
    assert spans.prefix == next(n for n in range(SIZE + 1) if n not in expected)
    assert spans.end == max(expected, default=-1) + 1


@given(many, offsets)
def test_gaps_are_what_is_missing(added: list[tuple[int, int]], size: int) -> None:
    """Spans and gaps together are the file, and never overlap."""
    spans = Spans(added)
    missing = {offset for start, end in spans.gaps(size) for offset in range(start, end)}
    assert missing == set(range(size)) - offsets_of(spans)
    assert offsets_of(spans.within(size)) == offsets_of(spans) & set(range(size))


@given(many)
def test_text_is_read_back(added: list[tuple[int, int]]) -> None:
    """What is written into a journal is what is read from it, and a copy stands alone."""
    spans = Spans(added)
    assert parse_spans(spans.text()) == spans
    copy = spans.copy()
    copy.add(SIZE, SIZE + 5)
    assert SIZE not in offsets_of(spans)


@given(st.text(alphabet="0123456789- x", max_size=30))
def test_foreign_text_is_refused_or_whole(text: str) -> None:
    """Garbage never becomes spans: only what the writer itself would have written is read."""
    spans = parse_spans(text)
    assert spans is None or parse_spans(spans.text()) == spans


def test_torn_and_forged_text_is_refused() -> None:
    """Out of order, touching, empty, negative, cut off."""
    for text in ("5-3", "0-5 5-9", "7-9 0-5", "0-", "-5", "0-5 ", "0-0", "a", "0-5\n", "\u0663-5"):
        assert parse_spans(text) is None, text


@given(many, many, st.integers(1, 20))
def test_pieces_cover_the_file_from_the_front(
    done: list[tuple[int, int]], taken: list[tuple[int, int]], piece: int
) -> None:
    """Each piece is free, no longer than allowed and the first there is; together they leave nothing."""
    have, busy = Spans(done), list(taken)
    while (found := next_piece(have, busy, SIZE, piece)) is not None:
        start, end = found
        assert 0 < end - start <= piece
        assert end <= SIZE
        free = set(range(SIZE)) - offsets_of(have) - offsets_of(Spans(busy))
        assert set(range(start, end)) <= free
        assert start == min(free)
        busy.append(found)
    assert offsets_of(have) | offsets_of(Spans(busy)) >= set(range(SIZE))
