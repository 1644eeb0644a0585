"""Averaging networks that began differently shrinks their weights until nothing is learned; correction mends that.

The criterion of ``paper/vanishing-variance`` (Tian, Al-Ars, Kitsak, Hofstee, arXiv 2404.04616). Variants are called
``SETTING RULE``; a setting is what the rules ``none``, ``mean`` and ``corrected`` are compared in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from netsim.experiments.verdict import Results, Verdict
from netsim.results import SeedResult

RULES = ("none", "mean", "corrected")
SAME_START = "same-start"
"""In the name of settings in which all begin with the same weights."""
DEEP = "depth=6"
"""In the name of settings deep enough for signals to vanish."""

RATIO_STALLED = 0.25
"""A layer that has lost more of its variance than this no longer passes signals on; 1/n is what is left in the end."""
RATIO_KEPT = 0.8
SLOWER_MAX = 1.25
"""Corrected mixing may take so many times the steps that learning alone takes, noise and sampling included."""
SAME = 0.03
"""Accuracies closer than this are the same, of 180 examples."""


def judge(results: Sequence[SeedResult]) -> Verdict:
    """Deep networks: plain averaging stalls, corrected averaging learns as fast as alone; nothing from equal starts."""
    found = Results(results)
    settings = list(dict.fromkeys(variant.rpartition(" ")[0] for variant in found.variants))
    table: list[tuple[str, ...]] = [
        ("setting", "rule", "steps to 80 %", "seeds", "accuracy", "variance left")
    ]
    for setting in settings:
        table += [_row(found, setting, rule) for rule in RULES if f"{setting} {rule}" in found]
    deep = [setting for setting in settings if DEEP in setting and SAME_START not in setting]
    stalls = [_stalls(found, f"{setting} mean") for setting in deep]
    learns = [_learns(found, setting) for setting in deep]
    same = [_makes_no_difference(found, setting) for setting in settings if SAME_START in setting]
    passed = bool(deep) and bool(same) and all((*stalls, *learns, *same))
    return Verdict(
        passed=passed,
        table=tuple(table),
        sentence=(
            f"of {len(deep)} settings with six layers and different initial weights, plain averaging stalls in "
            f"{sum(stalls)}, and corrected averaging learns at least about as fast as no mixing in {sum(learns)}; from "
            f"equal initial weights the correction changes nothing in {sum(same)} of {len(same)}"
        ),
    )


def _row(found: Results, setting: str, rule: str) -> tuple[str, ...]:
    variant = f"{setting} {rule}"
    reached = len(found.values(variant, "steps_to_80"))
    return (
        setting,
        rule,
        found.spread(variant, "steps_to_80", ".0f") if reached else "never",
        f"{reached} of {found.seeds(variant)}",
        found.spread(variant, "local_accuracy"),
        found.spread(variant, "variance_ratio_min"),
    )


def _stalls(found: Results, variant: str) -> bool:
    ratios = found.values(variant, "variance_ratio_min")
    return not found.values(variant, "steps_to_80") and bool(ratios) and max(ratios) < RATIO_STALLED


def _learns(found: Results, setting: str) -> bool:
    """Corrected mixing gets there in all seeds, about as fast as no mixing gets there, if it does."""
    variant = f"{setting} corrected"
    steps = found.values(variant, "steps_to_80")
    ratios = found.values(variant, "variance_ratio_min")
    if len(steps) < found.seeds(variant) or not steps or min(ratios) < RATIO_KEPT:
        return False
    # Who learns alone has no graph: settings that differ by it share what a depth comes to without mixing.
    reference = f"{setting} none" if f"{setting} none" in found else f"{setting.split(' ')[0]} none"
    alone = found.median(reference, "steps_to_80")
    return math.isnan(alone) or found.median(variant, "steps_to_80") <= SLOWER_MAX * alone


def _makes_no_difference(found: Results, setting: str) -> bool:
    plain, corrected = (found.median(f"{setting} {rule}", "local_accuracy") for rule in ("mean", "corrected"))
    return abs(plain - corrected) <= SAME
