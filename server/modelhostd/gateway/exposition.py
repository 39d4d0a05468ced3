"""The text format that Prometheus reads, version 0.0.4.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/

A family is yielded in pieces of about ``PIECE`` characters, which take about a millisecond, so that whoever
writes it can let others run in between: with thousands of models it would else hold the loop.
"""

from collections.abc import Iterable, Iterator, Mapping

from modelhostd.core.histogram import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PIECE = 32 * 1024

Labels = Mapping[str, str]
_TEXT = str.maketrans({"\\": r"\\", "\n": r"\n"})
_LABEL = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def gauge(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """Yield a family of values that go up and down."""
    return _family(name, "gauge", text, (_line(name, labels, value) for labels, value in samples))


def counter(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """Yield a family of values that only rise; ``name`` ends in ``_total``."""
    return _family(name, "counter", text, (_line(name, labels, value) for labels, value in samples))


def summary(name: str, text: str, samples: Iterable[tuple[Labels, float, int]]) -> Iterator[str]:
    """Yield a family of sums and counts: ``(labels, sum, count)``."""
    lines = (
        _line(f"{name}_sum", labels, total) + _line(f"{name}_count", labels, count)
        for labels, total, count in samples
    )
    return _family(name, "summary", text, lines)


def histogram(name: str, text: str, samples: Iterable[tuple[Labels, Histogram]]) -> Iterator[str]:
    """Yield a family of histograms."""
    lines = ("".join(_buckets(name, labels, values)) for labels, values in samples)
    return _family(name, "histogram", text, lines)


def one(value: float) -> Iterable[tuple[Labels, float]]:
    """Return the only sample of a family without labels."""
    return [({}, value)]


def _family(name: str, kind: str, text: str, lines: Iterable[str]) -> Iterator[str]:
    piece = [f"# HELP {name} {text.translate(_TEXT)}\n# TYPE {name} {kind}\n"]
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _buckets(name: str, labels: Labels, values: Histogram) -> Iterator[str]:
    below = 0
    for bound, count in zip(values.bounds, values.counts, strict=False):
        below += count
        yield _line(f"{name}_bucket", {**labels, "le": f"{bound:g}"}, below)
    yield _line(f"{name}_bucket", {**labels, "le": "+Inf"}, values.count)
    yield _line(f"{name}_sum", labels, values.total)
    yield _line(f"{name}_count", labels, values.count)


def _line(name: str, labels: Labels, value: float) -> str:
    if not labels:
        return f"{name} {value}\n"
    inside = ",".join([f'{key}="{text.translate(_LABEL)}"' for key, text in labels.items()])
    return f"{name}{{{inside}}} {value}\n"
