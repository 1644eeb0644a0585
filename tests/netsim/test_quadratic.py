"""The analytic learner: n steps at once are n steps, its optimum is the swarm's, and peers take it for a network."""

import math
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsim.quadratic import FRAGMENT_SIZE_MIN, LOSS_MIN, Quadratic, QuadraticProblem, quadratic_layout
from p2p.errors import GossamerError
from training.learner import Learner
from training.merge_math import weighted_average
from training.mixing import check_peer_values
from training.run_spec import parse_run_spec, run_id
from training.trainer import CheckpointError

SPEC = parse_run_spec('name = "parabola"\n[exchange]\nfragments = 2\n')
SHARED = msgspec.structs.replace(SPEC, init="shared")
RUN = run_id(SPEC)
NOISY = QuadraticProblem()
QUIET = QuadraticProblem(noise=0.0)


def quadratic(
    problem: QuadraticProblem = NOISY,
    *,
    peer: str = "peer",
    part: tuple[int, int] | None = None,
    spec=SPEC,
    run: bytes = RUN,
) -> Quadratic:
    return Quadratic(spec, problem, run=run, peer=peer, part=part)


def curvatures(learner: Quadratic) -> torch.Tensor:
    """Read off the loss: 1/2 a_k for a distance of 1 along the k-th axis."""
    axes = torch.eye(learner.layout.total)
    return torch.tensor([2 * (learner.evaluate(learner.optimum + axis) - LOSS_MIN) for axis in axes])


# --- n steps at once ----------------------------------------------------------------------------------------------


def test_a_slice_without_noise_is_gradient_descent() -> None:
    learner = quadratic(QUIET)
    rate = QUIET.learning_rate * curvatures(learner).double()
    expected, optimum = learner.read().double(), learner.optimum.double()
    for _ in range(37):
        expected = expected - rate * (expected - optimum)
    report = learner.run_slice(37)
    torch.testing.assert_close(learner.read().double(), expected, rtol=1e-5, atol=1e-6)
    assert report.loss == pytest.approx(learner.evaluate(), rel=1e-6)
    assert (report.steps, report.tokens) == (37, 37 * SPEC.train.batch)
    assert (learner.step, learner.tokens) == (37, 37 * SPEC.train.batch)


@given(slices=st.lists(st.integers(1, 50), min_size=1, max_size=8), rate=st.floats(0.01, 1.99))
@settings(max_examples=50, deadline=None)
def test_without_noise_it_does_not_matter_how_steps_are_sliced(slices: list[int], rate: float) -> None:
    problem = QuadraticProblem(noise=0.0, learning_rate=rate)
    at_once, sliced = (quadratic(problem, part=(1, 3)) for _ in range(2))
    at_once.run_slice(sum(slices))
    for steps in slices:
        sliced.run_slice(steps)
    torch.testing.assert_close(sliced.read(), at_once.read(), rtol=1e-4, atol=1e-5)


def test_with_noise_a_slice_has_the_distribution_of_its_steps() -> None:
    """Mean and variance of every element over 1,000 machines, against one step at a time and against theory."""
    steps, machines = 15, 1000
    problem = QuadraticProblem(noise=0.5, learning_rate=0.3)
    at_once, one_by_one = [], []
    for number in range(machines):
        learner = quadratic(problem, peer=f"a{number}", spec=SHARED)
        learner.run_slice(steps)
        at_once.append(learner.read())
        learner = quadratic(problem, peer=f"b{number}", spec=SHARED)
        for _ in range(steps):
            learner.run_slice(1)
        one_by_one.append(learner.read())
    noiseless = quadratic(QuadraticProblem(noise=0.0, learning_rate=0.3), spec=SHARED)
    noiseless.run_slice(steps)
    decay = 1 - problem.learning_rate * curvatures(noiseless).double()
    powers = torch.stack([decay ** (2 * step) for step in range(steps)])
    variance = (problem.learning_rate * problem.noise) ** 2 * powers.sum(0)
    for weights in (torch.stack(at_once).double(), torch.stack(one_by_one).double()):
        z = (weights.mean(0) - noiseless.read()) / (variance / machines).sqrt()
        assert z.abs().max() < 4.5
        ratio = weights.var(0) / variance
        assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / machines)


