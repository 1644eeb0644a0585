"""What published findings come to in miniature: for each experiment, whether its results show what they must.

Owns the criteria. An experiment is a scenario with variants (``netsim.scenario.ExperimentSpec``); its criterion gets
the results of all variants and seeds and says whether the finding was reproduced, with the figures that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from netsim.results import SeedResult


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a criterion found."""

    passed: bool
    table: tuple[tuple[str, ...], ...]
    """Rows of text, the first one being the header."""
    sentence: str
    """The finding, and what was measured of it."""


CRITERIA: dict[str, Callable[[Sequence[SeedResult]], Verdict]] = {}
"""By the name that ``experiment.criterion`` has."""
