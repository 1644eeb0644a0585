"""What a seed decides follows from it and the name of what is drawn, and from nothing else."""

import math
from collections.abc import Sequence
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netsim import draw
from netsim.registry import parse_scenario, with_changes
from netsim.scenario import Fault, Partition, Scenario

FAULTS = """
[[fault]]
kind = "kill"
at_s = [100, 200]
for_s = [5, 10]
count = 2
[[fault]]
kind = "slow"
at_s = 50
times = [2, 4]
[[fault]]
kind = "partition"
at_s = [20, 700]
"""
KINDS = sorted(draw.RANDOM_FAULTS)


def scenario(toml: str = "", **changes: object) -> Scenario:
    """A small one with ``toml`` at its end and some keys changed."""
    text = f'name = "drawn"\nnodes = 6\nduration_s = 1000\n[run]\nname = "drawn"\n{toml}'
    return with_changes(
        parse_scenario(text), {key.replace("__", "."): value for key, value in changes.items()}
    )


def home_lines(**changes: object) -> Scenario:
    """Machines and ways that differ in everything."""
    ranges = {
        "network__latency_s": [0.01, 0.3],
        "network__up_bytes_per_s": [1e5, 1e7],
        "network__down_bytes_per_s": [1e6, 1e8],
        "network__undiallable": 0.5,
        "machines__slowness": [1.0, 10.0],
        "machines__disk_s": [0.001, 0.1],
    }
    return scenario(**(ranges | changes))


def random_faults(**changes: object) -> Scenario:
    """Every kind of them."""
    return scenario(**({"random_faults__kinds": KINDS} | changes))


# --- machines and ways ----------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32), number=st.integers(0, 1023))
@settings(max_examples=50)
def test_what_a_machine_is_lies_within_the_ranges(seed: int, number: int) -> None:
    found = draw.hardware(home_lines(), seed, number)
    assert found == draw.hardware(home_lines(), seed, number)
    assert 1.0 <= found.slowness <= 10.0
    assert 1e5 <= found.up_bytes_per_s <= 1e7
    assert 1e6 <= found.down_bytes_per_s <= 1e8
    assert 0.001 <= found.disk_s <= 0.1
    assert not (found.undiallable and number == 0)


def test_machines_differ_and_so_do_seeds() -> None:
    drawn = {draw.hardware(home_lines(), seed, number) for seed in range(10) for number in range(10)}
    assert len(drawn) == 100
    assert 20 < sum(found.undiallable for found in drawn) < 70


def test_what_is_drawn_on_a_logarithmic_scale_is_as_often_below_the_geometric_mean_as_above() -> None:
    below = sum(draw.hardware(home_lines(), 1, number).slowness < math.sqrt(10) for number in range(1000))
    assert 450 < below < 550


def test_no_limit_is_no_limit() -> None:
    found = draw.hardware(scenario(), 1, 1)
    assert found == draw.Hardware(1.0, math.inf, math.inf, 0.0, undiallable=False)


def test_more_machines_change_nothing_about_the_first_ones() -> None:
    few, many = home_lines(), home_lines(nodes=200)
    for number in range(6):
        assert draw.hardware(few, 3, number) == draw.hardware(many, 3, number)
        assert draw.link(few, 3, number, 5) == draw.link(many, 3, number, 5)


def test_a_way_is_as_long_in_both_directions() -> None:
    drawn = {draw.link(home_lines(), 1, near, far).latency_s for near in range(8) for far in range(near)}
    assert len(drawn) == 28
    assert all(0.01 <= latency_s <= 0.3 for latency_s in drawn)
    assert draw.link(home_lines(), 1, 2, 5) == draw.link(home_lines(), 1, 5, 2)
    assert draw.link(home_lines(), 2, 2, 5) != draw.link(home_lines(), 1, 5, 2)


def test_regions_follow_the_matrix() -> None:
    regions = scenario(network__latency_matrix_s=[[0.001, 0.1], [0.2, 0.002]], network__jitter_s=0.5)
    ways = [draw.link(regions, 1, *way).latency_s for way in ((0, 2), (0, 1), (3, 4), (5, 7))]
    assert ways == [0.001, 0.1, 0.2, 0.002]
    assert draw.link(regions, 1, 0, 1).jitter_s == 0.5


# --- what goes wrong ----------------------------------------------------------------------


def test_a_fault_strikes_within_its_ranges() -> None:
    times = set()
    for seed in range(30):
        strikes = {strike.name: strike for strike in draw.plan(scenario(FAULTS), seed).strikes}
        kill, slow = strikes["fault/0"], strikes["fault/1"]
        assert 100 <= kill.at_s <= 200
        assert 5 <= kill.for_s <= 10
        assert (slow.at_s, slow.for_s) == (50, 0)
        times.add(kill.at_s)
    assert len(times) == 30


def test_strikes_come_in_the_order_of_their_times() -> None:
    for seed in range(10):
        times = [strike.at_s for strike in draw.plan(random_faults(), seed).strikes]
        assert times == sorted(times)