def test_noise_belongs_to_run_peer_and_step_and_to_nothing_else() -> None:
    problem = QuadraticProblem(learning_rate=1.0, curvature_spread=1.0)  # a step forgets everything before it

    def noise(steps_before: int, **changes) -> torch.Tensor:
        learner = quadratic(problem, **changes)
        for _ in range(steps_before):
            learner.run_slice(1)
        learner.run_slice(1)
        return learner.read() - learner.optimum

    again = quadratic(problem)
    again.run_slice(2)
    again.write(torch.zeros(64))
    again.run_slice(1)
    assert torch.equal(noise(2), noise(2))
    torch.testing.assert_close(again.read() - again.optimum, noise(2), rtol=0, atol=1e-6)
    others = [noise(0), noise(1), noise(2), noise(0, peer="other"), noise(0, run=bytes(32))]
    correlations = np.corrcoef(torch.stack(others).numpy()) - np.eye(len(others))
    assert np.abs(correlations).max() < 0.6
    assert torch.stack(others).std() == pytest.approx(problem.noise, rel=0.15)


def test_a_rate_at_which_descent_diverges_is_refused() -> None:
    for changes in ({"learning_rate": 2.0}, {"learning_rate": 0.0}, {"curvature_spread": 0.5}):
        with pytest.raises(ValueError, match="descent needs"):
            QuadraticProblem(**changes)


# --- the problem --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machines", [1, 2, 7])
def test_the_centres_average_to_the_optimum(machines: int) -> None:
    """Where each machine ends up alone, without noise, is its centre; the mean of all is the optimum."""
    problem = QuadraticProblem(noise=0.0, heterogeneity=2.0)
    learners = [quadratic(problem, part=(k + 1, machines)) for k in range(machines)]
    for learner in learners:
        learner.run_slice(10_000)
    centres = torch.stack([learner.read() for learner in learners])
    torch.testing.assert_close(centres.mean(0), learners[0].optimum, rtol=0, atol=1e-5)
    if machines > 2:
        kinds = torch.cat(
            [torch.full((s.stop - s.start,), s.kind == "weight") for s in learners[0].layout.spans]
        )
        spread = (centres - learners[0].optimum).std(0, correction=1)
        assert spread[kinds].square().mean().sqrt() == pytest.approx(2.0, rel=0.2)
        assert spread[~kinds].max() < 1e-5


def test_one_machine_more_has_a_centre_of_its_own() -> None:
    problem = QuadraticProblem(noise=0.0)
    first, more = (quadratic(problem, part=part) for part in ((1, 3), (4, 3)))
    for learner in (first, more):
        learner.run_slice(10_000)
    assert torch.equal(first.optimum, more.optimum)
    assert (first.read() - more.read()).abs().max() > 1.0


def test_the_average_of_all_machines_is_better_than_any_of_them() -> None:
    machines = 8
    learners = [quadratic(peer=f"p{k}", part=(k + 1, machines), spec=SHARED) for k in range(machines)]
    for learner in learners:
        learner.run_slice(400)
    merged = weighted_average([(learner.read(), 1) for learner in learners])
    alone = [learner.evaluate() for learner in learners]
    assert learners[0].evaluate(learners[0].optimum) == LOSS_MIN
    assert learners[0].evaluate(merged) - LOSS_MIN < 0.1 * (min(alone) - LOSS_MIN)


def test_machines_start_alike_or_uncorrelated() -> None:
    alike = [quadratic(peer=peer, spec=SHARED).read() for peer in "ab"]
    assert torch.equal(*alike)
    span = quadratic_layout(4096, 2).spans[0]
    own = [
        quadratic(QuadraticProblem(dimension=4096), peer=peer).read()[span.start : span.stop] for peer in "ab"
    ]
    assert span.kind == "weight"
    assert abs(float(torch.corrcoef(torch.stack(own))[0, 1])) < 0.1
    assert own[0].var(correction=0) == own[1].var(correction=0) == 1.0


