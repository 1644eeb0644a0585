"""How fast each exchange brings members together: measured over the simulated network, beside what theory says.

Owns the choice of schemes and the closed forms. rho is the factor by which the norm of the deviation from the mean
shrinks per round; a variance ratio is its square.

Theory: for a fixed graph |lambda_2| of its matrix. For random exchanges the root of the expected variance ratio of one
round from values without structure; over many rounds the typical ratio lies a little below it. With f(k) =
(1 - k/(n - 1)) / (k + 1), the expectation of the square of the mean of a member and k of the n - 1 others:

* random s-regular graphs, and pairs with s = 1: f(s);
* pulls of s: f(s) less what the mean moves by, f(s) (1 - f(s)) / n, as rows are independent;
* pushes to s: f(K), K binomial. What the mean moves by is not taken off, so it lies up to 1/n above.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netsim.research.epidemic import ELLocal, ELOracle
from netsim.research.lockstep import MemberFactory, Outcome, run_lockstep
from netsim.research.pairs import RandomMatching
from netsim.research.pulling import GraphGossip, RandomPull
from netsim.research.push_sum import PushSum
from netsim.topology import Topology, draw_topology

DIMENSION = 16
"""Elements of each member's vector: enough for a round's luck with one of them not to matter."""

EXACT = 1e-12
"""A deviation below this is rounding."""

FAN_OUT_ROUNDS = 6

LOSS = 0.05
"""Of each message, where push-sum is shown on a lossy network."""

FIXED_GRAPHS = ("ring", "torus", "exponential", "k-regular:4", "barabasi-albert:2", "erdos-renyi")


@dataclass(frozen=True, slots=True)
class Scheme:
    """An exchange for some number of members."""

    name: str
    factory: MemberFactory
    rho: float
    """By theory; 0 where the average is exact after some rounds."""
    slowest_of: Topology | None = None
    """Start in the slowest mode of this graph, which shows at once what takes hold in the long run."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What was measured of a scheme, averaged over seeds."""

    scheme: str
    models_sent: float
    """Per member and round."""
    rho: float
    rho_theory: float
    exact_after: int | None
    """The round that left everybody equal, where theory has one; rho is rounding then."""
    drift: float
    """Of the mean, at the end, in standard deviations of a mean of n (``Outcome.drift``)."""


def mixing_rates(members: int, *, rounds: int = 20, seeds: int = 3) -> list[Rate]:
    """Every scheme among so many members, which must allow a torus and 4-regular graphs."""
    rng = random.Random(members)
    schemes = [on_graph(draw_topology(text, members, rng)) for text in FIXED_GRAPHS]
    schemes += [one_peer_exponential(members), matching(members)]
    for s in (1, 4):
        schemes += [oracle(members, s), local(members, s), pull(members, s)]
    return [measure(scheme, members, rounds=rounds, seeds=seeds) for scheme in schemes]


def fan_out_rates(
    members: int, fan_outs: Sequence[int], *, rounds: int = FAN_OUT_ROUNDS, seeds: int = 3
) -> dict[int, list[Rate]]:
    """For each s: EL-Local, random pull, EL-Oracle, and one s-regular graph for all rounds if s > 1.

    A graph that stays slows down with every round, so ``rounds`` matters there. s * members must be even.
    """
    table = {}
    for s in fan_outs:
        schemes = [local(members, s), pull(members, s), oracle(members, s)]
        if s > 1:
            topology = draw_topology(f"k-regular:{s}", members, random.Random(s))
            schemes.append(on_graph_from_anywhere(topology, rounds))
        table[s] = [measure(scheme, members, rounds=rounds, seeds=seeds) for scheme in schemes]
    return table


def curves(members: int, *, rounds: int, seed: int) -> dict[str, Outcome]:
    """One run of each kind of scheme from the same random values, for a figure."""
    rng = random.Random(seed)
    start = _random_start(members, seed)
    graphs = [draw_topology(text, members, rng) for text in ("ring", "torus", "exponential")]
    schemes = [on_graph(graph) for graph in graphs]
    schemes += [
        one_peer_exponential(members),
        matching(members),
        local(members, 1),
        pull(members, 1),
        pull(members, 4),
    ]
    outcomes = {
        scheme.name: run_lockstep(scheme.factory, start, rounds=rounds, seed=seed) for scheme in schemes
    }
    digraph = draw_topology("k-out:2", members, rng)
    for name, keep in (("lost mass is gone", False), ("kept until acknowledged", True)):
        factory = functools.partial(PushSum, topology=digraph, keep=keep)
        outcomes[f"push-sum, {LOSS:.0%} lost, {name}"] = run_lockstep(
            factory, start, rounds=rounds, seed=seed, loss=LOSS
        )
    return outcomes


