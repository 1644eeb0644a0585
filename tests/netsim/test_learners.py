"""Machines get the data that a scenario deals out to them, and nobody is measured on anything but the common part."""

from __future__ import annotations

import sys
from typing import cast

import numpy as np
import pytest

from netsim import labelled_data
from netsim.compute import SimCompute
from netsim.disk import SimDisk
from netsim.learners import learners
from netsim.quadratic import Quadratic
from netsim.registry import ScenarioError, parse_scenario, with_changes
from netsim.scenario import Scenario
from netsim.signer import StubSigner, machine_peer, world_key
from netsim.world import Machine
from node.costs import Costs
from p2p.errors import GossamerError
from training.tasks import LabelledTask
from training.trainer import Trainer

DIGITS = parse_scenario("""
name = "digits"
nodes = 4
[run]
name = "digits"
[run.model]
kind = "mlp"
inputs = 64
hidden = [16]
classes = 10
[run.data]
source = "npz"
[learner]
kind = "torch"
dataset = "digits"
""")


def machine(number: int, seed: int = 0) -> Machine:
    identity = StubSigner(machine_peer(seed, number), world_key(seed))
    return Machine(number=number, identity=identity, disk=SimDisk(), compute=SimCompute(), costs=Costs())


def trainers(scenario: Scenario, count: int, seed: int = 0) -> list[Trainer]:
    build = learners(scenario, seed)
    return [cast(Trainer, build(machine(number, seed))) for number in range(count)]


def rows_seen(trainer: Trainer, batches: int = 100) -> set[bytes]:
    """The examples in its first batches."""
    task = cast(LabelledTask, trainer.task)
    return {row.tobytes() for number in range(batches) for row in np.asarray(task.batch(number)[0])}


def classes_seen(trainer: Trainer) -> set[int]:
    task = cast(LabelledTask, trainer.task)
    return {int(label) for number in range(100) for label in task.batch(number)[1]}


def test_machines_have_parts_of_their_own_and_one_held_out_set() -> None:
    four = trainers(DIGITS, 4)
    seen = [rows_seen(trainer) for trainer in four]
    assert all(not seen[left] & seen[right] for left in range(4) for right in range(left))
    assert len({trainer.task.held_out_digest for trainer in four}) == 1


def test_who_joins_later_shares_the_part_of_an_earlier_machine() -> None:
    five = trainers(DIGITS, 5)
    assert rows_seen(five[4]) & rows_seen(five[0])


def test_another_seed_deals_otherwise() -> None:
    (first,), (again,), (other,) = (trainers(DIGITS, 1, seed) for seed in (0, 0, 1))
    assert rows_seen(first) == rows_seen(again)
    assert len(rows_seen(first) & rows_seen(other)) < len(rows_seen(first)) / 2


def test_dirichlet_leaves_machines_with_few_classes() -> None:
    even = [len(classes_seen(trainer)) for trainer in trainers(DIGITS, 4)]
    uneven = [
        len(classes_seen(trainer))
        for trainer in trainers(with_changes(DIGITS, {"learner.dirichlet": 0.05}), 4)
    ]
    assert min(even) == 10
    assert sum(uneven) < 24


def test_resampled_data_is_that_of_everybody_seen_by_preference() -> None:
    scenario = with_changes(DIGITS, {"learner.dirichlet": 0.05, "learner.resampled": True})
    seen = [rows_seen(trainer) for trainer in trainers(scenario, 4)]
    assert any(seen[left] & seen[right] for left in range(4) for right in range(left))
    alike = with_changes(DIGITS, {"learner.resampled": True})
    first, second, *_ = (rows_seen(trainer) for trainer in trainers(alike, 4))
    assert len(first & second) > 0.2 * len(first)


def test_a_model_of_another_shape_is_refused_with_the_right_one() -> None:
    with pytest.raises(ScenarioError) as caught:
        learners(with_changes(DIGITS, {"run.model.inputs": 63}), 0)
    assert caught.value.fix == "--set run.model.inputs=64 --set run.model.classes=10"


def test_an_mlp_without_a_dataset_is_refused() -> None:
    with pytest.raises(ScenarioError) as caught:
        learners(with_changes(DIGITS, {"learner.dataset": ""}), 0)
    assert caught.value.fix == "--set learner.dataset=digits"


def test_a_dataset_without_an_mlp_is_refused() -> None:
    with pytest.raises(ScenarioError, match="model of kind mlp"):
        learners(with_changes(DIGITS, {"learner.kind": "quadratic"}), 0)


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    labelled_data.digits.cache_clear()
    with pytest.raises(GossamerError) as caught:
        learners(DIGITS, 0)
    assert "gossamer[research]" in caught.value.fix


def test_a_quadratic_descends_at_the_rate_that_is_asked_for() -> None:
    scenario = parse_scenario("""
name = "still"
[run]
name = "still"
[learner]
noise = 0.0
learning_rate = 1e-9
""")
    still = cast(Quadratic, learners(scenario, 0)(machine(0)))
    moving = cast(Quadratic, learners(with_changes(scenario, {"learner.learning_rate": 0.05}), 0)(machine(0)))
    before = still.read()
    for quadratic in (still, moving):
        quadratic.run_slice(100)
    assert (still.read() - before).norm() < 1e-5 * before.norm()
    assert (moving.read() - before).norm() > 0.1 * before.norm()
