"""A schedule is one table: what its rows and its presets mean at each point of a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.run_spec import RunSpec, SpecError, parse_run_spec
from training.schedules import Schedule, check_fan_out
from training.spec_sections import ExchangeSpec, PhaseSpec, SchedulePreset, ScheduleSpec, TrainSpec


def schedule_of(preset: SchedulePreset, steps: int = 2000, every_steps: int = 10) -> Schedule:
    return Schedule.of(
        RunSpec(
            name="x",
            train=TrainSpec(steps=steps),
            schedule=ScheduleSpec(preset=preset),
            exchange=ExchangeSpec(every_steps=every_steps),
        )
    )


@given(
    ends=st.sets(st.floats(0.001, 0.999), max_size=6),
    merges=st.lists(st.integers(0, 40), min_size=7, max_size=7),
)
def test_merges_are_even_within_a_phase_and_the_last_one_is_at_its_end(
    ends: set[float], merges: list[int]
) -> None:
    bounds = [*sorted(ends), 1.0]
    phases = tuple(PhaseSpec(until=end, merges=count) for end, count in zip(bounds, merges, strict=False))
    spec = RunSpec(name="x", schedule=ScheduleSpec(preset="custom", phases=phases))
    points = list(Schedule.of(spec).merge_points)
    assert len(points) == sum(phase.merges for phase in phases)
    begins = 0.0
    for phase in phases:
        within, points = points[: phase.merges], points[phase.merges :]
        if within:
            assert within[-1] == phase.until
            gaps = [after - before for before, after in pairwise([begins, *within])]
            assert gaps == pytest.approx([(phase.until - begins) / phase.merges] * len(gaps), abs=2e-9)
        begins = phase.until


def test_a_row_holds_until_its_end() -> None:
    spec = parse_run_spec("""
    name = "x"
    [schedule]
    preset = "custom"
    phases = [{ until = 0.5, probability = 0.1 }, { until = 1.0, peers = 3, merges = 2 }]
    """)
    schedule = Schedule.of(spec)
    assert [schedule.at(progress).probability for progress in (0.0, 0.49, 0.5, 1.0)] == [0.1, 0.1, 1.0, 1.0]
    assert schedule.peers_max == 3
    assert schedule.merge_points == (0.75, 1.0)


def test_presets_are_what_they_are_called() -> None:
    assert schedule_of("constant").merge_points == (1.0,)
    assert schedule_of("constant").exchanges
    assert schedule_of("final-only").merge_points == (1.0,)
    assert not schedule_of("final-only").exchanges
    assert schedule_of("every").merge_points == tuple(round(number / 200, 9) for number in range(1, 201))
    assert not schedule_of("every").exchanges
    late, window = schedule_of("late-heavy"), schedule_of("window")
    assert [late.at(progress).probability for progress in (0.0, 0.89, 0.9)] == [0.2, 0.2, 1.0]
    assert [window.at(progress).probability for progress in (0.44, 0.45, 0.56)] == [0.2, 1.0, 0.2]
    early = schedule_of("early-dense")
    assert sum(point <= 0.5 for point in early.merge_points) == 100
    assert sum(point > 0.5 for point in early.merge_points) == 20
    assert not early.exchanges


def test_a_fan_out_above_the_swarm_is_refused_with_what_would_do() -> None:
    phases = (PhaseSpec(until=1.0, peers=4, merges=1),)
    spec = RunSpec(name="x", schedule=ScheduleSpec(preset="custom", phases=phases))
    check_fan_out(spec, 5)
    with pytest.raises(
        SpecError, match="pulls from 4 members at once, and in a swarm of 4 there are 3"
    ) as caught:
        check_fan_out(spec, 4)
    assert "peers = 3" in caught.value.fix
    assert "at least 5 nodes" in caught.value.fix
    check_fan_out(RunSpec(name="x"), 1)


@pytest.mark.parametrize("preset", ["constant", "early-dense", "late-heavy", "window", "final-only", "every"])
@pytest.mark.parametrize(("steps", "every_steps"), [(1, 1), (3, 100), (100_000, 1)])
def test_every_run_ends_with_a_merge(preset: SchedulePreset, steps: int, every_steps: int) -> None:
    schedule = schedule_of(preset, steps, every_steps)
    assert schedule.merge_points[-1] == 1.0
    assert list(schedule.merge_points) == sorted(set(schedule.merge_points))