def test_honest_machines_pass_each_others_checks_wherever_they_are() -> None:
    """Whoever has trained on at least a tenth of another's tokens: what the product mixes."""
    rng = random.Random(1)
    for trial in range(300):
        pair = [quadratic(peer=f"{trial}{side}", part=(rng.randint(1, 16), 16)) for side in "ab"]
        steps = rng.randint(1, 2000)
        pair[0].run_slice(steps)
        pair[1].run_slice(rng.randint(max(1, steps // 10), steps))
        for fragment in range(2):
            own, theirs = (learner.read(fragment) for learner in pair)
            spans = pair[0].layout.fragment_spans(fragment)
            assert check_peer_values(own, theirs, spans) is None
            assert check_peer_values(theirs, own, spans) is None


@pytest.mark.parametrize(("dimension", "fragments"), [(64, 1), (64, 2), (100, 3), (4097, 16)])
def test_the_layout_is_whole_and_of_all_kinds(dimension: int, fragments: int) -> None:
    layout = quadratic_layout(dimension, fragments)
    assert (layout.total, layout.fragments) == (dimension, fragments)
    assert [span.start for span in layout.spans[1:]] == [span.stop for span in layout.spans[:-1]]
    for fragment in range(fragments):
        assert [span.kind for span in layout.fragment_spans(fragment)] == ["weight", "bias", "norm"]
        assert layout.fragment_size(fragment) >= FRAGMENT_SIZE_MIN
    assert set(layout.views(torch.zeros(dimension))) == {span.name for span in layout.spans}


def test_fragments_that_are_too_small_are_refused() -> None:
    with pytest.raises(GossamerError, match="too small for 3 fragments") as raised:
        quadratic_layout(64, 3)
    assert "96" in raised.value.fix


# --- what a node asks of a learner --------------------------------------------------------------------------------


def test_weights_are_read_added_to_and_replaced() -> None:
    learner: Learner = quadratic()
    before = learner.read()
    assert before.dtype == torch.float32
    learner.read().zero_()
    learner.add(1, torch.ones(learner.layout.fragment_size(1)))
    assert torch.equal(learner.read(1), learner.layout.cut(before, 1) + 1)
    assert torch.equal(learner.read(0), learner.layout.cut(before, 0))
    learner.add(None, torch.ones(64))
    learner.write(before)
    assert torch.equal(learner.read(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_or_of_another_shape_does_not_enter(bad: float) -> None:
    learner = quadratic()
    before, values = learner.read(), torch.zeros(64)
    values[5] = bad
    for attempt in (
        lambda: learner.write(values),
        lambda: learner.add(None, values),
        lambda: learner.add(0, values[:32]),
        lambda: learner.write(torch.zeros(63)),
        lambda: learner.add(1, torch.zeros(64)),
    ):
        with pytest.raises(ValueError, match=r"finite|shape"):
            attempt()
    assert torch.equal(learner.read(), before)


def test_a_loaded_learner_goes_on_bit_for_bit() -> None:
    first, second = (quadratic(part=(1, 2)) for _ in range(2))
    for steps in (3, 5):
        first.run_slice(steps)
    second.run_slice(40)
    second.load(first.save())
    assert second.save() == first.save()
    assert (second.step, second.tokens) == (8, 8 * SPEC.train.batch)
    for learner in (first, second):
        for steps in (1, 5, 7):
            learner.run_slice(steps)
    assert torch.equal(first.read(), second.read())


def test_a_damaged_or_foreign_checkpoint_is_refused_and_changes_nothing() -> None:
    learner = quadratic()
    learner.run_slice(10)
    good = learner.save()
    learner.run_slice(1)
    before = learner.save()
    flipped = [bytes([*good[:byte], good[byte] ^ 4, *good[byte + 1 :]]) for byte in range(0, len(good), 7)]
    foreign = [
        quadratic(run=bytes(32)).save(),
        quadratic(QuadraticProblem(dimension=96)).save(),
    ]
    for data in [*flipped, *foreign, b"", good[:-1], good + b"\0"]:
        with pytest.raises(CheckpointError):
            learner.load(data)
    assert learner.save() == before
    learner.load(good)
    assert learner.step == 10
