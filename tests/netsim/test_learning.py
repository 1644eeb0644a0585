"""Accuracies, layer variances and contraction are what they are called."""

from __future__ import annotations

import math
import statistics

import pytest

from netsim.registry import parse_scenario, with_changes
from netsim.results import Event, Sample, SeedResult
from netsim.runner import run_seed
from netsim.scenario import Scenario

DIGITS = parse_scenario("""
name = "digits"
nodes = 4
duration_s = 30
sample_every_s = 1
[run]
name = "digits"
[run.model]
kind = "mlp"
inputs = 64
hidden = [32, 32]
classes = 10
activation = "tanh"
[run.data]
source = "npz"
[run.optimizer]
kind = "sgd"
min_rate_fraction = 1.0
[run.train]
steps = 150
batch = 32
[run.exchange]
every_steps = 5
[run.schedule]
preset = "custom"
phases = [{ until = 1.0, probability = 0.0, merges = 1 }]
[run.merge]
wait_s_max = 5.0
[network]
latency_s = 0.001
[learner]
kind = "torch"
dataset = "digits"
""")

STILL = parse_scenario("""
name = "still"
nodes = 8
duration_s = 50
[run]
name = "still"
[run.exchange]
every_steps = 50
rule = "mean"
[run.schedule]
preset = "custom"
phases = [{ until = 1.0 }]
[network]
latency_s = 0.001
[learner]
noise = 0.0
heterogeneity = 0.0
learning_rate = 1e-12
""")


def simulated(scenario: Scenario, seed: int = 0) -> tuple[SeedResult, list[Sample], list[Event]]:
    lines: list[Sample | Event | SeedResult] = []
    result = run_seed(scenario, seed, emit=lines.append)
    assert result.verdict == "passed", result.failures
    samples = [line for line in lines if isinstance(line, Sample)]
    return result, samples, [line for line in lines if isinstance(line, Event)]


def test_local_accuracy_is_that_before_the_merge_and_merged_accuracy_foretells_what_it_brings() -> None:
    result, samples, events = simulated(DIGITS)
    assert [event.what for event in events].count("commit") == 1
    figures = result.summary
    before = [sample for sample in samples if sample.height == [0] * 4][-1]
    known = [accuracy for accuracy in before.accuracy if accuracy is not None]
    assert figures["local_accuracy"] == pytest.approx(sum(known) / 4, abs=0.05)
    # Networks that began apart and never mixed lose by a merge; the product merges them all the same.
    assert figures["merged_accuracy"] < figures["local_accuracy"] - 0.1
    assert figures["merged_accuracy"] == pytest.approx(before.merged_accuracy, abs=0.05)
    assert figures["final_accuracy"] == pytest.approx(figures["merged_accuracy"], abs=0.02)
    assert samples[-1].accuracy == [figures["final_accuracy"]] * 4


def test_steps_to_80_are_those_of_the_first_sample_above() -> None:
    result, samples, _ = simulated(with_changes(DIGITS, {"run.init": "shared", "run.exchange.rule": "mean"}))
    first = next(
        sample for sample in samples if sample.accuracy and sum(a for a in sample.accuracy if a) / 4 >= 0.8
    )
    steps = [step for step in first.step if step is not None]
    assert result.summary["steps_to_80"] == sum(steps) / 4


def test_a_goal_that_is_not_reached_has_no_steps() -> None:
    result, _, _ = simulated(with_changes(DIGITS, {"run.optimizer.learning_rate": 1e-6}))
    assert math.isnan(result.summary["steps_to_80"])


def test_variance_of_layers_shrinks_to_a_share_of_one_node_when_different_models_are_averaged() -> None:
    still = {
        "run.optimizer.learning_rate": 1e-9,
        "run.exchange.rule": "mean",
        "run.schedule.phases": [{"until": 1.0}],
    }
    # Of four that mix at random some meet twice before others meet at all.
    plain = [
        simulated(with_changes(DIGITS, still), seed)[0].summary["variance_ratio_min"] for seed in range(5)
    ]
    assert statistics.median(plain) == pytest.approx(1 / 4, rel=0.4)
    corrected, _, _ = simulated(with_changes(DIGITS, still | {"run.exchange.rule": "variance_corrected"}))
    assert corrected.summary["variance_ratio_min"] == pytest.approx(1, abs=0.05)
    alone, samples, _ = simulated(
        with_changes(DIGITS, still | {"run.schedule.phases": [{"until": 1.0, "probability": 0.0}]})
    )
    assert alone.summary["variance_ratio_min"] == pytest.approx(1, abs=1e-6)
    assert samples[-1].variance_ratio == pytest.approx(1, abs=1e-6)


def test_contraction_is_the_deviation_per_mix() -> None:
    one, samples, _ = simulated(STILL)
    assert 0.5 < one.summary["contraction"] < 0.8
    mixes = one.summary["mixes_per_node"]
    first = next(sample.dispersion for sample in samples if sample.dispersion)
    # Dispersion is relative to the norm of a mean that moves a little.
    assert samples[-1].dispersion == pytest.approx(first * one.summary["contraction"] ** mixes, rel=0.5)
    four, _, _ = simulated(with_changes(STILL, {"run.schedule.phases": [{"until": 1.0, "peers": 4}]}))
    assert four.summary["contraction"] < 0.5
    assert 0 < four.summary["mean_drift"] < 2


def test_there_is_no_contraction_where_merges_draw_nodes_together() -> None:
    result, _, _ = simulated(with_changes(STILL, {"run.schedule.phases": [{"until": 1.0, "merges": 1}]}))
    assert "contraction" not in result.summary
    assert "local_accuracy" not in result.summary


def test_what_averaging_comes_to_is_told_before_the_merge_and_at_every_sample() -> None:
    apart, samples, _ = simulated(DIGITS)
    # Networks that never mixed: what each has learned the average has not.
    assert apart.summary["merged_minus_local"] > 0.5
    before = [sample for sample in samples if sample.height == [0] * 4][-1]
    assert before.merged_loss is not None
    assert samples[-1].merged_loss == pytest.approx(apart.summary["final_loss"], abs=1e-6)
    # In a bowl the average is never worse than the mean of those that go in.
    bowl, samples, _ = simulated(with_changes(STILL, {"learner.noise": 1.0, "learner.learning_rate": 0.01}))
    assert bowl.summary["merged_minus_local"] < 0
    for sample in samples[1:]:
        losses = [loss for loss in sample.loss if loss is not None]
        assert sample.merged_loss is not None
        assert sample.merged_loss <= sum(losses) / len(losses)
