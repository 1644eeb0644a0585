"""Measured mixing rates beside the closed forms, and both beside published figures."""

from __future__ import annotations

import random

import pytest

from netsim.research import rates
from netsim.topology import draw_topology


# The digits are those of published tables: variance ratios among 96 members.
@pytest.mark.parametrize(
    ("s", "local", "pull", "oracle"),
    [(1, 0.625, 0.492, 0.494), (2, 0.424, 0.323, 0.327), (4, 0.235, 0.190, 0.192), (7, 0.132, 0.115, 0.116)],
)
def test_closed_forms_give_the_published_ratios(s: int, local: float, pull: float, oracle: float) -> None:
    assert rates.local(96, s).rho ** 2 == pytest.approx(local, abs=3e-3)
    assert rates.pull(96, s).rho ** 2 == pytest.approx(pull, abs=2e-3)
    assert rates.oracle(96, s).rho ** 2 == pytest.approx(oracle, abs=2e-3)


@pytest.mark.parametrize("s", [1, 3])
def test_random_exchanges_contract_as_their_closed_forms_say(s: int) -> None:
    for scheme in (rates.local(32, s), rates.pull(32, s), rates.oracle(32, s)):
        rate = rates.measure(scheme, 32, rounds=8, seeds=3)
        assert rate.rho == pytest.approx(scheme.rho, rel=0.05), scheme.name
        assert rate.exact_after is None


@pytest.mark.parametrize(
    ("text", "rho_16", "rho_64"),
    [("ring", 0.949, 0.997), ("torus", 0.600, 0.883), ("exponential", 0.600, 0.714)],
)
@pytest.mark.parametrize("members", [16, 64])
def test_fixed_graphs_contract_by_their_second_eigenvalue(
    text: str, members: int, rho_16: float, rho_64: float
) -> None:
    scheme = rates.on_graph(draw_topology(text, members, random.Random(1)))
    rate = rates.measure(scheme, members, rounds=3, seeds=2)
    assert rate.rho == pytest.approx(scheme.rho, abs=1e-9)
    assert rate.rho == pytest.approx(rho_16 if members == 16 else rho_64, abs=6e-4)


def test_a_fixed_graph_slows_down_with_the_rounds() -> None:
    topology = draw_topology("k-regular:4", 32, random.Random(1))
    few, many = (rates.on_graph_from_anywhere(topology, rounds) for rounds in (2, 12))
    assert few.rho < many.rho < 1 - topology.spectral_gap("metropolis")
    for scheme, rounds in ((few, 2), (many, 12)):
        assert rates.measure(scheme, 32, rounds=rounds, seeds=1).rho == pytest.approx(scheme.rho, rel=0.05)


def test_one_peer_exponential_is_reported_as_exact_for_powers_of_two_only() -> None:
    assert rates.measure(rates.one_peer_exponential(16), 16, rounds=5, seeds=1).exact_after == 4
    other = rates.one_peer_exponential(12)
    rate = rates.measure(other, 12, rounds=8, seeds=1)
    assert rate.exact_after is None
    assert 0 < rate.rho < 1
