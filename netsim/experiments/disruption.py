"""When a fifth of the nodes dies for good, the connections that go with it cost more than the data.

The criterion of ``paper/disruption`` (Palmieri, Boldrini, Valerio, Passarella, Conti, arXiv 2310.02986, and with
Kertesz, 2405.02377). Variants are called ``GRAPH VICTIMS``. All parts of the data are alike, so who dies takes as much
of it whoever it is: what ``hubs`` of a Barabasi-Albert graph cost more than ``random`` victims of a graph that stays
whole is the cost of connections.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from netsim.experiments.verdict import Results, Verdict, spread
from netsim.results import SeedResult

HUB_GRAPH = "barabasi-albert"
WHOLE = ("k-regular", "full")
"""Graphs that a fifth of the nodes at random does not take apart."""
MORE_THAN = 2.0
"""Losing connections must cost so many times what losing data costs."""
COST_MIN = 0.01
"""Less is noise: of 180 examples and the mean over many nodes."""
STILL_GOOD = 0.8
"""The survivors' accuracy even then: the network stays relatively robust."""


def judge(results: Sequence[SeedResult]) -> Verdict:
    """Hubs that die cost much, a random fifth of a graph that stays whole next to nothing."""
    found = Results(results)
    table: list[tuple[str, ...]] = [("graph", "who dies", "accuracy of the survivors", "cost")]
    costs: dict[str, list[float]] = {}
    for variant in found.variants:
        graph, victims = variant.rsplit(" ", 1)
        before, after = (found.by_seed(name, "local_accuracy") for name in (f"{graph} none", variant))
        costs[variant] = [before[seed] - after[seed] for seed in after if seed in before]
        cost = "" if victims == "none" else spread(costs[variant], "+.3f")
        table.append((graph, victims, found.spread(variant, "local_accuracy"), cost))
    data = max((_mean(costs.get(f"{graph} random", [])) for graph in WHOLE), default=0.0)
    hubs = costs.get(f"{HUB_GRAPH} hubs", [])
    both = _mean(hubs)
    connections = both - max(0.0, data)
    left = found.values(f"{HUB_GRAPH} hubs", "local_accuracy")
    passed = (
        bool(left)
        and connections >= max(COST_MIN, MORE_THAN * data)
        and both > _mean(costs.get(f"{HUB_GRAPH} random", []))
        and min(left) >= STILL_GOOD
    )
    return Verdict(
        passed=passed,
        table=tuple(table),
        sentence=(
            f"a fifth of the nodes taking their data along costs {data:+.3f} of accuracy at most where the graph stays "
            f"whole, and {both:+.3f} where they are the hubs of a Barabasi-Albert graph: connections cost "
            f"{connections:+.3f}; the survivors still have {min(left, default=0.0):.3f} at the least"
        ),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
