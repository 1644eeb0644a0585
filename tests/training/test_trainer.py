"""A trainer learns, resumes bit for bit, keeps non-finite values out, and refuses checkpoints that are not its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import msgspec
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from training.learner import Learner
from training.merge_math import weights_hash
from training.run_spec import RunSpec
from training.spec_sections import AdamWSpec, MlpSpec
from training.tasks import TaskError
from training.trainer import CheckpointError, DeviceError, Trainer, resolve_device

MakeTrainer = Callable[..., Trainer]

TOKENS = {"gpt": 4 * 16, "mlp": 16}
CLASSES = {"gpt": 256, "mlp": 4}


@pytest.fixture(params=["gpt", "mlp"])
def kind(request: pytest.FixtureRequest) -> str:
    """What most of these tests hold for: a GPT on text under AdamW, and an MLP on labels under SGD."""
    return str(request.param)


@pytest.fixture
def spec(kind: str, spec: RunSpec, labelled_spec: RunSpec) -> RunSpec:
    return spec if kind == "gpt" else labelled_spec


def test_a_trainer_is_a_learner(trainer: Trainer) -> None:
    learner: Learner = trainer
    assert {name for name in vars(Learner) if not name.startswith("_")} <= set(dir(learner))


def loss_on(trainer: Trainer, step: int) -> float:
    """Of the live weights, on the minibatch of ``step``."""
    inputs, targets = trainer.task.batch(step)
    with torch.no_grad():
        return F.cross_entropy(trainer.task.model(inputs).flatten(0, -2), targets.flatten()).item()


def test_the_loss_falls_and_counters_count(trainer: Trainer, kind: str) -> None:
    before = trainer.evaluate()
    batch_losses = [loss_on(trainer, 0)]
    once = trainer.run_slice(1)
    batch_losses.append(loss_on(trainer, 1))
    again = trainer.run_slice(1)
    first = trainer.run_slice(2)
    trainer.run_slice(36)
    assert before == pytest.approx(math.log(CLASSES[kind]), abs={"gpt": 0.1, "mlp": 0.7}[kind])
    assert [once.loss, again.loss] == pytest.approx(batch_losses, rel=1e-5)
    assert trainer.evaluate() < before - 1
    assert (trainer.step, trainer.tokens) == (40, 40 * TOKENS[kind])
    assert (first.steps, first.tokens) == (2, 2 * TOKENS[kind])


def test_accuracy_is_the_share_of_held_out_targets_that_are_found_likeliest(
    trainer: Trainer, kind: str
) -> None:
    initial = trainer.read()
    before = trainer.accuracy()
    trainer.run_slice(40)
    after = trainer.accuracy()
    assert before < 0.5
    assert after > {"gpt": 0.1, "mlp": 0.9}[kind]
    assert trainer.accuracy(initial) == before
    # With equal logits the first class is always the likeliest.
    nothing_learned = trainer.accuracy(torch.zeros(trainer.layout.total))
    assert nothing_learned == pytest.approx({"gpt": 0, "mlp": 0.25}[kind], abs=0.1)


def test_slices_of_any_length_make_the_same_run(spec: RunSpec, make_trainer: MakeTrainer) -> None:
    whole, sliced = make_trainer(spec), make_trainer(spec)
    whole.run_slice(12)
    for steps in (1, 4, 7):
        sliced.run_slice(steps)
    assert weights_hash(whole.read()) == weights_hash(sliced.read())


def test_a_loaded_checkpoint_goes_on_bit_for_bit(spec: RunSpec, make_trainer: MakeTrainer) -> None:
    uninterrupted, stopped = make_trainer(spec), make_trainer(spec)
    uninterrupted.run_slice(20)
    stopped.run_slice(9)
    data = stopped.save()
    resumed = make_trainer(spec)
    resumed.load(data)
    assert (resumed.step, resumed.tokens) == (9, stopped.tokens)
    resumed.run_slice(11)
    assert weights_hash(resumed.read()) == weights_hash(uninterrupted.read())
    assert resumed.evaluate() == uninterrupted.evaluate()


def test_peers_start_differently_unless_the_run_shares_its_initial_weights(
    spec: RunSpec, make_trainer: MakeTrainer
) -> None:
    shared = msgspec.structs.replace(spec, init="shared")
    own = [weights_hash(make_trainer(spec, peer).read()) for peer in ("peer-a", "peer-b")]
    same = [weights_hash(make_trainer(shared, peer).read()) for peer in ("peer-a", "peer-b")]
    assert own[0] != own[1]
    assert same[0] == same[1]


def test_a_fragment_is_read_and_changed_alone(trainer: Trainer) -> None:
    before = trainer.read()
    delta = torch.full((trainer.layout.fragment_size(1),), 0.25)
    trainer.add(1, delta)
    assert torch.equal(trainer.read(0), trainer.layout.cut(before, 0))
    assert torch.equal(trainer.read(1), trainer.layout.cut(before, 1) + delta)
    trainer.add(None, before - trainer.read())
    trainer.write(before)
    assert torch.equal(trainer.read(), before)


def test_what_is_read_is_a_copy_and_what_is_written_is_what_the_model_uses(
    trainer: Trainer, kind: str
) -> None:
    trainer.read().zero_()
    assert trainer.read().any()
    trainer.write(torch.zeros(trainer.layout.total))
    assert trainer.evaluate() == pytest.approx(math.log(CLASSES[kind]), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_callers_cannot_bring_non_finite_or_misshapen_values_in(trainer: Trainer, value: float) -> None:
    before = trainer.read()
    bad = torch.zeros_like(before)
    bad[3] = value
    for attempt in (
        lambda: trainer.write(bad),
        lambda: trainer.add(None, bad),
        lambda: trainer.write(bad[:-1]),
    ):
        with pytest.raises(ValueError, match=r"finite|shape"):
            attempt()
    assert torch.equal(trainer.read(), before)


def test_a_gradient_that_is_not_finite_leaves_the_weights_finite(trainer: Trainer) -> None:
    trainer.run_slice(2)
    trainer.write(torch.full((trainer.layout.total,), 1e30))
    trainer.run_slice(1)
    assert bool(torch.isfinite(trainer.read()).all())


def test_given_weights_are_evaluated_without_touching_the_live_ones(trainer: Trainer) -> None:
    initial = trainer.read()
    loss = trainer.evaluate()
    trainer.run_slice(20)
    live = trainer.read()
    assert trainer.evaluate(initial) == loss
    assert trainer.evaluate(live) == trainer.evaluate() < loss
    assert torch.equal(trainer.read(), live)
    assert trainer.evaluate(bytes_max=64) != trainer.evaluate()


def test_samples_have_the_length_asked_for_and_repeat(trainer: Trainer, kind: str) -> None:
    trainer.run_slice(5)
    weights, task = trainer.layout.views(trainer.read()), trainer.task
    if kind == "mlp":
        with pytest.raises(TaskError, match="writes no text"):
            task.sample(weights, b"file", 40, 0.8)
        return
    text = task.sample(weights, b"file", 40, 0.8)
    assert len(text) == 40
    assert task.sample(weights, b"file", 40, 0.8) == text
    assert len(task.sample(trainer.layout.views(torch.zeros(trainer.layout.total)), b"", 3, 0.0)) == 3


@pytest.mark.parametrize("name", ["cuda:99", "cpu:1", "tpu", "cuda:x", "", "cpu:"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    assert "cpu" in caught.value.why


def test_cpu_and_auto_are_always_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_a_checkpoint_of_another_run_or_model_is_refused(
    spec: RunSpec, make_trainer: MakeTrainer, trainer: Trainer
) -> None:
    data = trainer.save()
    change = {"hidden": (17,)} if isinstance(spec.model, MlpSpec) else {"width": 32}
    wider = msgspec.structs.replace(spec, model=msgspec.structs.replace(spec.model, **change))
    for other in (wider, msgspec.structs.replace(spec, seed=1)):
        with pytest.raises(CheckpointError, match="another run"):
            make_trainer(other).load(data)


Damage = Callable[[dict[str, torch.Tensor], dict[str, str]], object]


def state_of(tensors: dict[str, torch.Tensor]) -> str:
    """The name of one of the optimizer's vectors."""
    return next(name for name in sorted(tensors) if name != "weights")


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, _: tensors["weights"].__setitem__(0, math.nan),
        lambda tensors, _: tensors[state_of(tensors)].__setitem__(5, math.inf),
        lambda tensors, _: tensors.pop(state_of(tensors)),
        lambda tensors, _: tensors.update(momentum_of_another=tensors.pop(state_of(tensors))),
        lambda tensors, _: tensors.update(extra=torch.zeros(1)),
        lambda tensors, _: tensors.update(weights=tensors["weights"][:-1].clone()),
        lambda tensors, _: tensors.update(weights=tensors["weights"].double()),
        lambda _, metadata: metadata.update(step="-1"),
        lambda _, metadata: metadata.update(step="many"),
        lambda _, metadata: metadata.update(step=str(2**80)),
        lambda _, metadata: metadata.update(format="1"),
        lambda _, metadata: metadata.pop("tokens"),
    ],
)
def test_a_checkpoint_with_one_thing_wrong_is_refused_whole(trainer: Trainer, damage: Damage) -> None:
    trainer.run_slice(3)
    data = trainer.save()
    tensors = load(data)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    damage(tensors, metadata)
    trainer.run_slice(1)
    before, step = weights_hash(trainer.read()), trainer.step
    with pytest.raises(CheckpointError):
        trainer.load(save(tensors, metadata=metadata))
    assert (weights_hash(trainer.read()), trainer.step) == (before, step)