def measure(scheme: Scheme, members: int, *, rounds: int, seeds: int) -> Rate:
    """Run ``scheme`` once for each of so many seeds; once in all where it starts in a slowest mode."""
    outcomes = [
        run_lockstep(
            scheme.factory,
            _slowest_start(scheme.slowest_of, seed) if scheme.slowest_of else _random_start(members, seed),
            rounds=rounds,
            seed=seed,
        )
        for seed in range(1 if scheme.slowest_of else seeds)
    ]
    exact_after = None
    if not scheme.rho:
        exact_after = max(int(np.argmax(outcome.deviation < EXACT)) for outcome in outcomes)
    return Rate(
        scheme=scheme.name,
        models_sent=float(np.mean([outcome.models_sent for outcome in outcomes])),
        rho=math.prod(outcome.rho for outcome in outcomes) ** (1 / len(outcomes)),
        rho_theory=scheme.rho,
        exact_after=exact_after,
        drift=float(np.sqrt(np.mean([outcome.drift[-1] ** 2 for outcome in outcomes]))),
    )


def on_graph(topology: Topology) -> Scheme:
    """Metropolis weights on a graph that stays; |lambda_2|."""
    factory = functools.partial(GraphGossip, topology=topology, weights="metropolis")
    return Scheme(topology.text, factory, 1 - topology.spectral_gap("metropolis"), topology)


def on_graph_from_anywhere(topology: Topology, rounds: int) -> Scheme:
    """The same from values without structure, where ``rounds`` rounds leave a variance of |W^r - J|_F^2 / (n - 1)."""
    matrix = np.linalg.matrix_power(topology.mixing_matrix("metropolis"), rounds)
    variance = np.square(matrix - 1 / len(matrix)).sum() / (len(matrix) - 1)
    factory = functools.partial(GraphGossip, topology=topology, weights="metropolis")
    return Scheme(f"fixed {topology.text}", factory, float(variance ** (1 / (2 * rounds))))


def one_peer_exponential(members: int) -> Scheme:
    """One-peer exponential averaging; exact for powers of two."""
    topology = draw_topology("one-peer-exponential", members, random.Random(0))
    exact = np.abs(topology.mixing_matrix("uniform") - 1 / members).max() < EXACT
    factory = functools.partial(GraphGossip, topology=topology, weights="uniform")
    return Scheme(topology.text, factory, 0.0 if exact else 1 - topology.spectral_gap("uniform"))


def matching(members: int) -> Scheme:
    """Random pairs; f(1)."""
    return Scheme("random matching", RandomMatching, math.sqrt(_mean_of(members, 1)))


def oracle(members: int, s: int) -> Scheme:
    """EL-Oracle; f(s)."""
    return Scheme(f"EL-Oracle s={s}", functools.partial(ELOracle, s=s), math.sqrt(_mean_of(members, s)))


def local(members: int, s: int) -> Scheme:
    """EL-Local; f(K)."""
    chance = s / (members - 1)
    variance = sum(
        math.comb(members - 1, k) * chance**k * (1 - chance) ** (members - 1 - k) * _mean_of(members, k)
        for k in range(members)
    )
    return Scheme(f"EL-Local s={s}", functools.partial(ELLocal, s=s), math.sqrt(variance))


def pull(members: int, s: int) -> Scheme:
    """Random pull; f(s) less what the mean moves by."""
    variance = _mean_of(members, s)
    variance -= variance * (1 - variance) / members
    return Scheme(f"random pull s={s}", functools.partial(RandomPull, s=s), math.sqrt(variance))


def _mean_of(members: int, k: int) -> float:
    """f(k) of the module's docstring."""
    return (1 - k / (members - 1)) / (k + 1)


def _random_start(members: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng([members, seed]).normal(size=(members, DIMENSION))


def _slowest_start(topology: Topology, seed: int) -> NDArray[np.float64]:
    """Each element along the eigenvector of |lambda_2|, with a length and a mean of its own."""
    values, vectors = np.linalg.eig(topology.mixing_matrix("metropolis"))
    mode = vectors[:, np.argsort(np.abs(values))[-2]].real
    lengths, means = np.random.default_rng([topology.members, seed]).normal(size=(2, DIMENSION))
    return np.asarray(np.outer(mode, lengths) + means)
