"""How fast the product's own pull draws nodes together, beside the exchanges of the literature and the theory of each.

The criterion of ``paper/mixing-rates``. Variants are called ``n=N s=S PACE``: so many nodes pull from so many others,
all at the same moments (``lockstep``) or each at its own (``staggered``). In lockstep the theory is that of random
pull (``netsim.research.rates``). Staggered, everybody still mixes once per round, but what is pulled has often been
mixed since the puller last did: as Gauss-Seidel sweeps beat those of Jacobi, less is left after a round.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from netsim.experiments.verdict import Results, Verdict
from netsim.results import SeedResult

NAME = re.compile(r"n=([0-9]+) s=([0-9]+) (lockstep|staggered)")

ROUNDS = 13
"""As many as the scenario lasts."""
RESEARCH_ROUNDS, RESEARCH_SEEDS = 13, 3
"""The same for the exchanges that run beside it."""
FAN_OUTS = (1, 4)
"""Of these exchanges."""
OFF_MAX = 0.06
"""How far a measured rate, mean over the seeds, may lie from the theory's, relatively."""
DRIFT_MAX = 1.5
"""How far mixing may move the mean, in standard deviations of a mean of n."""


def judge(results: Sequence[SeedResult]) -> Verdict:
    """The product's pull contracts as theory says, as fast as the research exchange that it is."""
    found = Results(results)
    table: list[tuple[str, ...]] = [
        ("nodes", "exchange", "models sent", "rho", "theory", "rho per model", "mean moves")
    ]
    worst, drift = 0.0, 0.0
    sizes = sorted({_read(variant)[0] for variant in found.variants})
    for members in sizes:
        for variant in found.variants:
            size, s, pace = _read(variant)
            if size != members:
                continue
            theory = (staggered_rho if pace == "staggered" else lockstep_rho)(members, s)
            measured = float(np.mean(found.values(variant, "contraction") or [np.nan]))
            moved = float(np.mean(found.values(variant, "mean_drift") or [np.nan]))
            # Written so that a figure that is missing counts as far off.
            worst = max(worst, abs(measured / theory - 1)) if measured > 0 else np.inf
            drift = max(drift, moved) if moved >= 0 else np.inf
            table.append(
                (
                    str(members),
                    f"the product, s={s}, {pace}",
                    str(s),
                    found.spread(variant, "contraction"),
                    f"{theory:.3f}",
                    f"{measured ** (1 / s):.3f}",
                    f"{moved:.2f}",
                )
            )
        table += _research_rows(members)
    return Verdict(
        passed=bool(sizes) and worst <= OFF_MAX and drift <= DRIFT_MAX,
        table=tuple(table),
        sentence=(
            f"the product's pull contracts within {worst:.1%} of what theory says, in lockstep and staggered, and "
            f"moves the mean by {drift:.2f} standard deviations at most"
        ),
    )


def lockstep_rho(members: int, s: int) -> float:
    """Contraction per round when all pull at the same moments."""
    from netsim.research.rates import pull

    return pull(members, s).rho


def staggered_rho(members: int, s: int, rounds: int = ROUNDS) -> float:
    """Contraction per round when members mix one after the other, in the same order each round.

    Exact for the expected square of the deviation: the second moments E[x x^T] of the members' values, uncorrelated
    at first, are followed through each mix of one with a random s of the others.
    """
    moments = np.eye(members)
    each, both = s / (members - 1), s * (s - 1) / ((members - 1) * max(1, members - 2))

    def deviation() -> float:
        return float(np.trace(moments) - moments.sum() / members)

    first = deviation()
    for _ in range(rounds):
        for member in range(members):
            own = moments[member, member]
            with_others = moments[member].sum() - own
            squares = np.trace(moments) - own
            products = moments.sum() - own - 2 * with_others - squares
            row = (moments[member] + each * (moments.sum(axis=0) - moments[member])) / (s + 1)
            square = (own + 2 * each * with_others + each * squares + both * products) / (s + 1) ** 2
            moments[member] = moments[:, member] = row
            moments[member, member] = square
    return float((deviation() / first) ** (1 / (2 * rounds)))


def _research_rows(members: int) -> list[tuple[str, ...]]:
    """The exchanges of the literature over the same simulated network, a frame of each."""
    from netsim.research import rates

    schemes = [rates.one_peer_exponential(members), rates.matching(members)]
    for s in FAN_OUTS:
        schemes += [rates.oracle(members, s), rates.local(members, s), rates.pull(members, s)]
    rows: list[tuple[str, ...]] = []
    for scheme in schemes:
        rate = rates.measure(scheme, members, rounds=RESEARCH_ROUNDS, seeds=RESEARCH_SEEDS)
        exact = f"exact after {rate.exact_after}" if rate.exact_after else ""
        rows.append(
            (
                str(members),
                rate.scheme,
                f"{rate.models_sent:.3g}",
                exact or f"{rate.rho:.3f}",
                "exact" if exact else f"{rate.rho_theory:.3f}",
                "-" if exact else f"{rate.rho ** (1 / rate.models_sent):.3f}",
                f"{rate.drift:.2f}" if rate.drift > 1e-9 else "no",
            )
        )
    return rows


def _read(variant: str) -> tuple[int, int, str]:
    match = NAME.fullmatch(variant)
    assert match is not None, f"{variant} is no variant of this experiment"
    return int(match[1]), int(match[2]), match[3]