def test_a_mean_of_squares_that_is_negative_is_refused(spec: RunSpec, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(msgspec.structs.replace(spec, optimizer=AdamWSpec()))
    tensors = load(data := trainer.save())
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors["adam_square"][5] = -1.0
    with pytest.raises(CheckpointError, match="negative"):
        trainer.load(save(tensors, metadata=metadata))


def test_damaged_checkpoint_bytes_are_refused(trainer: Trainer) -> None:
    data = trainer.save()
    header = 8 + int.from_bytes(data[:8], "little")
    damaged = [b"", b"\0" * 8, b"\xff" * 64, data[:-1], data + b"\0", data[: header // 2]]
    damaged += [data[:position] + b"\xff" + data[position + 1 :] for position in range(0, header, 5)]
    for case in damaged:
        with pytest.raises(CheckpointError):
            trainer.load(case)


def test_a_rate_can_be_kept_constant_and_the_gradient_is_clipped(
    labelled_spec: RunSpec, make_trainer: MakeTrainer
) -> None:
    """One step of plain gradient descent is as long as the rate times the clipped norm says."""
    plain = {"momentum": 0.0, "weight_decay": 0.0, "min_rate_fraction": 1.0, "clip_norm": 1e-3}
    optimizer = msgspec.structs.replace(labelled_spec.optimizer, **plain)
    trainer = make_trainer(msgspec.structs.replace(labelled_spec, optimizer=optimizer))
    for _ in range(3):
        before = trainer.read()
        trainer.run_slice(1)
        assert (trainer.read() - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)
