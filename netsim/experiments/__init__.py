"""What published findings come to in miniature: for each experiment, whether its results show what they must.

Owns the criteria. An experiment is a scenario with variants (``netsim.scenario.ExperimentSpec``); its criterion gets
the results of all variants and seeds and says whether the finding was reproduced, with the figures that it rests on.
docs/EXPERIMENTS.md has what they came to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from netsim.experiments import disruption, mergeability, mixing_rates, vanishing_variance
from netsim.experiments.verdict import Verdict
from netsim.results import SeedResult

__all__ = ["CRITERIA", "Verdict"]

CRITERIA: dict[str, Callable[[Sequence[SeedResult]], Verdict]] = {
    "vanishing-variance": vanishing_variance.judge,
    "mergeability": mergeability.judge,
    "disruption": disruption.judge,
    "mixing-rates": mixing_rates.judge,
}
"""By the name that ``experiment.criterion`` has."""
