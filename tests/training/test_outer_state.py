"""Members that hold one state and hear of one update hold one state after it, and nothing that is left out is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.codecs.named import UPDATE_WIRES
from training.merge_math import weighted_average
from training.mixing import Refused
from training.outer_state import (
    OuterState,
    Updates,
    decode_state,
    encode_state,
    state_bytes,
    updates_of,
)
from training.outer_steps import nesterov
from training.spec_sections import NesterovSpec, PlainOuterSpec, UpdateWire

COUNT = 5000


def some(seed: int, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_a_spec_says_how_merges_move() -> None:
    assert updates_of(PlainOuterSpec()) is None
    updates = updates_of(NesterovSpec(rate=0.5, momentum=0.8, warmup=0.4, wire="int8"))
    assert updates == Updates(UPDATE_WIRES["int8"], 0.5, 0.8, 0.4)


def test_a_state_survives_its_bytes_and_weights_are_a_state_at_rest() -> None:
    state = OuterState(some(1), some(2))
    data = encode_state(state)
    assert len(data) == state_bytes(COUNT)
    read = decode_state(data, COUNT)
    assert isinstance(read, OuterState)
    assert torch.equal(read.anchor, state.anchor)
    assert torch.equal(read.momentum, state.momentum)
    at_rest = decode_state(data[: len(data) // 2], COUNT)
    assert isinstance(at_rest, OuterState)
    assert torch.equal(at_rest.anchor, state.anchor)
    assert not at_rest.momentum.any()
    for wrong in (data[:-1], b"", data + b"\0" * 4, bytes(len(data) - 4) + b"\0\0\xc0\x7f"):
        assert isinstance(decode_state(wrong, COUNT), Refused)


def test_pieces_of_a_state_step_as_the_whole_does() -> None:
    whole, updates = OuterState(some(1), some(2)), Updates(UPDATE_WIRES["fp32"], 0.7, 0.9)
    delta = some(3)
    parts = [
        updates.apply(whole.of(start, stop), delta[start:stop]) for start, stop in ((0, 4096), (4096, COUNT))
    ]
    joined, stepped = OuterState.joined(parts, passed=0.0), updates.apply(whole, delta)
    assert torch.equal(joined.anchor, stepped.anchor)
    assert torch.equal(joined.momentum, stepped.momentum)


@pytest.mark.parametrize(
    ("passed", "rate", "memory"), [(0.0, 1.0, 0.0), (0.2, 0.75, 0.4), (0.4, 0.5, 0.8), (0.9, 0.5, 0.8)]
)
def test_a_step_that_warms_up_begins_as_the_plain_average(passed: float, rate: float, memory: float) -> None:
    state, delta = OuterState(some(1), some(2), passed), some(3)
    growing = Updates(UPDATE_WIRES["fp32"], 0.5, 0.8, warmup=0.4).apply(state, delta)
    grown = Updates(UPDATE_WIRES["fp32"], rate, memory).apply(state, delta)
    assert torch.equal(growing.anchor, grown.anchor)
    assert torch.equal(growing.momentum, grown.momentum)
    if not passed:
        assert torch.equal(growing.anchor, state.anchor - delta)


@pytest.mark.parametrize("wire", UPDATE_WIRES)
@given(seed=st.integers(0, 2**31))
def test_what_a_sum_leaves_out_is_sent_later(wire: UpdateWire, seed: int) -> None:
    """What was wanted in all is what arrived in all and what is still owed."""
    updates = Updates(UPDATE_WIRES[wire], 1.0, 0.0)
    owed = torch.zeros(COUNT)
    wanted, arrived = torch.zeros(COUNT), torch.zeros(COUNT)
    for turn in range(4):
        delta = 1e-3 * some(seed + turn)
        data, owed = updates.encode_sum(delta, owed)
        decoded = updates.decode(data, COUNT)
        assert isinstance(decoded, torch.Tensor)
        wanted += delta
        arrived += decoded
    torch.testing.assert_close(arrived + owed, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wire", UPDATE_WIRES)
@given(seed=st.integers(0, 2**31))
def test_what_a_member_has_not_told_yet_is_its_distance_from_the_anchor(wire: UpdateWire, seed: int) -> None:
    """One member that is averaged with nobody walks as far as it has learned, now or later."""
    updates = Updates(UPDATE_WIRES[wire], 1.0, 0.0)
    state = OuterState(torch.zeros(COUNT), torch.zeros(COUNT))
    live, learned = torch.zeros(COUNT), torch.zeros(COUNT)
    for turn in range(4):
        step = 1e-3 * some(seed + turn)
        live, learned = live + step, learned + step
        data, told = updates.encode(state.anchor - live)
        decoded = updates.decode(data, COUNT)
        assert isinstance(decoded, torch.Tensor)
        assert torch.equal(decoded, told)
        following = updates.apply(state, decoded)
        live = following.anchor + (live - (state.anchor - told))
        state = following
    torch.testing.assert_close(live, learned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wire", ["e3m0", "top64"])
def test_swarms_go_where_exact_ones_go(wire: UpdateWire) -> None:
    """Members in bowls of their own: the anchor ends in the mean of the bowls, whatever they leave out each time."""
    count, way = 1000, 0.02
    bowls = [1.0 + some(member, count) for member in range(4)]
    centre = weighted_average([(bowl, 1) for bowl in bowls])
    updates = Updates(UPDATE_WIRES[wire], 0.7, 0.5)
    state = OuterState(torch.zeros(count), torch.zeros(count))
    lives, owed = [state.anchor.clone() for _ in bowls], torch.zeros(count)
    for turn in range(800):
        told = []
        for member, bowl in enumerate(bowls):
            # Steps grow smaller, as a rate that decays makes them: what has not been told goes to nothing with them.
            lives[member] += way * (1 - turn / 800) * (bowl - lives[member])
            told.append(updates.encode(state.anchor - lives[member])[1])
        data, owed = updates.encode_sum(weighted_average([(values, 1) for values in told]), owed)
        following = updates.apply(state, updates.codec.decode(data, count))
        for live, delta in zip(lives, told, strict=True):
            live.add_(following.anchor - state.anchor + delta)
        state = following
    assert (state.anchor - centre).square().mean() < 0.01 * centre.square().mean()


@given(seed=st.integers(0, 2**31), rate=st.floats(0.1, 1.2), memory=st.floats(0.0, 0.95))
def test_sent_in_full_it_is_nesterov_on_the_average(seed: int, rate: float, memory: float) -> None:
    updates = Updates(UPDATE_WIRES["fp32"], rate, memory)
    state = OuterState(some(seed), some(seed + 1))
    delta = some(seed + 2)
    anchor, momentum = nesterov(state.anchor, state.anchor - delta, state.momentum, rate=rate, memory=memory)
    after = updates.apply(state, delta)
    assert torch.equal(after.anchor, anchor)
    assert torch.equal(after.momentum, momentum)
