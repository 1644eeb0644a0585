"""Learning from one byte per probe: as good as from floats, the same bits at every node, and nothing else touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from netsim.labelled_data import digits
from training.byte_code import decode, encode
from training.directions import direction_words, signs_of
from training.one_byte import OneByteLearner, RecordRun
from training.run_spec import RunSpec, parse_run_spec
from training.tasks import build_task

RUN = bytes(32)
MACHINES, PROBES, ROUNDS = 4, 4, 600

DIGITS = """
name = "one-byte-digits"
init = "shared"
[model]
kind = "mlp"
inputs = 64
hidden = []
classes = 10
[data]
source = "npz"
[train]
batch = 32
[one_byte]
"""


def digits_spec(**keys: object) -> RunSpec:
    keys = {"probes": PROBES, "step_size": 0.02 / 16, "clip": 4.0} | keys
    return parse_run_spec(DIGITS + "".join(f"{key} = {value}\n".lower() for key, value in keys.items()))


def learner(spec: RunSpec, machine: int) -> OneByteLearner:
    task = build_task(
        spec,
        digits(),
        part=(machine + 1, MACHINES),
        seed=bytes([machine]),
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    base = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
    return OneByteLearner(spec, task, run=RUN, base=base)


def log_of(machine: int) -> bytes:
    return bytes([machine]) * 16


def round_of(learners: Sequence[OneByteLearner], number: int) -> list[RecordRun]:
    return [
        RecordRun(
            log_of(machine), number * PROBES, number, one.probe(log_of(machine), number * PROBES).records
        )
        for machine, one in enumerate(learners)
    ]


@cache
def trained_by_bytes(table: str = "log", step_size: float = 0.02 / 16) -> tuple[float, bytes]:
    """Accuracy and state hash after all rounds; every machine applies each round in an order of its own."""
    spec = digits_spec(table=f'"{table}"', step_size=step_size)
    learners = [learner(spec, machine) for machine in range(MACHINES)]
    rng = random.Random(0)
    for number in range(ROUNDS):
        records = round_of(learners, number)
        for one in learners:
            one.apply(rng.sample(records, len(records)))
    assert len({one.state.digest() for one in learners}) == 1
    return learners[0].accuracy(), learners[0].state.digest()


@cache
def trained_by_floats() -> float:
    """The same directions and minibatches, but projected gradients, weights and steps in fp32."""
    spec = digits_spec()
    learners = [learner(spec, machine) for machine in range(MACHINES)]
    shared = learners[0]
    size = shared.state.grid.size
    for number in range(ROUNDS):
        step = torch.zeros(size)
        for machine, one in enumerate(learners):
            one._weights.copy_(shared._weights)
            slopes = float_slopes(one, machine, number)
            for place, slope in slopes.items():
                step += slope * direction_of(one, machine, place)
        shared._weights.sub_(step, alpha=0.02 / 16)
    return shared.accuracy()


def float_slopes(one: OneByteLearner, machine: int, number: int) -> dict[int, float]:
    inputs, targets = one.task.batch(number)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(one.task.model(inputs), targets)

    places = range(number * PROBES, (number + 1) * PROBES)
    return {place: one._prober.slope(loss, one._key(log_of(machine), place), 1e-3) for place in places}


def direction_of(one: OneByteLearner, machine: int, place: int) -> Tensor:
    words = direction_words([one._key(log_of(machine), place)], 0, one.state.grid.words, torch.device("cpu"))
    return signs_of(words)[0].float()


def test_a_byte_is_as_good_as_a_float() -> None:
    """The miniature of the method: 650 parameters, four machines with four records each in 600 rounds."""
    accuracy, _ = trained_by_bytes()
    assert accuracy > 0.9
    assert accuracy == pytest.approx(trained_by_floats(), abs=0.01)


def test_one_record_left_out_is_another_state() -> None:
    spec = digits_spec()
    one = learner(spec, 0)
    records = round_of([one], 0)[0]
    one.apply([records])
    less = learner(spec, 0)
    less.apply([RecordRun(records.log, 0, 0, records.records[:-1])])
    assert one.state.digest() != less.state.digest()


def test_what_is_taken_back_leaves_no_trace() -> None:
    spec = digits_spec()
    one = learner(spec, 0)
    before, weights = one.state.digest(), one._weights.clone()
    records = round_of([one], 0)
    one.apply(records)
    assert one.state.digest() != before
    one.apply([], gone=records)
    assert one.state.digest() == before
    assert torch.equal(one._weights, weights)


def test_probing_touches_neither_state_nor_weights() -> None:
    one = learner(digits_spec(), 0)
    before, weights = one.state.digest(), one._weights.clone()
    one.probe(log_of(0), 0)
    assert one.state.digest() == before
    assert torch.equal(one._weights, weights)
    assert all(
        torch.equal(parameter.data, view)
        for (_, parameter), view in zip(
            sorted(one.task.model.named_parameters()),
            one.state.grid.views(one._weights).values(),
            strict=True,
        )
    )


def test_signs_alone_teach_too() -> None:
    """The figure to expect is a little lower, at a smaller step."""
    accuracy, _ = trained_by_bytes("sign", 0.0005)
    assert accuracy > 0.85


def test_a_pool_makes_every_record_one_of_few_directions() -> None:
    spec = digits_spec(pool=8)
    one = learner(spec, 0)
    assert len({one._key(log_of(machine), number) for machine in range(3) for number in range(50)}) == 8
    records = [RecordRun(log_of(0), 0, 0, bytes(range(1, 101)))]
    one.apply(records)
    again = learner(spec, 0)
    for number in range(100):
        again.apply([RecordRun(log_of(0), number, 0, bytes([number + 1]))])
    assert one.state.digest() == again.state.digest()


def test_a_subset_is_trained_and_the_rest_stays() -> None:
    spec = digits_spec(trained='["*.bias"]')
    one = learner(spec, 0)
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    for number in range(5):
        one.apply(round_of([one], number))
    changed = {name for name, tensor in one.weights().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("bias")}
    assert {span.name for span in one.state.grid.spans} == changed


def test_no_parameter_of_such_a_name() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        learner(digits_spec(trained='["head.*"]'), 0)


def test_the_step_size_halves_at_the_clocks_of_the_spec() -> None:
    spec = digits_spec(halvings="[100, 200]")

    def moved(clock: int) -> Tensor:
        one = learner(spec, 0)
        before = one.state.values.clone()
        one.apply([RecordRun(log_of(0), 0, clock, b"\x7f")])
        return (one.state.values - before).abs()[one.state.values != before].double().mean()

    sizes = [moved(clock) for clock in (0, 99, 100, 199, 200)]
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]
    assert (sizes[2] / sizes[0]).item() == pytest.approx(0.5, rel=1e-4)
    assert (sizes[4] / sizes[0]).item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda base: base.pop("blocks.0.bias"), "lacks blocks.0.bias"),
        (lambda base: base.update(more=torch.zeros(1)), "has a tensor more"),
        (lambda base: base.update({"blocks.0.bias": torch.zeros(11)}), "shape"),
        (lambda base: base.update({"blocks.0.bias": torch.zeros(10, dtype=torch.float16)}), "float16"),
        (lambda base: base.update({"blocks.0.bias": torch.full((10,), torch.inf)}), "not finite"),
    ],
)
def test_a_base_of_another_model_is_refused(spoil: Callable[[dict[str, Tensor]], object], said: str) -> None:
    one = learner(digits_spec(), 0)
    base = {name: tensor.clone() for name, tensor in one.weights().items()}
    spoil(base)
    with pytest.raises(ValueError, match=said):
        OneByteLearner(one.spec, one.task, run=RUN, base=base)


def test_encoding_is_within_the_promised_error() -> None:
    assert all(abs(decode(encode(slope, 4.0), 4.0) / slope - 1) < 0.022 for slope in (0.1, -0.5, 1.0, 3.999))
