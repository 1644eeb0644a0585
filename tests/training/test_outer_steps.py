"""Outer steps are what their papers say: by identities, by hand, and by how groups hold together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.merge_math import weighted_average
from training.outer_steps import (
    Side,
    nesterov,
    pair_contraction,
    pair_step,
)
from training.stability import nesterov_rate_max, pair_rate_max

seeds = st.integers(0, 2**31)


def some(seed: int, count: int = 257) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds)
def test_federated_averaging_is_a_rate_of_one_without_memory_bit_for_bit(seed: int) -> None:
    parent, average = some(seed), some(seed + 1)
    following, momentum = nesterov(parent, average, torch.zeros(257), rate=1.0, memory=0.0)
    assert torch.equal(following, average)
    assert torch.equal(momentum, parent - average)


def test_two_steps_by_hand() -> None:
    parent, momentum = torch.tensor([1.0]), torch.tensor([0.0])
    # Delta 0.5, m 0.5: 1 - 0.7 (0.5 + 0.9 * 0.5); then Delta 0.085, m 0.535: 0.335 - 0.7 (0.085 + 0.9 * 0.535).
    for average, comes_to, keeps in [(0.5, 0.335, 0.5), (0.25, -0.06155, 0.535)]:
        parent, momentum = nesterov(parent, torch.tensor([average]), momentum, rate=0.7, memory=0.9)
        assert parent.item() == pytest.approx(comes_to, abs=1e-6)
        assert momentum.item() == pytest.approx(keeps, abs=1e-6)


@given(seed=seeds, rate=st.floats(0.1, 1.5), memory=st.floats(0.0, 0.95))
def test_it_is_what_torch_does_with_the_pseudo_gradient(seed: int, rate: float, memory: float) -> None:
    parent, momentum = some(seed), torch.zeros(257)
    weights = torch.nn.Parameter(parent.clone())
    optimizer = torch.optim.SGD([weights], lr=rate, momentum=memory, nesterov=memory > 0)
    for step in range(4):
        average = some(seed + step + 1)
        weights.grad = weights.detach() - average
        parent, momentum = nesterov(parent, average, momentum, rate=rate, memory=memory)
        optimizer.step()
        torch.testing.assert_close(parent, weights.detach(), rtol=1e-4, atol=1e-4)


def test_no_input_is_changed() -> None:
    parent, average, momentum = some(0), some(1), some(2)
    copies = [tensor.clone() for tensor in (parent, average, momentum)]
    nesterov(parent, average, momentum, rate=0.7, memory=0.9)
    side = Side(parent, average)
    pair_step(side, [side, Side(average, parent)], momentum, rate=0.7, memory=0.5)
    for tensor, copy in zip((parent, average, momentum), copies, strict=True):
        assert torch.equal(tensor, copy)


@given(seed=seeds, members=st.integers(2, 5), rate=st.floats(0.1, 1.0))
def test_a_group_of_all_that_start_alike_is_the_same_with_and_without_a_parent(
    seed: int, members: int, rate: float
) -> None:
    """Its momentum is heavy-ball and looks no step ahead, so the two are one without memory."""
    start = some(seed)
    group = [Side(start, some(seed + 1 + member)) for member in range(members)]
    average = weighted_average([(side.end, 1) for side in group])
    expected, _ = nesterov(start, average, torch.zeros(257), rate=rate, memory=0.0)
    for side in group:
        following, _ = pair_step(side, group, torch.zeros(257), rate=rate, memory=0.0)
        torch.testing.assert_close(following, expected, rtol=1e-5, atol=1e-5)


def test_a_group_of_all_at_rate_one_without_memory_goes_to_the_average() -> None:
    group = [Side(some(2 * member), some(2 * member + 1)) for member in range(4)]
    average = weighted_average([(side.end, 1) for side in group])
    for side in group:
        following, _ = pair_step(side, group, torch.zeros(257), rate=1.0, memory=0.0)
        torch.testing.assert_close(following, average, rtol=1e-5, atol=1e-5)


@given(memory=st.floats(0.0, 0.97))
def test_pairs_hold_together_up_to_a_rate_and_not_beyond(memory: float) -> None:
    most = pair_rate_max(memory)
    assert pair_contraction(rate=most, memory=memory) < 1.0
    assert pair_contraction(rate=most + 0.02, memory=memory) > 1.0


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_an_anchor_stays_where_it_is_wanted_up_to_a_rate_and_not_beyond(memory: float) -> None:
    """Members that go all the way to 0 from wherever they start."""

    def after(rate: float) -> float:
        parent, momentum = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for _ in range(4000):
            parent, momentum = nesterov(parent, 0 * parent, momentum, rate=rate, memory=memory)
        return abs(parent.item())

    assert after(nesterov_rate_max(memory)) < 1.0
    assert after(nesterov_rate_max(memory) + 0.02) > 1.0


def spread_after(rounds: int, *, rate: float, memory: float) -> float:
    """The variance between 64 members that meet in random pairs and learn nothing, per round, as a factor."""
    generator = torch.Generator().manual_seed(0)
    count = 64
    starts = torch.randn(count, 200, generator=generator)
    momenta = torch.zeros_like(starts)
    began = starts.var(0).mean()
    for _ in range(rounds):
        order = torch.randperm(count, generator=generator)
        following, moved = starts.clone(), momenta.clone()
        for left, right in order.view(-1, 2).tolist():
            group = [Side(starts[left], starts[left]), Side(starts[right], starts[right])]
            for member, side in ((left, group[0]), (right, group[1])):
                following[member], moved[member] = pair_step(
                    side, group, momenta[member], rate=rate, memory=memory
                )
        starts, momenta = following, moved
    return float((starts.var(0).mean() / began) ** (1 / rounds))


@pytest.mark.parametrize(("rate", "memory"), [(0.7, 0.5), (0.7, 0.9), (0.3, 0.9), (0.7, 0.0)])
def test_the_contraction_is_the_one_of_real_pairs(rate: float, memory: float) -> None:
    measured = spread_after(40, rate=rate, memory=memory)
    assert measured == pytest.approx(pair_contraction(rate=rate, memory=memory), abs=0.06)


def test_with_the_memory_of_diloco_pairs_drift_apart() -> None:
    assert spread_after(60, rate=0.7, memory=0.9) > 1.0 > spread_after(60, rate=0.7, memory=0.5)
