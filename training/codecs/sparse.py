"""The largest values of every block and nothing else: 16 bits for each, the place in the block among them.

Owns the form: the steps of all blocks, fp32, then the entries of all blocks, 16 bits each: the place in twelve, and in
four a sign and the magnitude in sevenths of the block's largest. What is kept of a block lies within a few times of
each other, so steps of equal size fit it better than powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.codecs.codec import bytes_of, check_finite, check_scales, check_size, tensor_of

BLOCK = 4096
"""Values whose places twelve bits tell apart."""

_LARGEST = 7
_ROWS = 64
"""Blocks worked on at a time, so that what is in between stays in the cache."""
_FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class TopK:
    """One in ``one_in`` values of each block: the largest by magnitude, and of equal ones the first.

    Blocks of 4096 values in the order of the tensor, where SparseLoCo (arXiv 2508.15706) has squares of 64 by 64, and
    four bits for a value where it has two and a table.
    """

    one_in: int = 64
    lossless = False

    def _kept(self, count: int) -> int:
        """Entries of a block of ``count`` values."""
        return -(-count // self.one_in)

    def size_bytes(self, count: int) -> int:
        """Two for each value that is kept and four for each block."""
        full, rest = divmod(count, BLOCK)
        return full * (4 + 2 * self._kept(BLOCK)) + (4 + 2 * self._kept(rest) if rest else 0)

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """Raises NotFinite."""
        full = len(values) // BLOCK * BLOCK
        rows = values[:full].view(-1, BLOCK)
        parts = [self._encode(rows[at : at + _ROWS]) for at in range(0, len(rows), _ROWS)]
        if full < len(values):
            parts.append(self._encode(values[full:].view(1, -1)))
        return b"".join(bytes_of(steps) for steps, _ in parts) + b"".join(
            bytes_of(entries) for _, entries in parts
        )

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The steps and the entries of blocks of one length."""
        length = rows.shape[1]
        # One whole number for magnitude and place: no two are equal, so which are the largest is no matter of taste.
        ranks = rows.view(torch.int32).bitwise_and(0x7FFFFFFF).long().bitwise_left_shift_(12)
        ranks.bitwise_or_(torch.arange(BLOCK - 1, BLOCK - 1 - length, -1))
        places = torch.topk(ranks, self._kept(length), dim=1, sorted=False).indices.sort(dim=1).values
        kept = rows.gather(1, places)
        check_finite(kept.flatten())  # What is not finite has the highest ranks.
        steps = kept.abs().amax(1) / _LARGEST
        inverse = 1 / steps
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)[:, None]
        magnitudes = (kept.abs() * inverse).round_().clamp_(max=_LARGEST).to(torch.int32)
        codes = magnitudes.bitwise_or_((kept < 0).int().bitwise_left_shift_(3))
        return steps, codes.bitwise_left_shift_(12).bitwise_or_(places.int()).to(torch.uint16)

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """Raises ValueError for another length, steps that no values have, and places that do not ascend."""
        check_size(self, data, count)
        blocks = -(-count // BLOCK)
        steps, entries = (
            tensor_of(data[: 4 * blocks], torch.float32),
            tensor_of(data[4 * blocks :], torch.uint16),
        )
        check_scales(steps, _FP32_MAX / _LARGEST)
        values = torch.zeros(count)
        full = count // BLOCK
        cut = full * self._kept(BLOCK)
        self._decode(
            steps[:full], entries[:cut].view(full, self._kept(BLOCK)), values[: full * BLOCK].view(-1, BLOCK)
        )
        if full < blocks:
            self._decode(steps[full:], entries[cut:].view(1, -1), values[full * BLOCK :].view(1, -1))
        return values

    def _decode(self, steps: Tensor, entries: Tensor, rows: Tensor) -> None:
        """Write blocks of one length into ``rows``, which are zeros."""
        if not len(rows):
            return
        entries = entries.to(torch.int32)
        places, codes = entries & (BLOCK - 1), entries >> 12
        if bool((places[:, 1:] <= places[:, :-1]).any()) or int(places[:, -1].amax()) >= rows.shape[1]:
            raise ValueError("places that do not ascend, or lie beyond the block")
        magnitudes = (codes & 7).to(torch.float32).mul_(steps[:, None])
        rows.scatter_(1, places.long(), torch.where(codes > 7, -magnitudes, magnitudes))