def test_one_more_fault_changes_nothing_about_the_others() -> None:
    """Nor about the generators, which decide whom they strike."""
    join = '[[fault]]\nkind = "join"\nat_s = 1\n'
    for seed in range(5):
        few = draw.plan(scenario(FAULTS), seed).strikes
        many = draw.plan(scenario(FAULTS + join, random_faults__kinds=KINDS), seed).strikes
        assert set(map(repr, few)) < set(map(repr, many))


def test_each_kind_of_random_faults_is_drawn_by_itself() -> None:
    for seed in range(20):
        everything = draw.plan(random_faults(), seed)
        for kind in KINDS:
            alone = draw.plan(random_faults(random_faults__kinds=[kind]), seed)
            assert list(alone.strikes) == of_kind(everything, kind)
            assert alone.rates.get(kind) == everything.rates.get(kind)


def of_kind(plan: draw.Plan, kind: str) -> list[draw.Strike]:
    """The random strikes of one kind."""
    return [strike for strike in plan.strikes if strike.name.startswith(f"{kind}/")]


def test_about_half_of_the_kinds_are_on() -> None:
    on = [len(draw.plan(random_faults(), seed).rates) for seed in range(100)]
    assert 0.4 < sum(on) / (100 * len(KINDS)) < 0.6
    assert len(set(on)) > 4
    assert draw.plan(random_faults(random_faults__on=0), 1).strikes == ()
    assert sorted(draw.plan(random_faults(random_faults__on=1), 1).rates) == KINDS


def test_random_faults_strike_as_often_and_last_as_long_as_the_scenario_says() -> None:
    often = random_faults(random_faults__on=1, random_faults__per_hour=60, random_faults__for_s=[1, 100])
    plans = [draw.plan(often, seed) for seed in range(20)]
    strikes = [strike for plan in plans for strike in plan.strikes]
    expected = 20 * len(KINDS) * 60 * 1000 / 3600
    assert 0.9 * expected < len(strikes) < 1.1 * expected
    assert all(1 <= strike.for_s <= 100 for strike in strikes)
    assert 0.45 < sum(strike.for_s < 10 for strike in strikes) / len(strikes) < 0.55


def test_nothing_strikes_at_random_in_the_liveness_phase() -> None:
    calm = random_faults(random_faults__on=1, random_faults__per_hour=600, liveness__last_s=400)
    plan = draw.plan(calm, 1)
    assert plan.calm_at_s == 600
    assert max(strike.at_s for strike in plan.strikes) < 600


def test_random_faults_are_such_as_a_scenario_could_name() -> None:
    """Each is of its kind, within the bounds of the schema, and they differ in what can be drawn."""
    kinds = {str(fault.__struct_config__.tag): fault for fault in get_args(Fault)}
    for kind, make in draw.RANDOM_FAULTS.items():
        drawn = [make(draw.generator(1, kind, number)) for number in range(50)]
        for fault in drawn:
            assert type(fault) is kinds[kind]
            assert msgspec.convert(msgspec.to_builtins(fault), type(fault)) == fault
        assert len(set(map(repr, drawn))) > 1 or kind == "bit-flip"


def test_random_partitions_are_of_all_sorts() -> None:
    drawn = [draw.RANDOM_FAULTS["partition"](draw.generator(1, number)) for number in range(100)]
    cuts = [fault for fault in drawn if isinstance(fault, Partition)]
    assert {fault.parts for fault in cuts} == {2, 3, 4}
    assert {fault.one_way for fault in cuts} == {True, False}
    assert {fault.flaps for fault in cuts} == {1, 3, 10}
    assert 0 in {fault.count for fault in cuts}


def test_churn_is_drawn_once_per_seed() -> None:
    rates = [draw.plan(scenario(churn__per_hour=[0.5, 2.0]), seed).churn_per_hour for seed in range(20)]
    assert len(set(rates)) == 20
    assert all(0.5 <= rate <= 2.0 for rate in rates)


@pytest.mark.parametrize(
    ("machines", "share", "size"), [(range(10), 0.7, 7), (range(8), 0.7, 6), ([3], 0.1, 1)]
)
def test_the_core_is_a_share_of_the_machines_rounded_up(
    machines: Sequence[int], share: float, size: int
) -> None:
    cores = {draw.core(scenario(liveness__core=share), seed, list(machines)) for seed in range(20)}
    assert {len(core) for core in cores} == {size}
    assert all(set(core) <= set(machines) and list(core) == sorted(core) for core in cores)
    assert len(cores) > 1 or size == len(list(machines))


def test_people_are_told_what_was_drawn() -> None:
    plan = draw.plan(random_faults(liveness__last_s=100, churn__per_hour=0.5), 1)
    told = plan.told()
    assert told["strikes"] == len(plan.strikes)
    assert told["calm_at_s"] == 900
    assert told["churn_per_hour"] == 0.5
    assert set(told["faults"]) == set(plan.rates)
