"""Mixing one's own fragment with those of peers, and refusing what must not be mixed.

Owns the mixing rules and the bounds on a peer's values. Pure functions of flat fp32 CPU tensors; never changes its
inputs, and knows no peers.

* ``mean``: the plain average over the set, own values included.
* ``variance_corrected``: the same average, each of its tensors then stretched about its own mean until its variance
  is the mean variance of the tensors that went in (Tian, Al-Ars, Kitsak, Hofstee, arXiv 2404.04616, their target over
  the whole set). Averaging k independently initialised models shrinks the variance up to k times, and signals with
  it; for models that are already alike the gain is 1. Normalisation tensors and scalars are averaged only, and no gain
  exceeds sqrt(k), what k uncorrelated models need.

Both are invariant under permutation of the set, bit for bit: the models are added, tensor by tensor, in ascending
order of (variance, mean), which depends on their values alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.codecs.codec import Codec, NotFinite
from training.layout import TensorSpan
from training.learner import all_finite
from training.spec_sections import MixingRuleName

EPSILON = 1e-12
"""Added to both variances before their ratio is taken, so that constant tensors have a gain of 1."""

EXCESS_MAX = 10.0
"""A peer's norm or variance may be at most this many times one's own."""

RMS_FLOOR = 1e-3
"""Tensors of our own that are smaller than this on average (a fresh bias) are compared as if they were this large."""

BEGINNER_RMS_FLOOR = 3.0
"""The same for a beginner, whose initial weights are no measure: well above what trained weights come to."""

BEGINNER_TOKENS_SHARE = 0.1
"""A beginner, to somebody else, is who has trained on less than this share of the other's tokens."""

CHUNK = 1 << 16
"""Elements measured at a time: small enough for a processor's cache and for exact fp32 partial sums."""


@dataclass(frozen=True, slots=True, eq=False)
class MixResult:
    """A mixed fragment. Ratios are variance over the mean variance of the set, averaged over corrected elements."""

    values: Tensor
    variance_ratio_before: float
    """Of the plain average: 1 for alike models, 1/k for k uncorrelated ones."""
    variance_ratio_after: float
    gain_max: float
    """The largest stretch of a tensor; 1 under ``mean``."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a peer's values are not used: a short code, and words for a log."""

    code: str
    text: str


class _Moments(NamedTuple):
    """Population variance and mean of a tensor. Compares in this order, which is the order of summation."""

    variance: float
    mean: float


def mix(
    rule: MixingRuleName, own: Tensor, others: Sequence[Tensor], spans: Sequence[TensorSpan]
) -> MixResult:
    """Mix ``own`` with ``others``, flat fp32 of one length, whose tensors lie as ``spans`` say.

    Every input must have passed ``check_peer_values``.
    """
    values = torch.empty_like(own)
    measured, ratio_before, ratio_after, gain_max = 0, 0.0, 0.0, 1.0
    for span in spans:
        models = [model[span.start : span.stop] for model in (own, *others)]
        mixed = values[span.start : span.stop]
        moments = [_moments(model) for model in models]
        order = sorted(range(len(models)), key=moments.__getitem__)
        _average([models[index] for index in order], out=mixed)
        if span.kind in ("norm", "scalar"):
            continue
        target = math.fsum(moment.variance for moment in moments) / len(models)
        before = _moments(mixed)
        ratio = (before.variance + EPSILON) / (target + EPSILON)
        gain = 1.0
        if rule == "variance_corrected":
            gain = min(math.sqrt(1 / ratio), math.sqrt(len(models)))
            _stretch(mixed, about=before.mean, gain=gain)
        size = span.stop - span.start
        measured += size
        ratio_before += size * ratio
        ratio_after += size * ratio * gain**2
        gain_max = max(gain_max, gain)
    if not measured:
        return MixResult(values, 1.0, 1.0, 1.0)
    return MixResult(values, ratio_before / measured, ratio_after / measured, gain_max)


def decoded(codec: Codec, data: bytes, count: int) -> Tensor | Refused:
    """The values that a peer sent, finite all of them, or what is wrong with its bytes."""
    try:
        return codec.decode(data, count)
    except NotFinite as error:
        return Refused("non-finite", str(error))
    except ValueError as error:
        return Refused("shape", str(error))


