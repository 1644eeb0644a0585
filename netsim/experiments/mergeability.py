"""One merge of all nodes at the end is enough, if they have mixed now and then before: the mergeability switch.

The criterion of ``paper/mergeability`` (arXiv 2507.06542). Variants are called ``start=S p=P``: whether all begin with
their own weights or with shared ones, and the chance with which an exchange that is due takes place.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from netsim.experiments.verdict import Results, Verdict
from netsim.results import SeedResult

NAME = re.compile(r"start=(own|shared) p=([0-9.]+)")

NO_MODEL = 0.25
"""Of ten classes, a merged model that tells no more is none."""
GOOD_MODEL = 0.85
GAIN_MIN = 0.05
"""What a merge must add to the accuracy of nodes that mix rarely, mean over the seeds."""
EXAMPLE = 0.006
"""Of 180 examples, one: what is no worse than this is no worse."""
SAME = 0.02
"""How far what is measured before a merge may be from what it then brings: some steps pass between."""


def judge(results: Sequence[SeedResult]) -> Verdict:
    """Nodes that never mixed cannot be merged; of those that mixed rarely the merge is far better."""
    found = Results(results)
    table: list[tuple[str, ...]] = [
        ("start", "p", "mixes per node", "local", "merged (foretold)", "after the merge", "gain")
    ]
    gains: dict[str, list[float]] = {}
    for variant in found.variants:
        start, chance = _read(variant)
        local, after = (found.by_seed(variant, metric) for metric in ("local_accuracy", "final_accuracy"))
        gains[variant] = [after[seed] - local[seed] for seed in local]
        table.append(
            (
                start,
                f"{chance:g}",
                found.spread(variant, "mixes_per_node", ".0f"),
                found.spread(variant, "local_accuracy"),
                found.spread(variant, "merged_accuracy"),
                found.spread(variant, "final_accuracy"),
                f"{sum(gains[variant]) / max(1, len(gains[variant])):+.3f}",
            )
        )
    mixed = [variant for variant in found.variants if _read(variant)[1] > 0]
    rare = min(
        (variant for variant in mixed if _read(variant)[0] == "own"),
        key=lambda name: _read(name)[1],
        default="",
    )
    never = max(found.values("start=own p=0", "final_accuracy"), default=1.0)
    seldom = min(found.values(rare, "final_accuracy"), default=0.0)
    passed = (
        never < NO_MODEL
        and seldom > GOOD_MODEL
        and _mean(gains, rare) >= GAIN_MIN
        and all(gain > -EXAMPLE for variant in mixed for gain in gains[variant])
        and all(_foretold(found, variant) for variant in found.variants)
    )
    return Verdict(
        passed=passed,
        table=tuple(table),
        sentence=(
            f"from different initial weights the merge of all comes to at most {never:.3f} without any exchange and "
            f"to at least {seldom:.3f} after {found.median(rare, 'mixes_per_node'):.0f} mixes per node, "
            f"{_mean(gains, rare):+.3f} on what the nodes were; after any mixing it is never worse than they were, by "
            f"more than an example: {_least(gains, mixed):+.3f} at least"
        ),
    )


def _read(variant: str) -> tuple[str, float]:
    match = NAME.fullmatch(variant)
    assert match is not None, f"{variant} is no variant of this experiment"
    return match[1], float(match[2])


def _mean(gains: dict[str, list[float]], variant: str) -> float:
    return statistics.fmean(gains.get(variant) or [0.0])


def _least(gains: dict[str, list[float]], variants: Sequence[str]) -> float:
    return min((gain for variant in variants for gain in gains[variant]), default=0.0)


def _foretold(found: Results, variant: str) -> bool:
    """One merge was committed, and it brought what the average of the live weights had promised."""
    merged, after = (found.by_seed(variant, metric) for metric in ("merged_accuracy", "final_accuracy"))
    return found.values(variant, "commits") == [1.0] * found.seeds(variant) and all(
        abs(merged[seed] - after[seed]) <= SAME for seed in after
    )
