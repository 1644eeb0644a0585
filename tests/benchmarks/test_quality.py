"""The table of methods compares what it says: the same work, bytes where they are sent, and nothing twice."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import quality
from benchmarks.kept import KeptRows
from benchmarks.quality import DEFAULT, FROM_SCRATCH, TABLES, Method, by_default, rows, verdict
from benchmarks.quality_picture import draw
from benchmarks.quality_runs import (
    Outcome,
    Trial,
    alone,
    base_spec,
    data_parallel,
    digest,
    started_at,
    swarm,
    trainers,
)
from training.data import Corpus
from training.default_run import default_run
from training.run_spec import RunSpec
from training.spec_sections import GptSpec

TINY = GptSpec(layers=2, width=16, heads=2, context=16)
STEPS = 40


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("stdlib", None)


def tiny(changes: dict[str, object]) -> RunSpec:
    spec = base_spec(STEPS, 1, changes)
    return msgspec.structs.replace(
        spec, model=TINY, data=msgspec.structs.replace(spec.data, held_out_bytes=4096)
    )


def trial_of(name: str) -> Trial:
    changes = next(method.changes for method in FROM_SCRATCH if method.name == name)
    if changes.get("exchange", {}).get("fragments", 1) > TINY.layers:
        changes = changes | {"exchange": changes["exchange"] | {"fragments": TINY.layers}}
    return Trial(spec=tiny(changes), nodes=3)


@pytest.mark.parametrize(
    "method", [method for method in FROM_SCRATCH if method.how == "swarm"], ids=lambda m: m.name
)
def test_every_method_trains_a_swarm_to_its_end(corpus: Corpus, method: Method) -> None:
    outcome = swarm(trial_of(method.name), corpus, seed=1)
    assert 2.0 < outcome.loss < math.log(256)
    assert outcome.merges >= 1
    # In the busiest second one node sends no more than its line carries, and frames' headers are not counted.
    assert 0 < outcome.peak_bytes_per_s <= 20e6 / 8
    assert STEPS * 0.1 <= outcome.fast_s <= outcome.slow_s + 5


def test_a_swarm_that_only_merges_at_the_end_sends_each_piece_about_twice(corpus: Corpus) -> None:
    outcome = swarm(trial_of("final-only"), corpus, seed=1)
    one_way = 4 * TINY.parameters * 2 / 3
    assert 2 * one_way < outcome.bytes_per_node < 2 * one_way + 60_000


def test_the_same_trial_comes_to_the_same(corpus: Corpus) -> None:
    trial = trial_of(DEFAULT)
    assert swarm(trial, corpus, seed=1) == swarm(trial, corpus, seed=1)


def test_data_parallel_training_is_one_model_on_all_parts_at_once(corpus: Corpus) -> None:
    trial = Trial(spec=tiny({}), nodes=3)
    outcome, model = data_parallel(trial, corpus)
    assert model.step == STEPS
    assert outcome.bytes_per_node == STEPS * 8 * TINY.parameters * 2 / 3
    # One step by hand: the gradient of the mean is the mean of the gradients.
    nodes = trainers(trial, corpus)
    gradients = []
    for node in nodes:
        inputs, targets = node.task.batch(0)
        node._gradient.zero_()
        torch.nn.functional.cross_entropy(node._model(inputs).flatten(0, -2), targets.flatten()).backward()
        gradients.append(node._gradient.clone())
    _, once = data_parallel(trial, corpus, until=1)
    mean = torch.stack(gradients).mean(0)
    mean *= min(1.0, trial.spec.optimizer.clip_norm / mean.norm().item())
    torch.testing.assert_close(once._gradient, mean, rtol=1e-4, atol=1e-6)


def test_local_training_sends_nothing_and_is_worse_than_together(corpus: Corpus) -> None:
    outcome = alone(Trial(spec=tiny({}), nodes=3), corpus)
    assert outcome.bytes_per_node == 0
    assert 2.0 < outcome.loss < math.log(256)


def test_a_swarm_can_begin_where_data_parallel_training_has_come(corpus: Corpus) -> None:
    trial = msgspec.structs.replace(trial_of(DEFAULT), start_step=20)
    _, model = data_parallel(trial, corpus, until=20)
    state = started_at(trial, corpus, model)
    node = trainers(trial, corpus)[1]
    node.load(state)
    assert node.step == 20
    for name, tensor in model.layout.views(model.read()).items():
        assert torch.equal(node.layout.views(node.read())[name], tensor)
    outcome = swarm(trial, corpus, seed=1, start=state)
    assert outcome.slow_s >= 20 * 0.1
    assert outcome.loss < model.evaluate() - 0.5
    assert outcome.loss < data_parallel(trial, corpus)[0].loss


def test_what_is_done_is_kept_and_not_done_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = next(table for table in TABLES if table.name == "common-start")
    asked: list[int] = []

    def train(trial: Trial, *_: object, **__: object) -> Outcome:
        asked.append(trial.start_step)
        return some(2.0, 100e6)

    monkeypatch.setattr(quality, "trained", train)
    file = tmp_path / "quality" / "outcomes.jsonl"
    for _ in range(2):
        kept = KeptRows(file, quality.Done)
        exact, chosen = (
            quality.measured(table, method, corpus, seed=1, kept=kept) for method in table.methods
        )
        # Data-parallel training has all of its steps behind it and is compared in the second half.
        assert (exact.loss, exact.bytes_per_node) == (2.0, 50e6)
        assert chosen.bytes_per_node == 100e6
    assert asked == [0, 1000]


def test_a_kept_outcome_is_of_one_spec_and_one_code() -> None:
    trial = trial_of(DEFAULT)
    digests = {
        digest(trial, "swarm"),
        digest(trial, "alone"),
        digest(msgspec.structs.replace(trial, nodes=4), "swarm"),
        digest(msgspec.structs.replace(trial, start_step=1), "swarm"),
        digest(trial_of("DiLoCo, H = 50"), "swarm"),
    }
    assert len(digests) == 5
    assert digest(trial, "swarm") in digests


def some(loss: float, sent: float) -> Outcome:
    return Outcome(
        loss=loss,
        bytes_per_node=sent,
        peak_bytes_per_s=1e6,
        slow_s=10.0,
        fast_s=5.0,
        merges=3,
        local_loss=3.0,
    )


def test_the_table_compares_with_data_parallel_training(tmp_path: Path) -> None:
    methods = [Method("data-parallel"), Method("ours")]
    outcomes = {"data-parallel": [some(2.0, 100e6)] * 2, "ours": [some(2.1, 1e6), some(2.3, 1e6)]}
    head, first, second = rows(methods, outcomes)
    assert first[:6] == ["data-parallel", "2.0000 ± 0.0000", "+0.0", "3.0000", "100.0", "1 ×"]
    assert second[:6] == ["ours", "2.2000 ± 0.1000", "+10.0", "3.0000", "1.0", "100 ×"]
    assert len(head) == len(second)
    draw(outcomes, tmp_path / "new" / "table.png", baseline="data-parallel", default="ours")
    assert (tmp_path / "new" / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("loss", "sent", "met"), [(2.1, 1e6, True), (2.1, 2e6, False), (2.2, 1e6, False), (1.9, 1e6, True)]
)
def test_the_default_is_held_to_its_bar(loss: float, sent: float, met: bool) -> None:
    table = next(table for table in TABLES if table.name == "four-nodes")
    told, sentence = verdict(table, {"data-parallel": [some(2.0, 100e6)], DEFAULT: [some(loss, sent)]})
    assert told is met
    assert sentence.startswith("**Shown:**" if met else "**Not shown:**")


def test_what_is_called_the_default_is_what_new_runs_get() -> None:
    chosen = default_run("chosen")
    spec = base_spec(STEPS, 1, by_default())
    assert (spec.schedule, spec.exchange, spec.outer) == (chosen.schedule, chosen.exchange, chosen.outer)
    assert (spec.optimizer, spec.init) == (chosen.optimizer, chosen.init)
