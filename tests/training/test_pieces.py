"""Pieces tile the model, alike in size, and know which tensors lie in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.layout import ParameterLayout, TensorSpan
from training.pieces import PIECE_VALUES_MIN, PIECES_MAX, Pieces


def layout_of(sizes: list[int], fragments: int = 1) -> ParameterLayout:
    """Tensors of those sizes, in order, in fragments of as many tensors each."""
    spans, start = [], 0
    for number, size in enumerate(sizes):
        spans.append(TensorSpan(f"t{number}", start, start + size, (size,), "weight"))
        start += size
    every = -(-len(sizes) // fragments)
    bounds = [spans[at].start for at in range(0, len(spans), every)]
    return ParameterLayout(tuple(spans), (*bounds, start))


@given(
    sizes=st.lists(st.integers(1, 1 << 18), min_size=1, max_size=12),
    fragments=st.integers(1, 4),
)
def test_pieces_tile_the_vector_and_their_spans_tile_them(sizes: list[int], fragments: int) -> None:
    layout = layout_of(sizes, min(fragments, len(sizes)))
    pieces = Pieces.of(layout, streaming=False)
    assert pieces.bounds[0] == 0
    assert pieces.bounds[-1] == layout.total
    assert set(layout.bounds) <= set(pieces.bounds), "no piece lies in two fragments"
    assert layout.fragments <= len(pieces) <= max(PIECES_MAX, layout.fragments)
    for piece in range(len(pieces)):
        edge = 0
        for span in pieces.spans(piece):
            assert span.start == edge < span.stop
            assert span.shape == (span.stop - span.start,)
            edge = span.stop
        assert edge == pieces.size(piece)


def test_a_large_model_is_shared_out_evenly_and_a_small_one_stays_whole() -> None:
    sizes = Pieces.of(layout_of([10_000_000]), streaming=False).sizes
    assert len(sizes) == PIECES_MAX
    assert max(sizes) - min(sizes) <= 2 * 4096
    assert len(Pieces.of(layout_of([2 * PIECE_VALUES_MIN - 1]), streaming=False)) == 1


def test_streamed_fragments_are_shared_out_each_by_itself() -> None:
    layout = layout_of([1_000_000] * 4, fragments=2)
    assert [len(turn) for turn in Pieces.of(layout, streaming=False).turns] == [PIECES_MAX // 2] * 2
    pieces = Pieces.of(layout, streaming=True)
    assert [len(turn) for turn in pieces.turns] == [PIECES_MAX] * 2
    assert [piece for turn in pieces.turns for piece in turn] == list(range(len(pieces)))
    assert pieces.bounds[pieces.turns[1][0]] == layout.bounds[1]


@pytest.mark.parametrize("fragments", [1, 3])
def test_what_is_cut_can_be_joined(fragments: int) -> None:
    layout = layout_of([100_000, 50_000, 70_001], fragments)
    pieces = Pieces.of(layout, streaming=False)
    values = torch.arange(layout.total, dtype=torch.float32)
    assert torch.equal(pieces.join([pieces.cut(values, piece) for piece in range(len(pieces))]), values)
