"""The text format, read back by Prometheus' own parser."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from modelhostd.core.histogram import Histogram
from modelhostd.gateway.exposition import PIECE, counter, gauge, histogram, one, summary

labels = st.dictionaries(
    st.from_regex(r"\A[a-z_][a-z0-9_]{0,8}\Z").filter(
        lambda name: name != "le" and not name.startswith("__")
    ),
    # What the format cannot carry is not text: lone surrogates.
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    max_size=3,
)


def parsed(*pieces: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return sample name -> (labels, value) of an exposition."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families("".join(pieces)):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


@given(labels, st.floats(allow_nan=False) | st.integers(0, 2**53))
def test_any_label_and_value_comes_back(given_: dict[str, str], value: float) -> None:
    """Quotes, backslashes, line breaks and infinities survive."""
    assert parsed(*gauge("a_gauge", "What\nit \\ is.", [(given_, value)])) == {
        "a_gauge": [(given_, value)]
    }


def test_a_family_says_what_it_is() -> None:
    """Type and help stand before the samples, even when there are none."""
    (family,) = text_string_to_metric_families("".join(counter("calls_total", "All calls.", [])))
    assert (family.name, family.type, family.documentation) == ("calls", "counter", "All calls.")


def test_a_histogram_is_cumulative() -> None:
    """Each bucket counts all that took at most its bound; +Inf counts all."""
    values = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 2.0):
        values.add(value)
    found = parsed(*histogram("h", "H.", [({"m": "x"}, values)]))
    assert found["h_bucket"] == [
        ({"m": "x", "le": "0.1"}, 2.0),
        ({"m": "x", "le": "1"}, 3.0),
        ({"m": "x", "le": "+Inf"}, 4.0),
    ]
    assert found["h_sum"] == [({"m": "x"}, 2.65)]
    assert found["h_count"] == [({"m": "x"}, 4.0)]


def test_a_summary_is_a_sum_and_a_count() -> None:
    """No quantiles: those cannot be added up over hosts."""
    found = parsed(*summary("s", "S.", [({"m": "x"}, 1.5, 3)]))
    assert found == {"s_sum": [({"m": "x"}, 1.5)], "s_count": [({"m": "x"}, 3.0)]}


def test_a_large_family_comes_in_pieces() -> None:
    """No piece is much larger than its share, and together they are whole."""
    size = 10_000
    pieces = list(gauge("g", "G.", [({"i": str(i)}, i) for i in range(size)]))
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= PIECE + 200
    assert [value for _, value in parsed(*pieces)["g"]] == list(range(size))


def test_a_single_value_has_no_labels() -> None:
    """The line is the name and the value."""
    assert "".join(gauge("g", "G.", one(3))).splitlines()[-1] == "g 3"
