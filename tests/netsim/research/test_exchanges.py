"""Each research exchange does over the simulated network what its paper says of it, lossless and lossy."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from typing import cast

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from netsim.determinism import SimClock
from netsim.research.epidemic import ELLocal, ELOracle
from netsim.research.lockstep import MemberFactory, Model, Outcome, Seat, lockstep, run_lockstep
from netsim.research.pairs import RandomMatching
from netsim.research.pulling import GraphGossip, RandomPull
from netsim.research.push_sum import PushSum
from netsim.topology import Weights, draw_topology
from p2p.errors import CallRefused
from p2p.transport import Transport


def start(members: int, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(members, 16))


def run(
    factory: MemberFactory, members: int = 16, *, rounds: int, seed: int = 1, loss: float = 0.0
) -> Outcome:
    return run_lockstep(factory, start(members, seed), rounds=rounds, seed=seed, loss=loss)


def gossip(text: str, members: int, weights: Weights = "metropolis") -> MemberFactory:
    return functools.partial(
        GraphGossip, topology=draw_topology(text, members, random.Random(1)), weights=weights
    )


def push_sum(members: int, *, keep: bool) -> MemberFactory:
    return functools.partial(PushSum, topology=draw_topology("k-out:3", members, random.Random(1)), keep=keep)


EXCHANGES: dict[str, MemberFactory] = {
    "graph": gossip("k-regular:3", 16),
    "pull": functools.partial(RandomPull, s=2),
    "matching": RandomMatching,
    "el-local": functools.partial(ELLocal, s=2),
    "el-oracle": functools.partial(ELOracle, s=3),
    "push-sum": push_sum(16, keep=False),
    "push-sum, kept": push_sum(16, keep=True),
}


# --- what each is for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "rounds"), [(16, 4), (64, 6)])
def test_one_peer_exponential_is_exact_after_log2_n_rounds_and_not_before(members: int, rounds: int) -> None:
    outcome = run(gossip("one-peer-exponential", members, "uniform"), members, rounds=rounds)
    assert outcome.error[rounds] < 1e-12
    assert outcome.error[rounds - 1] > 1e-3
    assert outcome.models_sent == 1


@pytest.mark.parametrize("text", ["ring", "torus", "exponential", "barabasi-albert:2"])
def test_gossip_on_a_graph_is_multiplication_by_its_matrix(text: str) -> None:
    topology = draw_topology(text, 16, random.Random(1))
    outcome = run(functools.partial(GraphGossip, topology=topology, weights="metropolis"), rounds=3)
    expected = np.linalg.matrix_power(topology.mixing_matrix("metropolis"), 3) @ start(16)
    assert np.abs(outcome.estimates[3] - expected).max() < 1e-12
    assert outcome.models_sent == sum(len(topology.neighbours(index)) for index in range(16)) / 16
    assert outcome.drift[3] < 1e-12


def test_random_pairs_contract_as_measured_elsewhere() -> None:
    rates = [run(RandomMatching, 64, rounds=12, seed=seed).rho for seed in range(3)]
    assert np.mean(rates) == pytest.approx(0.70, abs=0.02)


def test_pairs_and_the_oracle_preserve_the_mean_where_pushing_and_pulling_do_not() -> None:
    for name in ("matching", "el-oracle"):
        assert run(EXCHANGES[name], rounds=10).drift[-1] < 1e-12, name
    for name in ("el-local", "pull"):
        assert run(EXCHANGES[name], rounds=10).drift[-1] > 0.05, name


def test_an_odd_member_sits_out_and_nothing_is_lost_by_it() -> None:
    outcome = run(RandomMatching, 5, rounds=30)
    assert outcome.drift[-1] < 1e-12
    assert outcome.deviation[-1] < 1e-3
    assert outcome.models_sent == pytest.approx(4 / 5)


@pytest.mark.parametrize("s", [1, 4])
def test_fan_out_is_what_is_sent(s: int) -> None:
    for exchange in (RandomPull, ELLocal, ELOracle):
        assert run(functools.partial(exchange, s=s), rounds=2).models_sent == s


def test_a_pull_of_seven_among_ninety_six() -> None:
    outcome = run(functools.partial(RandomPull, s=7), 96, rounds=3)
    assert outcome.rho**2 == pytest.approx(0.115, abs=0.02)
    assert outcome.drift[-1] ** 2 / 96 < 0.003


# --- push-sum ---------------------------------------------------------------------------------------------------


def test_push_sum_is_exact_on_a_directed_graph_where_plain_averaging_is_not() -> None:
    exact = run(push_sum(16, keep=False), rounds=65)
    assert exact.error[-1] < 1e-12
    assert exact.models_sent == 3
    plain = run(gossip("k-out:3", 16, "uniform"), rounds=50)
    assert plain.deviation[-1] < 1e-9
    assert plain.error[-1] > 1e-2


def test_push_sum_over_lossy_links_is_exact_only_if_mass_is_kept_until_acknowledged() -> None:
    gone = run(push_sum(16, keep=False), rounds=80, loss=0.05)
    kept = run(push_sum(16, keep=True), rounds=80, loss=0.05)
    assert gone.lost > 100
    assert kept.lost > 100
    assert gone.deviation[-1] < 1e-9  # they agree, and on something else
    assert gone.error[-1] > 1e-2
    assert kept.error[-1] < 1e-12


# --- what is missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXCHANGES)
def test_who_hears_nothing_changes_nothing(name: str) -> None:
    outcome = run(EXCHANGES[name], rounds=2, loss=1.0)
    assert np.allclose(outcome.estimates[2], outcome.estimates[0], rtol=1e-15, atol=0)
    assert outcome.lost > 0


@pytest.mark.parametrize("name", EXCHANGES)
def test_equal_values_stay_equal_whatever_is_lost(name: str) -> None:
    same = np.full((16, 4), 3.0)
    outcome = run_lockstep(EXCHANGES[name], same, rounds=8, seed=1, loss=0.3)
    assert outcome.lost > 0
    assert np.allclose(outcome.estimates, 3.0, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["graph", "pull", "matching", "el-local", "el-oracle"])
def test_losses_slow_averaging_down_and_do_not_stop_it(name: str) -> None:
    clean, lossy = (run(EXCHANGES[name], rounds=8, loss=loss) for loss in (0.0, 0.3))
    assert clean.lost == 0
    assert clean.rho < lossy.rho < 0.95


async def test_what_belongs_to_another_round_is_refused() -> None:
    late = Model(round=3, values=start(1).tobytes())
    for exchange in (RandomMatching, functools.partial(ELLocal, s=1)):
        member = exchange(Seat(0, cast(Transport, None), {}, seed=1, loss=0.0), start(1)[0])
        member.begin(4)
        with pytest.raises(CallRefused, match="round 3"):
            await member.answer(1, late)


# --- determinism ------------------------------------------------------------------------------------------------


def test_a_run_follows_from_its_seed() -> None:
    for name, factory in EXCHANGES.items():
        first, second, other = (
            run_lockstep(factory, start(16), rounds=4, seed=s, loss=0.1) for s in (5, 5, 6)
        )
        assert first.estimates.tobytes() == second.estimates.tobytes(), name
        assert first.lost == second.lost, name
        assert first.estimates.tobytes() != other.estimates.tobytes(), name


def test_a_run_does_not_depend_on_the_hash_seed() -> None:
    program = """
import functools, hashlib, numpy
from netsim.research.epidemic import ELLocal
from netsim.research.lockstep import run_lockstep
start = numpy.random.default_rng(1).normal(size=(12, 8))
outcome = run_lockstep(functools.partial(ELLocal, s=3), start, rounds=5, seed=3, loss=0.1)
print(hashlib.sha256(outcome.estimates.tobytes()).hexdigest(), outcome.lost)
"""
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


def test_an_exchange_can_be_part_of_a_longer_simulation() -> None:
    async def main() -> Outcome:
        await trio.sleep(12.5)
        outcome = await lockstep(RandomMatching, start(8), rounds=3, seed=1)
        assert trio.current_time() == pytest.approx(15.5, abs=0.2)
        return outcome

    assert trio.run(main, clock=SimClock()).deviation[-1] < 0.6