@dataclass(frozen=True, slots=True)
class Yardstick:
    """One's own values as far as those of peers are judged by them: flat fp32 of ``count``, tensor by tensor."""

    count: int
    spans: Sequence[TensorSpan]
    moments: Sequence[_Moments]

    @classmethod
    def of(cls, own: Tensor, spans: Sequence[TensorSpan]) -> Yardstick:
        """The measure that ``own`` is, whose tensors lie as ``spans`` say."""
        return cls(len(own), spans, [_moments(own[span.start : span.stop]) for span in spans])

    def check(self, theirs: Tensor, *, beginner: bool = False) -> Refused | None:
        """None when ``theirs`` may be mixed with one's own; otherwise what is wrong with it.

        Refuses another shape, any non-finite element, a fragment whose norm, and a tensor whose norm or variance, is
        more than 10 times one's own. The variance of normalisation tensors is not compared: they start constant.
        ``beginner``: own weights that have hardly been trained are compared as if they had.
        """
        if theirs.shape != (self.count,):
            return Refused("shape", f"{tuple(theirs.shape)} values, expected {(self.count,)}")
        refused = self._excess(theirs, (BEGINNER_RMS_FLOOR if beginner else RMS_FLOOR) ** 2)
        # Whatever is not finite is out of all proportion too, so that mostly nothing has to be looked at once more.
        if refused is not None and not all_finite(theirs):
            return Refused("non-finite", "an element is not finite")
        return refused

    def _excess(self, theirs: Tensor, floor_square: float) -> Refused | None:
        own_square_sum = their_square_sum = 0.0
        for span, mine in zip(self.spans, self.moments, strict=True):
            size = span.stop - span.start
            peer = _moments(theirs[span.start : span.stop])
            mine_square, peer_square = mine.variance + mine.mean**2, peer.variance + peer.mean**2
            # Written so that an overflow to infinity or NaN is refused too.
            if not peer_square <= EXCESS_MAX**2 * max(mine_square, floor_square):
                return Refused("norm", f"the norm of {span.name} is more than {EXCESS_MAX:g} times ours")
            if span.kind != "norm" and not peer.variance <= EXCESS_MAX * max(mine.variance, floor_square):
                return Refused(
                    "variance", f"the variance of {span.name} is more than {EXCESS_MAX:g} times ours"
                )
            own_square_sum += size * max(mine_square, floor_square)
            their_square_sum += size * peer_square
        if not their_square_sum <= EXCESS_MAX**2 * own_square_sum:
            return Refused("norm", f"the fragment's norm is more than {EXCESS_MAX:g} times ours")
        return None


def check_peer_values(
    own: Tensor, theirs: Tensor, spans: Sequence[TensorSpan], *, beginner: bool = False
) -> Refused | None:
    """The same for a single peer's values."""
    return Yardstick.of(own, spans).check(theirs, beginner=beginner)


def _moments(values: Tensor) -> _Moments:
    """Mean and variance of chunks in fp32, joined in fp64 (Chan, Golub, LeVeque 1979).

    A chunk's sum of squares serves as it is while its mean is small against it, as weights have it; otherwise the
    chunk is centred first, so that a variance far below the squared mean keeps its digits too.
    """
    if len(values) <= CHUNK:
        mean, square_sum = _sums(values)
        return _Moments(square_sum / len(values), mean)
    chunks = torch.split(values, CHUNK)
    sizes = [len(chunk) for chunk in chunks]
    means, square_sums = zip(*map(_sums, chunks), strict=True)
    count = len(values)
    mean_all = sum(size * mean for size, mean in zip(sizes, means, strict=True)) / count
    between = sum(size * (mean - mean_all) ** 2 for size, mean in zip(sizes, means, strict=True))
    return _Moments((sum(square_sums) + between) / count, mean_all)


def _sums(chunk: Tensor) -> tuple[float, float]:
    """The mean of ``chunk``, and the sum of its squared deviations from it."""
    size = len(chunk)
    mean = chunk.sum().item() / size
    square_sum = torch.dot(chunk, chunk).item()
    of_mean = size * mean**2
    if of_mean <= 0.5 * square_sum:
        return mean, square_sum - of_mean
    centred = chunk - mean
    return mean, torch.dot(centred, centred).item()


def _average(models: Sequence[Tensor], *, out: Tensor) -> None:
    for start in range(0, len(out), CHUNK):
        stop = start + CHUNK
        total = torch.add(models[0][start:stop], models[1][start:stop], out=out[start:stop])
        for model in models[2:]:
            total.add_(model[start:stop])
        total.div_(len(models))


def _stretch(values: Tensor, *, about: float, gain: float) -> None:
    for chunk in torch.split(values, CHUNK):
        chunk.mul_(gain).add_(about * (1 - gain))
