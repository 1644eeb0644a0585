"""How far outer steps may go before members, or their anchor, run away. Arithmetic for the check of a run spec.

Owns the limits, derived from recursions without any gradient, and nothing that steps: that is ``training.outer_steps``.
"""

from __future__ import annotations

import math


def nesterov_rate_max(momentum: float) -> float:
    """The largest rate at which Nesterov's steps do not grow where members agree on where to go, to two decimals.

    With x the distance to where all inner steps lead, which they cover in full, a step is
    x <- x - rate (x + momentum m), m <- momentum m + x: both eigenvalues are within the unit circle below
    (2 + 2 momentum) / (1 + 2 momentum).
    """
    return _below((2 + 2 * momentum) / (1 + 2 * momentum))


def pair_rate_max(momentum: float) -> float:
    """The largest rate at which ``pair_step`` still brings members of random pairs together, to two decimals.

    A pair leaves half of the variance of its members' distance from the mean of all. The second moments of distance and
    momentum shrink below 2 (1 - momentum^2): a momentum of 0.9 holds members together below 0.38, one of 0.5 below 1.5.
    By how much is ``outer_steps.pair_contraction``.
    """
    return _below(2 * (1 - momentum**2))


def _below(limit: float) -> float:
    # Rounded, lest a limit of whole hundredths count as just above itself.
    return max(0, math.ceil(round(100 * limit, 9)) - 1) / 100
