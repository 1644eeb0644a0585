"""Shared by all benchmarks: interleaved repeats, medians with their spread, one line per figure.

On a shared machine the same code can be twice as slow a minute later, so a benchmark runs its subject and its
baseline in turn and reports the median of the ratios pair by pair, never a ratio of two separate runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure: ``values`` of all repeats, and the bar it should meet."""

    name: str
    unit: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median meets its bar; None when there is none."""
        if self.at_least is not None:
            return self.median >= self.at_least
        if self.at_most is not None:
            return self.median <= self.at_most
        return None

    def line(self) -> str:
        """The figure, its spread and its bar, for people."""
        bar = ""
        if self.at_least is not None:
            bar = f"at least {self.at_least:g}"
        elif self.at_most is not None:
            bar = f"at most {self.at_most:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        spread = f"{min(self.values):.3g} .. {max(self.values):.3g}"
        return f"{self.name:<58} {self.median:>10.4g} {self.unit:<8} {spread:>18}   {bar:<14} {verdict}"


def ratios(subject: Sequence[float], baseline: Sequence[float]) -> tuple[float, ...]:
    """Subject over baseline, pair by pair."""
    return tuple(mine / theirs for mine, theirs in zip(subject, baseline, strict=True))
