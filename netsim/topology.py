"""Graphs imposed on a swarm: who may mix with whom, by name and seed.

Owns the names (``ring``, ``k-regular:4``, ...), what each demands of the number of members, and the matrices by which
mixing on a graph is judged. Never touches the network: a scenario's world asks ``neighbours``, a research exchange
``at``. Relies on networkx for random graphs. Every graph is connected; equal text, size and generator state give equal
graphs.

Directed graphs say who learns from whom: a member pulls from its ``neighbours``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2p.errors import GossamerError

DRAWS_MAX = 100
"""How often a random graph is drawn before it counts as impossible to connect."""

Graph: TypeAlias = tuple[tuple[int, ...], ...]
"""The neighbours of each member, in ascending order."""

Weights: TypeAlias = Literal["metropolis", "uniform"]
"""``metropolis``: 1/(1 + the larger degree of the two) for each neighbour, the rest for oneself. ``uniform``: 1/(1 +
one's own degree) for oneself and each neighbour."""


class TopologyError(GossamerError):
    """The text names no graph, or none that exists for so many members."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A graph over members 0..n-1, or one for each of several rounds that repeat."""

    text: str
    """As it was asked for: ``k-regular:4``."""
    phases: tuple[Graph, ...]
    """One for a graph that stays; otherwise phase r holds in rounds r, r + len(phases), ..."""

    @property
    def members(self) -> int:
        """n."""
        return len(self.phases[0])

    def neighbours(self, index: int) -> tuple[int, ...]:
        """The members that ``index`` may mix with, in any round."""
        return tuple(sorted({other for graph in self.phases for other in graph[index]}))

    def at(self, round_number: int) -> Topology:
        """The graph of one round."""
        return Topology(self.text, (self.phases[round_number % len(self.phases)],))

    def row(self, index: int, weights: Weights, round_number: int = 0) -> dict[int, float]:
        """The weight that ``index`` gives each neighbour in one round, and what is left for itself, last."""
        graph = self.phases[round_number % len(self.phases)]
        degree = len(graph[index])
        row = {
            other: 1 / (1 + (degree if weights == "uniform" else max(degree, len(graph[other]))))
            for other in graph[index]
        }
        row[index] = 1 - math.fsum(row.values())
        return row

    def mixing_matrix(self, weights: Weights) -> NDArray[np.float64]:
        """W of shape (n, n): ``x <- W x`` is one round on a graph that stays, all phases of one that does not.

        Rows sum to 1. Columns do too, and so the mean is preserved, where ``metropolis`` meets an undirected graph
        or either meets one in which all degrees, in and out, are equal.
        """
        product = np.eye(self.members)
        for number in range(len(self.phases)):
            matrix = np.zeros_like(product)
            for index in range(self.members):
                for other, weight in self.row(index, weights, number).items():
                    matrix[index, other] = weight
            product = matrix @ product
        return product

    def spectral_gap(self, weights: Weights) -> float:
        """1 - |lambda_2| of W; over several phases, of their geometric mean."""
        moduli = np.sort(np.abs(np.linalg.eigvals(self.mixing_matrix(weights))))
        return float(1.0 - moduli[-2] ** (1 / len(self.phases)))


def draw_topology(text: str, members: int, rng: random.Random) -> Topology:
    """The graph that ``text`` names, over ``members``; ``rng`` decides what is random about it.

    ``full``, ``ring``, ``torus`` (as square as possible), ``k-regular:K`` (random, undirected), ``k-out:K`` (directed:
    the next in a random ring and K - 1 others), ``exponential`` (directed: hops 1, 2, 4, ...), ``one-peer-exponential``
    (one of these hops per round), ``barabasi-albert:M`` (each newcomer brings M edges), ``erdos-renyi`` or
    ``erdos-renyi:P`` (P = 2 ln n / n unless given). Raises TopologyError.
    """
    kind, _, argument = text.partition(":")
    if (builder := _KINDS.get(kind)) is None:
        raise TopologyError(
            f"there is no topology {text!r}",
            why="a topology says who may mix with whom, so a misspelt one would change the result",
            fix="use one of " + ", ".join(_KINDS),
        )
    if members < 2:
        _impossible(text, members, "a graph needs somebody to talk to", "use at least 2 members")
    return Topology(text, builder(_Order(text, argument, members, rng)))


def random_regular_graph(degree: int, members: int, rng: random.Random) -> Any:
    """A networkx graph, not always connected, in which everyone has ``degree`` < ``members`` neighbours.

    ``degree`` times ``members`` must be even.
    """
    # networkx pairs stubs at random and starts again on a clash, which for dense graphs never ends.
    if degree > (members - 1) // 2:
        return nx.complement(nx.random_regular_graph(members - 1 - degree, members, seed=rng))
    return nx.random_regular_graph(degree, members, seed=rng)


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked for."""

    text: str
    argument: str
    members: int
    rng: random.Random

    def number(self, low: int, what: str) -> int:
        """The argument as a whole number in [``low``, members)."""
        try:
            value = int(self.argument)
        except ValueError:
            raise TopologyError(
                f"the topology {self.text!r} lacks a number",
                why=f"the number is {what}",
                fix=f"write for example {self.text.partition(':')[0]}:4",
            ) from None
        if not low <= value < self.members:
            _impossible(
                self.text,
                self.members,
                f"{what} must be at least {low} and less than the number of members",
                f"use a number from {low} to {self.members - 1}, or more members",
            )
        return value

    def none(self) -> None:
        """Check that there is no argument."""
        if ":" in self.text:
            kind = self.text.partition(":")[0]
            raise TopologyError(
                f"the topology {kind} takes no number", why="it follows from the size", fix=f"write {kind}"
            )

    def connected(self, draw: Callable[[], Any]) -> tuple[Graph]:
        """The first connected graph of a bounded number that ``draw`` makes."""
        for _ in range(DRAWS_MAX):
            graph = draw()
            if nx.is_connected(graph):
                return _phase(graph)
        _impossible(
            self.text,
            self.members,
            f"none of {DRAWS_MAX} drawn graphs was connected, and parts that never mix are separate swarms",
            "ask for more edges",
        )


def _full(order: _Order) -> tuple[Graph, ...]:
    order.none()
    return _phase(nx.complete_graph(order.members))


def _ring(order: _Order) -> tuple[Graph, ...]:
    order.none()
    return _phase(nx.cycle_graph(order.members))


def _torus(order: _Order) -> tuple[Graph, ...]:
    order.none()
    members = order.members
    if not (side := _torus_side(members)):
        possible = (size for size in range(9, 2 * members + 9) if _torus_side(size))
        near = sorted(possible, key=lambda size: abs(size - members))
        _impossible(
            order.text,
            members,
            "a torus has two sides of at least 3 members",
            f"use {near[0]} or {near[1]} members",
        )
    # Labels are (row, column) in row order: sorted, they are 0..n-1.
    grid = nx.grid_2d_graph(side, members // side, periodic=True)
    return _phase(nx.convert_node_labels_to_integers(grid, ordering="sorted"))


def _k_regular(order: _Order) -> tuple[Graph, ...]:
    degree = order.number(1, "the number of neighbours")
    if degree * order.members % 2:
        _impossible(
            order.text,
            order.members,
            "each edge has two ends, so members times neighbours is even",
            f"use {order.members + 1} members or an even number of neighbours",
        )
    return order.connected(lambda: random_regular_graph(degree, order.members, order.rng))


def _k_out(order: _Order) -> tuple[Graph, ...]:
    degree = order.number(1, "the number of neighbours")
    ring = order.rng.sample(range(order.members), order.members)
    graph: list[tuple[int, ...]] = [()] * order.members
    for place, index in enumerate(ring):
        following = ring[(place + 1) % len(ring)]
        others = [other for other in range(order.members) if other not in (index, following)]
        graph[index] = tuple(sorted([following, *order.rng.sample(others, degree - 1)]))
    return (tuple(graph),)


def _exponential(order: _Order) -> tuple[Graph, ...]:
    order.none()
    hops = _hops(order.members)
    return (
        tuple(tuple(sorted((index + hop) % order.members for hop in hops)) for index in range(order.members)),
    )


def _one_peer_exponential(order: _Order) -> tuple[Graph, ...]:
    order.none()
    return tuple(
        tuple(((index + hop) % order.members,) for index in range(order.members))
        for hop in _hops(order.members)
    )


def _barabasi_albert(order: _Order) -> tuple[Graph, ...]:
    edges = order.number(1, "the number of edges a newcomer brings")
    return order.connected(lambda: nx.barabasi_albert_graph(order.members, edges, seed=order.rng))


def _erdos_renyi(order: _Order) -> tuple[Graph, ...]:
    chance = 2 * math.log(order.members) / order.members
    if ":" in order.text:
        try:
            chance = float(order.argument)
        except ValueError:
            chance = math.nan
        if not 0 < chance <= 1:
            raise TopologyError(
                f"the topology {order.text!r} has no probability",
                why="the number is the chance of each edge, above 0 and at most 1",
                fix="write for example erdos-renyi:0.2, or erdos-renyi for 2 ln n / n",
            )
    return order.connected(lambda: nx.fast_gnp_random_graph(order.members, chance, seed=order.rng))


_KINDS: dict[str, Callable[[_Order], tuple[Graph, ...]]] = {
    "full": _full,
    "ring": _ring,
    "torus": _torus,
    "k-regular": _k_regular,
    "k-out": _k_out,
    "exponential": _exponential,
    "one-peer-exponential": _one_peer_exponential,
    "barabasi-albert": _barabasi_albert,
    "erdos-renyi": _erdos_renyi,
}


def _impossible(text: str, members: int, why: str, fix: str) -> NoReturn:
    raise TopologyError(f"there is no topology {text!r} over {members} members", why=why, fix=fix)


def _phase(graph: Any) -> tuple[Graph]:
    return (tuple(tuple(sorted(graph.adj[index])) for index in range(len(graph))),)


def _hops(members: int) -> list[int]:
    return [1 << power for power in range((members - 1).bit_length())]


def _torus_side(members: int) -> int:
    """The shorter side of the squarest torus, 0 if there is none."""
    return next((side for side in range(math.isqrt(members), 2, -1) if members % side == 0), 0)
