"""The comparison of one-byte mode with MeZO in fp32: end to end on a model that learns next to nothing, and judged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import one_byte_learning
from benchmarks.one_byte_learning import SMALL, measure
from benchmarks.one_byte_outcome import Outcome, draw
from benchmarks.one_byte_runs import Course, Method, Trial, normals

START = 3.0


def test_a_small_comparison_from_the_base_to_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: a gossip swarm trains the base, bytes and floats lower the loss of a text that the base never saw."""
    rows = measure(SMALL, tmp_path)
    assert [row.trial for row in rows] == list(SMALL.trials())
    for row in rows:
        assert row.course.losses[0] == pytest.approx(rows[0].course.losses[0], abs=1e-5)
        assert row.course.steps[-1] == row.trial.steps
        assert bool(row.course.state) == (row.trial.method == "bytes")
    assert len({row.course.state for row in rows if row.course.state}) == 2 * len(rows) // 3
    outcome = Outcome.of((row.trial, row.course) for row in rows)
    for arm in (outcome.of_bytes, outcome.of_floats, outcome.swarm):
        assert min(arm.drops) > 0, arm.name
    assert outcome.of_bytes.drops == pytest.approx(outcome.of_floats.drops, rel=0.9)
    assert len(outcome.table()) == 1 + 3 * len(SMALL.step_sizes)
    draw(outcome, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    # Killed within its last line, it has only that one to do again.
    file = tmp_path / "rows.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    again: list[Trial] = []

    def noted(_: object, trial: Trial) -> Course:
        again.append(trial)
        return rows[-1].course

    monkeypatch.setattr(one_byte_learning, "run_trial", noted)
    assert [row.course for row in measure(SMALL, tmp_path)] == [row.course for row in rows]
    assert again == [rows[-1].trial]
    measure(SMALL, tmp_path)
    assert len(again) == 1


def test_every_seed_has_directions_of_its_own() -> None:
    """Once they had not, and five seeds agreed with each other far better than chance would have it."""
    trials = [trial for trial in SMALL.trials() if trial.method == "floats"]
    drawn = {(trial.seed, tuple(torch.randn(4, generator=normals(trial)).tolist())) for trial in trials}
    assert len(drawn) == len({first for _, first in drawn}) == len(SMALL.seeds)


# --- verdicts -----------------------------------------------------------------------------------------------------


def arm(method: Method, nodes: int, step_size: float, ends: list[float]) -> list[tuple[Trial, Course]]:
    """Straight lines from START to ``ends``, one for each seed, over 100 steps of one node or 30 of several."""
    steps = 100 if nodes == 1 else 30
    return [
        (
            Trial(method=method, nodes=nodes, step_size=step_size, seed=seed, steps=steps, every=steps // 2),
            Course(steps=[0, steps // 2, steps], losses=[START, (START + end) / 2, end]),
        )
        for seed, end in enumerate(ends)
    ]


FLOATS = arm("floats", 1, 1e-4, [2.0, 2.1, 1.9])
BYTES = arm("bytes", 1, 1e-4, [2.0, 2.1, 1.9])
SWARM = arm("bytes", 4, 1e-4, [2.0, 2.0, 2.0])


def test_equal_courses_are_as_good_and_ratios_are_of_steps_to_the_goal() -> None:
    outcome = Outcome.of([*FLOATS, *BYTES, *SWARM])
    assert outcome.goal == pytest.approx(2.1)
    assert outcome.one.steps_to(outcome.goal) == pytest.approx([90, 100, 90 / 1.1])
    assert outcome.swarm.steps_to(outcome.goal) == pytest.approx([27, 27, 27])
    assert outcome.ratio == pytest.approx(27 / ((90 + 100 + 90 / 1.1) / 3))
    assert outcome.as_good
    assert outcome.as_fast


@pytest.mark.parametrize(
    ("behind", "as_good"),
    [
        ([0.09, 0.09, 0.09], True),  # less than a tenth of the drop of 1.0
        ([0.11, 0.11, 0.11], False),
        ([0.4, 0.2, -0.1], True),  # less than two standard errors
        ([-0.5, -0.5, -0.5], True),  # and better is good, too
    ],
)
def test_bytes_may_be_so_far_behind(behind: list[float], as_good: bool) -> None:
    ends = [course.losses[-1] + more for (_, course), more in zip(FLOATS, behind, strict=True)]
    outcome = Outcome.of([*FLOATS, *arm("bytes", 1, 1e-4, ends), *SWARM])
    assert outcome.behind == pytest.approx(behind)
    assert outcome.as_good == as_good


def test_each_is_taken_at_its_best_step_size() -> None:
    worse = [2.5, 2.5, 2.5]
    rows = [*FLOATS, *arm("floats", 1, 2e-4, worse), *arm("bytes", 1, 5e-5, worse), *BYTES]
    outcome = Outcome.of([*rows, *SWARM, *arm("bytes", 4, 2e-4, [1.0, 1.0, 1.0])])
    assert outcome.of_floats.step_size == outcome.of_bytes.step_size == outcome.one.step_size == 1e-4
    assert outcome.swarm.step_size == 2e-4


def test_a_swarm_that_never_comes_to_the_goal_is_not_fast_and_a_node_that_never_does_took_all_its_steps() -> (
    None
):
    outcome = Outcome.of(
        [*FLOATS, *arm("bytes", 1, 1e-4, [2.0, 2.3, 1.7]), *arm("bytes", 4, 1e-4, [2.0, 2.0, 2.5])]
    )
    assert outcome.one.steps_to(outcome.goal)[1] == 100
    assert outcome.ratio == math.inf
    assert not outcome.as_fast
    assert "Not shown" in outcome.sentences()[1]
    assert "2 of 3 seeds" in outcome.table()[-1]
