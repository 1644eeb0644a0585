"""The weights of one-byte mode: whole numbers on a grid, moved by adding and subtracting whole numbers.

Owns the state (docs/PROTOCOL.md, "The state"): one int32 for each trained parameter, in units of a power of two that
belongs to its tensor. The base weights are rounded onto the grid once. A move adds its coefficient, times the sign that
its direction has there, modulo 2^32. Whole numbers commute, associate and can be taken back, so the state depends on
which moves were made and on nothing else: not on their order, nor on how they were grouped, nor on a move that came and
went. Float weights derive from the state and never the reverse.

Never knows where moves come from, nor which are valid.

Relies on: sums of whole numbers below 2^24 are exact in fp32 in any order, so that a matrix product may make them; and
on int32 as two's complement, wherever torch runs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from blake3 import blake3
from torch import Tensor

from training.byte_code import ByteTable, coefficient
from training.directions import SIGNS_PER_WORD, Key, direction_words, signs_of

MAGNITUDE_BITS = 27
"""The largest base weight of a tensor is below 2^27 units: fine enough for the smallest move, with room to grow
eightfold before the warning and sixteenfold before it wraps."""

EXPONENT_MAX = 62
WARNING_SIZE = 1 << 30
"""A state that comes this far is half-way to wrapping."""

MOVES_AT_ONCE = 64
BLOCK_WORDS = 8192
"""Words of all directions that are made at once: their signs take 2 MiB in fp32, which stay in a core's cache."""

BLOCK_WORDS_EACH = 4096
"""Words of one direction that are made at once: its signs take 1 MiB in int32."""

FEW_MOVES = 8
"""So many are added one after the other sooner than by a matrix product."""

_LIMB_BITS = 11
_LIMBS = 3
"""Coefficients modulo 2^32 in parts so small that 2^13 of them add up below 2^24, and that TF32 holds each."""


@dataclass(frozen=True, slots=True)
class Move:
    """One record, as the state sees it: a direction, the byte, and the rate at its clock (``byte_code.rate_units``)."""

    key: Key
    byte: int
    rate: int


