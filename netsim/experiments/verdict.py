"""What a criterion finds, and how it reads results: by variant, a figure of all seeds at a time.

Owns the form of verdicts and of the figures in their tables. What a variant is called is the scenario's; a criterion
asks for variants by name and finds those missing that a small form leaves out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from netsim.results import SeedResult


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a criterion found."""

    passed: bool
    table: tuple[tuple[str, ...], ...]
    """Rows of text, the first one being the header."""
    sentence: str
    """The finding, and what was measured of it."""


class Results:
    """The results of an experiment, by variant."""

    def __init__(self, results: Sequence[SeedResult]) -> None:
        self._of: dict[str, list[SeedResult]] = {}
        for result in results:
            self._of.setdefault(result.variant, []).append(result)

    @property
    def variants(self) -> list[str]:
        """The names of all variants that were run, in their order."""
        return list(self._of)

    def __contains__(self, variant: str) -> bool:
        return variant in self._of

    def seeds(self, variant: str) -> int:
        """How many seeds were run."""
        return len(self._of.get(variant, ()))

    def values(self, variant: str, metric: str) -> list[float]:
        """The figure of each seed that has it."""
        found = (result.summary.get(metric, math.nan) for result in self._of.get(variant, ()))
        return [value for value in found if math.isfinite(value)]

    def by_seed(self, variant: str, metric: str) -> dict[int, float]:
        """The figure of each seed that has it, by seed."""
        found = {result.seed: result.summary.get(metric, math.nan) for result in self._of.get(variant, ())}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def median(self, variant: str, metric: str) -> float:
        """Over the seeds that have it; NaN where none has."""
        values = self.values(variant, metric)
        return statistics.median(values) if values else math.nan

    def spread(self, variant: str, metric: str, form: str = ".3f") -> str:
        """The median and, of several seeds, the lowest and the highest, as text; ``-`` where no seed has it."""
        return spread(self.values(variant, metric), form)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The median and, of several, the lowest and the highest; ``-`` for none."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} .. {max(values):{form}})"
