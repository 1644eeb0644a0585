"""Weights as whole numbers: any order, any grouping, any detour gives the same bits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.byte_code import coefficient, rate_units
from training.directions import KeySequence, direction_words, signs_of
from training.integer_state import Grid, IntegerState, Move

CPU = torch.device("cpu")
SEQUENCE = KeySequence(bytes(32), b"log")
RATE = rate_units(1e-4, 10.0)


def base(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (70, 30), "norm": (3,), "bias": (100,), "one": (1,), "zero": (5, 13)}
    scales = {"wide": 0.02, "norm": 1.0, "bias": 3.0, "one": 1e-6, "zero": 0.0}
    return {name: torch.randn(shape, generator=generator) * scales[name] for name, shape in shapes.items()}


def fresh() -> IntegerState:
    return IntegerState.rounded(base(), CPU)


moves = st.builds(
    lambda number, byte, rate: Move(SEQUENCE.key(number), byte, rate),
    st.integers(0, 40),
    st.integers(0, 255),
    st.sampled_from([RATE, RATE // 7]),
)
sets = st.lists(moves, max_size=80)


@settings(max_examples=100, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_order_grouping_and_detours_do_not_matter(made: list[Move], rng: random.Random) -> None:
    at_once, one_by_one = fresh(), fresh()
    at_once.add(made)
    shuffled = rng.sample(made, len(made))
    while shuffled:
        count = rng.randint(1, len(shuffled))
        one_by_one.add(shuffled[:count])
        del shuffled[:count]
    detour = [Move(SEQUENCE.key(number), 200 - number, RATE) for number in range(20, 50)]
    one_by_one.add(detour)
    one_by_one.subtract(rng.sample(detour, len(detour)))
    assert at_once.digest() == one_by_one.digest()
    assert torch.equal(at_once.values, by_definition(fresh(), made))


def by_definition(state: IntegerState, made: Sequence[Move]) -> torch.Tensor:
    """Every parameter of every move by itself, as docs/PROTOCOL.md says it."""
    values = state.values.to(torch.int64)
    for move in made:
        signs = signs_of(direction_words([move.key], 0, state.grid.words, CPU))[0].to(torch.int64)
        for first, end, exponent in state.grid.runs:
            place = slice(first * 64, end * 64)
            values[place] += coefficient(move.byte, move.rate, exponent) * signs[place]
    return ((values + 2**31) % 2**32 - 2**31).to(torch.int32)


def test_leaving_one_out_changes_the_digest() -> None:
    made = [Move(SEQUENCE.key(number), 100, RATE) for number in range(30)]
    all_of_them, all_but_one = fresh(), fresh()
    all_of_them.add(made)
    all_but_one.add(made[:-1])
    assert all_of_them.digest() != all_but_one.digest()


def test_it_wraps_and_comes_back() -> None:
    """Far beyond 2^31 the numbers go round, and subtraction takes them all the way back."""
    state = fresh()
    made = [Move(SEQUENCE.key(3), 127, RATE * 4000) for _ in range(500)]
    state.add(made)
    assert torch.equal(state.values, by_definition(fresh(), made))
    state.subtract(made)
    assert state.digest() == fresh().digest()


def test_more_moves_than_fit_into_one_product() -> None:
    made = [Move(SEQUENCE.key(number), number % 256, RATE) for number in range(300)]
    state = fresh()
    state.add(made)
    assert torch.equal(state.values, by_definition(fresh(), made))


def test_base_weights_are_rounded_to_within_half_a_unit() -> None:
    state = fresh()
    weights = torch.empty(state.grid.size)
    state.derive(weights)
    views = state.grid.views(weights)
    for span in state.grid.spans:
        error = (views[span.name] - base()[span.name]).abs().max()
        assert error <= max(2.0**-span.exponent, base()[span.name].abs().max() * 2.0**-24)
    assert state.largest() < 1 << 27


def test_a_grid_is_sorted_by_name_and_every_tensor_begins_with_a_word() -> None:
    grid = Grid.under(base())
    assert [span.name for span in grid.spans] == ["bias", "norm", "one", "wide", "zero"]
    assert [span.start for span in grid.spans] == [0, 128, 192, 256, 2368]
    assert grid.size == 2496
    assert [span.exponent for span in grid.spans] == [23, 26, 47, 30, 27]
    assert [run[:2] for run in grid.runs] == [(0, 2), (2, 3), (3, 4), (4, 37), (37, 39)]


def test_neighbours_of_one_exponent_are_moved_together() -> None:
    grid = Grid.under({name: torch.full((100,), 0.7) for name in "abc"})
    assert grid.runs == ((0, 6, 27),)


def test_digests_tell_grids_apart() -> None:
    named = {"a": torch.zeros(4), "b": torch.zeros(4)}
    renamed = {"a": torch.zeros(4), "c": torch.zeros(4)}
    reshaped = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    digests = {IntegerState.rounded(weights, CPU).digest() for weights in (named, renamed, reshaped)}
    assert len(digests) == 3


def test_base_weights_beyond_the_grid_are_refused() -> None:
    largest = float(2**27 - 8)
    assert IntegerState.rounded({"at": torch.tensor([largest])}, CPU).values[0] == 2**27 - 8
    with pytest.raises(ValueError, match=r"at has an element of .* or more"):
        IntegerState.rounded({"at": torch.tensor([-float(2**27)])}, CPU)


def test_base_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        Grid.under({"bias": torch.tensor([1.0, float("nan")])})
