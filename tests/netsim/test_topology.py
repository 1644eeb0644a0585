"""Graphs by name: the shapes they must have, the spectra that are known, and the errors for those that cannot be."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netsim.topology import Topology, TopologyError, Weights, draw_topology


def draw(text: str, members: int, seed: int = 1) -> Topology:
    return draw_topology(text, members, random.Random(seed))


def degrees(topology: Topology) -> set[int]:
    return {len(topology.neighbours(index)) for index in range(topology.members)}


@pytest.mark.parametrize(
    ("text", "degree"),
    [("full", 15), ("ring", 2), ("torus", 4), ("k-regular:3", 3), ("k-regular:12", 12), ("k-out:3", 3)],
)
def test_degrees_are_as_named(text: str, degree: int) -> None:
    assert degrees(draw(text, 16)) == {degree}


def test_hops_of_the_exponential_graphs_are_powers_of_two() -> None:
    static, one_peer = draw("exponential", 12), draw("one-peer-exponential", 12)
    assert static.neighbours(0) == one_peer.neighbours(0) == (1, 2, 4, 8)
    assert static.neighbours(10) == (0, 2, 6, 11)
    assert [one_peer.at(number).neighbours(10) for number in range(5)] == [(11,), (0,), (2,), (6,), (11,)]
    assert static.at(3) == static


def test_a_barabasi_albert_graph_has_hubs_and_an_erdos_renyi_graph_the_density_of_its_probability() -> None:
    hubs = draw("barabasi-albert:2", 100)
    assert sum(len(hubs.neighbours(index)) for index in range(100)) == 2 * 2 * (100 - 2)
    assert max(degrees(hubs)) >= 12
    for text, chance in (("erdos-renyi", 2 * math.log(100) / 100), ("erdos-renyi:0.3", 0.3)):
        edges = sum(len(draw(text, 100).neighbours(index)) for index in range(100)) / 2
        assert edges == pytest.approx(chance * 100 * 99 / 2, rel=0.15)


def test_a_torus_is_as_square_as_possible() -> None:
    torus = draw("torus", 12)  # 3 rows of 4
    assert torus.neighbours(0) == (1, 3, 4, 8)
    assert torus.neighbours(5) == (1, 4, 6, 9)


# lambda_2 of these graphs is known in closed form; the digits are those of published tables.
@pytest.mark.parametrize(
    ("text", "members", "gap"),
    [
        ("ring", 16, 2 / 3 * (1 - math.cos(2 * math.pi / 16))),
        ("ring", 64, 2 / 3 * (1 - math.cos(2 * math.pi / 64))),
        ("ring", 256, 2 / 3 * (1 - math.cos(2 * math.pi / 256))),
        ("torus", 16, 0.4),
        ("torus", 64, 2 / 5 * (1 - math.cos(2 * math.pi / 8))),
        ("torus", 256, 2 / 5 * (1 - math.cos(2 * math.pi / 16))),
        ("exponential", 16, 2 / 5),
        ("exponential", 64, 2 / 7),
        ("exponential", 256, 2 / 9),
        ("full", 16, 1),
    ],
)
@pytest.mark.parametrize("weights", ["metropolis", "uniform"])
def test_spectral_gaps_of_graphs_without_chance(
    text: str, members: int, gap: float, weights: Weights
) -> None:
    assert draw(text, members).spectral_gap(weights) == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "members", "gap"),
    [
        ("k-regular:4", 64, 0.136),
        ("k-regular:6", 64, 0.28),
        ("k-regular:8", 64, 0.37),
        ("barabasi-albert:2", 64, 0.054),
        ("erdos-renyi", 64, 0.14),
    ],
)
def test_spectral_gaps_of_random_graphs_lie_around_those_measured(
    text: str, members: int, gap: float
) -> None:
    gaps = [draw(text, members, seed).spectral_gap("metropolis") for seed in range(5)]
    assert min(gaps) * 0.8 < gap < max(gaps) * 1.2


def test_one_period_of_the_one_peer_graph_averages_exactly_for_powers_of_two_only() -> None:
    for members, exact in ((16, True), (64, True), (12, False)):
        product = draw("one-peer-exponential", members).mixing_matrix("uniform")
        assert (np.abs(product - 1 / members).max() < 1e-12) == exact
    one_round_early = np.eye(16)
    for number in range(3):
        one_round_early = (
            draw("one-peer-exponential", 16).at(number).mixing_matrix("uniform") @ one_round_early
        )
    assert np.abs(one_round_early - 1 / 16).max() > 1e-3


def test_metropolis_preserves_the_mean_where_uniform_weights_do_not() -> None:
    hubs = draw("barabasi-albert:2", 30)
    for weights, preserved in (("metropolis", True), ("uniform", False)):
        matrix = hubs.mixing_matrix(weights)
        assert matrix.min() >= 0
        assert np.allclose(matrix.sum(axis=1), 1, atol=1e-12)
        assert np.allclose(matrix.sum(axis=0), 1, atol=1e-12) == preserved


CONNECTED = (
    "full",
    "ring",
    "exponential",
    "one-peer-exponential",
    "k-regular:4",
    "k-out:3",
    "barabasi-albert:2",
    "erdos-renyi",
)


@given(
    st.sampled_from(CONNECTED),
    st.integers(min_value=5, max_value=40),
    st.integers(),
)
def test_every_graph_is_connected_loopless_and_repeatable(text: str, members: int, seed: int) -> None:
    topology = draw(text, members, seed)
    assert topology == draw(text, members, seed)
    graph = nx.DiGraph([(index, other) for index in range(members) for other in topology.neighbours(index)])
    assert sorted(graph) == list(range(members))
    assert nx.is_strongly_connected(graph)
    assert not any(index in topology.neighbours(index) for index in range(members))
    if text not in ("exponential", "one-peer-exponential", "k-out:3"):
        assert all(graph.has_edge(other, index) for index, other in graph.edges)


def test_dense_random_graphs_come_at_once() -> None:
    assert degrees(draw("k-regular:60", 64)) == {60}
    assert degrees(draw("k-regular:63", 64)) == {63}


def test_two_members_are_a_graph() -> None:
    for text in ("full", "ring", "k-regular:1", "exponential", "one-peer-exponential", "barabasi-albert:1"):
        assert draw(text, 2).neighbours(1) == (0,), text


@pytest.mark.parametrize(
    ("text", "members", "says"),
    [
        ("rign", 8, "no topology 'rign'"),
        ("", 8, "no topology ''"),
        ("ring", 1, "'ring' over 1 members"),
        ("ring:2", 8, "takes no number"),
        ("ring:", 8, "takes no number"),
        ("torus", 13, "'torus' over 13 members"),
        ("torus", 4, "'torus' over 4 members"),
        ("k-regular", 8, "lacks a number"),
        ("k-regular:few", 8, "lacks a number"),
        ("k-regular:3", 9, "'k-regular:3' over 9 members"),
        ("k-regular:8", 8, "'k-regular:8' over 8 members"),
        ("k-regular:0", 8, "'k-regular:0' over 8 members"),
        ("k-regular:1", 8, "'k-regular:1' over 8 members"),
        ("k-out:8", 8, "'k-out:8' over 8 members"),
        ("barabasi-albert:8", 8, "'barabasi-albert:8' over 8 members"),
        ("erdos-renyi:1.5", 8, "has no probability"),
        ("erdos-renyi:nan", 8, "has no probability"),
        ("erdos-renyi:often", 8, "has no probability"),
        ("erdos-renyi:1e-9", 8, "'erdos-renyi:1e-9' over 8 members"),
    ],
)
def test_impossible_graphs_are_refused_in_words(text: str, members: int, says: str) -> None:
    with pytest.raises(TopologyError) as refused:
        draw(text, members)
    assert says in refused.value.what
    assert refused.value.why
    assert refused.value.fix


def test_the_nearest_possible_sizes_are_named() -> None:
    with pytest.raises(TopologyError) as refused:
        draw("torus", 13)
    assert refused.value.fix == "use 12 or 15 members"


def test_the_graph_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random; from netsim.topology import draw_topology as draw\n"
        "for text in ('k-regular:4', 'k-regular:28', 'k-out:2', 'barabasi-albert:2', 'erdos-renyi'):\n"
        "    print(draw(text, 32, random.Random(5)).phases)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
