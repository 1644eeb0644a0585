"""When a fifth of the nodes dies for good, the connections that go with it cost more than the data.

The criterion of ``paper/disruption`` (Palmieri, Boldrini, Valerio, Passarella, Conti, arXiv 2310.02986, and with
Kertesz, 2405.02377). Variants are called ``DATA GRAPH VICTIMS``. All nodes have as much data, so what ``hubs`` of a
Barabasi-Albert graph cost more than ``random`` victims in a graph that stays whole is the cost of connections.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from netsim.experiments.verdict import Results, Verdict, spread
from netsim.results import SeedResult

HUB_GRAPH = "barabasi-albert"
WHOLE = ("k-regular", "full")
"""Graphs that a fifth of the nodes at random does not take apart."""
MORE_THAN = 2.0
"""Losing connections must cost so many times what losing data costs."""
COST_MIN = 0.01
"""Less is noise: of 180 examples and the mean over many nodes."""
ROBUST = 0.7
"""The share of the undisturbed accuracy that survivors keep even then: the network stays relatively robust."""


def judge(results: Sequence[SeedResult]) -> Verdict:
    """Hubs that die cost much, a random fifth of a graph that stays whole next to nothing."""
    found = Results(results)
    table: list[tuple[str, ...]] = [("data", "graph", "who dies", "accuracy of the survivors", "cost")]
    costs: dict[str, list[float]] = {}
    for variant in found.variants:
        setting, victims = variant.rsplit(" ", 1)
        before, after = (found.by_seed(name, "local_accuracy") for name in (f"{setting} none", variant))
        costs[variant] = [before[seed] - after[seed] for seed in after if seed in before]
        cost = "" if victims == "none" else spread(costs[variant], "+.3f")
        table.append((*setting.split(" "), victims, found.spread(variant, "local_accuracy"), cost))
    kinds = list(dict.fromkeys(variant.split(" ")[0] for variant in found.variants))
    parts = [_part(found, costs, kind) for kind in kinds]
    return Verdict(
        passed=bool(parts) and all(passed for passed, _ in parts),
        table=tuple(table),
        sentence="accuracy that a fifth of the nodes costs: " + "; ".join(text for _, text in parts),
    )


def _part(found: Results, costs: Mapping[str, Sequence[float]], kind: str) -> tuple[bool, str]:
    """Whether one kind of data shows it, and in which figures."""
    data = max(_mean(costs.get(f"{kind} {graph} random", ())) for graph in WHOLE)
    hubs = f"{kind} {HUB_GRAPH} hubs"
    cost = _mean(costs.get(hubs, ()))
    kept = found.median(hubs, "local_accuracy") / found.median(f"{kind} {HUB_GRAPH} none", "local_accuracy")
    passed = (
        cost - max(0.0, data) >= max(COST_MIN, MORE_THAN * data)
        and cost > _mean(costs.get(f"{kind} {HUB_GRAPH} random", ()))
        and kept >= ROBUST
    )
    text = (
        f"of {kind} data {data:+.3f} at most where the graph stays whole, {cost:+.3f} where they are the hubs of a "
        f"Barabasi-Albert graph, whose survivors keep {kept:.0%}"
    )
    return passed, text


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