@dataclass(frozen=True, slots=True)
class GridSpan:
    """One tensor: ``start`` to ``stop`` of the flat state, a parameter being its number there times 2^-exponent."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    exponent: int


class Grid:
    """Where the trained tensors lie in the flat state, sorted by name, each beginning with a word of its directions."""

    def __init__(self, spans: Sequence[GridSpan]) -> None:
        self.spans = tuple(spans)
        self.words = -(-self.spans[-1].stop // SIGNS_PER_WORD)

    @classmethod
    def under(cls, weights: Mapping[str, Tensor]) -> Grid:
        """The grid of base ``weights``, of which it is a pure function.

        Raises ValueError for what is not finite, or too large.
        """
        spans = []
        start = 0
        for name, tensor in sorted(weights.items()):
            stop = start + tensor.numel()
            spans.append(GridSpan(name, tuple(tensor.shape), start, stop, _exponent(name, tensor)))
            start = -(-stop // SIGNS_PER_WORD) * SIGNS_PER_WORD
        return cls(spans)

    @property
    def size(self) -> int:
        """Elements of the flat state, the gaps after tensors included."""
        return self.words * SIGNS_PER_WORD

    @cached_property
    def digest(self) -> bytes:
        """BLAKE3 of the table: equal exactly where equal numbers mean the same weights."""
        rows = (f"{span.name} {'x'.join(map(str, span.shape))} {span.exponent}\n" for span in self.spans)
        return blake3("".join(rows).encode()).digest()

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbours of one exponent: (first word, word after the last, exponent)."""
        runs: list[tuple[int, int, int]] = []
        for span in self.spans:
            first, end = span.start // SIGNS_PER_WORD, -(-span.stop // SIGNS_PER_WORD)
            if runs and runs[-1][2] == span.exponent:
                first = runs.pop()[0]
            runs.append((first, end, span.exponent))
        return tuple(runs)

    def runs_within(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Those of ``runs`` that lie in words ``first`` to ``end``, cut off there."""
        at = bisect_right(self.runs, first, key=lambda run: run[1])
        while at < len(self.runs) and self.runs[at][0] < end:
            start, stop, exponent = self.runs[at]
            yield max(start, first), min(stop, end), exponent
            at += 1

    def views(self, values: Tensor) -> dict[str, Tensor]:
        """The named, shaped tensors of a flat vector of this grid: views."""
        return {span.name: values[span.start : span.stop].view(span.shape) for span in self.spans}


class IntegerState:
    """The numbers of one node: int32 (``grid.size``), on any device."""

    def __init__(self, grid: Grid, values: Tensor) -> None:
        self.grid = grid
        self.values = values

    @classmethod
    def rounded(cls, weights: Mapping[str, Tensor], device: torch.device) -> IntegerState:
        """Base weights (fp32) on their grid, halves to even."""
        grid = Grid.under(weights)
        state = cls(grid, torch.zeros(grid.size, dtype=torch.int32, device=device))
        views = grid.views(state.values)
        for span in grid.spans:
            exact = weights[span.name].to("cpu", torch.float64) * math.ldexp(1.0, span.exponent)
            views[span.name].copy_(exact.round())
        return state

    def add(self, moves: Sequence[Move], table: ByteTable = "log") -> None:
        """Make all of ``moves``, in whatever order."""
        self._move(moves, table, 1)

    def subtract(self, moves: Sequence[Move], table: ByteTable = "log") -> None:
        """Take all of ``moves`` back, whatever came after them."""
        self._move(moves, table, -1)

    def _move(self, moves: Sequence[Move], table: ByteTable, sense: int) -> None:
        for keys, coefficients in self._grouped(moves, table, sense):
            few = len(keys) <= FEW_MOVES
            words_at_once = min(BLOCK_WORDS // len(keys), BLOCK_WORDS_EACH)
            limbs = {exponent: _limbs(row, self.values.device) for exponent, row in coefficients.items()}
            for word in range(0, self.grid.words, words_at_once):
                count = min(words_at_once, self.grid.words - word)
                signs_RN = signs_of(direction_words(keys, word, count, self.values.device))
                signs_RN = signs_RN.int() if few else signs_RN.float()
                for first, end, exponent in self.grid.runs_within(word, word + count):
                    slot = self.values[first * SIGNS_PER_WORD : end * SIGNS_PER_WORD]
                    part_RN = signs_RN[:, (first - word) * SIGNS_PER_WORD : (end - word) * SIGNS_PER_WORD]
                    if few:
                        for total, signs_N in zip(coefficients[exponent], part_RN, strict=True):
                            slot.add_(signs_N, alpha=_wrapped(total))
                    else:
                        for i, limb_N in enumerate((limbs[exponent] @ part_RN).to(torch.int32)):
                            slot.add_(limb_N, alpha=1 << _LIMB_BITS * i)

    def _grouped(
        self, moves: Sequence[Move], table: ByteTable, sense: int
    ) -> Iterator[tuple[list[Key], dict[int, list[int]]]]:
        """Keys, some at a time, each once, and their coefficients for every exponent of the grid."""
        exponents = {exponent for _, _, exponent in self.grid.runs}
        sums: dict[Key, dict[int, int]] = {}
        for move in moves:
            into = sums.setdefault(move.key, dict.fromkeys(exponents, 0))
            for exponent in exponents:
                into[exponent] += sense * coefficient(move.byte, move.rate, exponent, table)
        keys = list(sums)
        for start in range(0, len(keys), MOVES_AT_ONCE):
            some = keys[start : start + MOVES_AT_ONCE]
            yield some, {exponent: [sums[key][exponent] for key in some] for exponent in exponents}

    def derive(self, weights: Tensor) -> None:
        """Write the float weights into flat fp32 ``weights``: rounded to the nearest, halves to even, everywhere."""
        weights.copy_(self.values)
        for first, end, exponent in self.grid.runs:
            weights[first * SIGNS_PER_WORD : end * SIGNS_PER_WORD].mul_(math.ldexp(1.0, -exponent))

    def digest(self) -> bytes:
        """BLAKE3 of the grid and every number, little-endian: the state hash."""
        hasher = blake3(self.grid.digest)
        for part in self._parts():
            hasher.update(part)
        return hasher.digest()

    def to_bytes(self) -> bytes:
        """Every number, little-endian, the tensors sorted by name."""
        return b"".join(self._parts())

    def take(self, data: bytes) -> None:
        """Become the state that ``to_bytes`` gave. Raises ValueError for one of another size."""
        if len(data) != 4 * sum(span.stop - span.start for span in self.grid.spans):
            raise ValueError(f"{len(data)} bytes are not a state of this model")
        numbers = torch.frombuffer(bytearray(data), dtype=torch.int32)
        at = 0
        for span in self.grid.spans:
            count = span.stop - span.start
            self.values[span.start : span.stop].copy_(numbers[at : at + count])
            at += count

    def _parts(self) -> Iterator[memoryview]:
        values = self.values.cpu()
        for span in self.grid.spans:
            yield values[span.start : span.stop].numpy().data.cast("B")

    def largest(self) -> int:
        """The largest absolute value: beyond ``WARNING_SIZE`` the run should end before it wraps."""
        least, most = torch.aminmax(self.values)
        return max(-int(least), int(most))


def _exponent(name: str, tensor: Tensor) -> int:
    largest = float(tensor.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name} has an element that is not finite")
    bits = math.frexp(largest)[1] if largest else 0
    if bits > MAGNITUDE_BITS:
        raise ValueError(
            f"{name} has an element of {largest:g}, and a state holds none of 2^{MAGNITUDE_BITS} or more"
        )
    return max(0, min(EXPONENT_MAX, MAGNITUDE_BITS - bits))


def _limbs(coefficients: Sequence[int], device: torch.device) -> Tensor:
    """fp32 (limbs, R): the coefficients modulo 2^32, lowest bits first."""
    mask = (1 << _LIMB_BITS) - 1
    rows = [[(c % (1 << 32)) >> (_LIMB_BITS * i) & mask for c in coefficients] for i in range(_LIMBS)]
    return torch.tensor(rows, dtype=torch.float32).to(device)


def _wrapped(value: int) -> int:
    """``value`` modulo 2^32, as an int32."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
