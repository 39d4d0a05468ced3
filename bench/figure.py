"""What a figure is: a number measured beside its reference, with the goal it is held against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One number and what was wanted of it.

    ``limit`` None = for information. ``of_reference`` = the limit is a share of the reference, else it has the
    number's own unit. ``at_least`` = more is better.
    """

    name: str
    measured: float
    unit: str
    limit: float | None = None
    at_least: bool = False
    reference: float | None = None
    of_reference: bool = False
    expected: str = ""
    absent: str = ""
    """Why there is no reference, where there should be one."""

    @property
    def ratio(self) -> float | None:
        """The share of the reference; None without one."""
        return self.measured / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        held = self.ratio if self.of_reference else self.measured
        if self.limit is None or held is None:
            return None
        return held >= self.limit if self.at_least else held <= self.limit

    def row(self) -> Sequence[str]:
        """Return the cells: name, goal, expected, measured, reference, ratio, verdict."""
        goal = ""
        if self.limit is not None:
            unit = "x" if self.of_reference else f" {self.unit}"
            goal = f"{'at least' if self.at_least else 'at most'} {self.limit:g}{unit}"
        return (
            self.name,
            goal,
            self.expected,
            f"{_number(self.measured)} {self.unit}",
            self.absent if self.reference is None else f"{_number(self.reference)} {self.unit}",
            "" if self.ratio is None else f"{self.ratio:.2f}x",
            {None: "", True: "met", False: "**not met**"}[self.met],
        )


COLUMNS = ("figure", "goal", "expected", "measured", "reference", "ratio", "verdict")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure: rounds of everything, and the share of the usual number of requests in a round."""

    rounds: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """Figures that are measured together. ``how`` says in a sentence or two what is done."""

    name: str
    how: str
    measure: Callable[[Effort], Sequence[Figure]]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
