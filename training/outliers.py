"""Values that are unlike everybody else's: which contributions to an average, and which pulled weights, to leave out.

Owns two judgements that need no held-out data and know no peers. In a merge contributions are judged against each
other, as all owners see the same: whose norm is out of all proportion, and whose direction is against that of the rest
while the rest agree. In an exchange a node has its own weights, the only ones that it can trust, and what it pulls is
judged by distance from them (nearest-neighbour averaging, arXiv 2209.10931). There a fixed number of the farthest is
dropped; here, since few are pulled at a time and mostly nobody lies, whoever is farther than usual, or turned round.

Both rest on a majority: values that differ honestly, of members with other kinds of data, are left out like a liar's
once they are few and far, which is why a run may do without (``RunSpec.outliers``).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.mixing import Refused

NORM_MAX = 3.0
"""A contribution's norm, as a multiple of the median; as many times more as its weight is above the median one.
Measured of honest ones, who had learned as much: up to 1.7."""

AGREEMENT_MIN = 0.1
"""Cosine between a contribution and the mean direction of the others: at the median at least so much, for one below its
negative to be left out. Measured of honest ones: never below 0; of one that is turned round: -0.13 to -0.97."""

JUDGED_MIN = 4
"""Contributions; of three, one that lies leaves no majority."""

DISTANCES_KEPT = 15
FARTHER_MAX = 2.0
"""What is pulled may be so many times as far as the median of what was pulled lately."""
FAR_MIN = 0.5
"""Of the norm of one's own weights: what is nearer is never far. Members that merge are at no distance at times."""

DISTANCES_MIN = 8
"""Without so many there is no telling what is usual."""


def unlike(contributions: Sequence[Tensor], weights: Sequence[int]) -> dict[int, Refused]:
    """By number, the contributions that are unlike the others, and why: flat fp32 of one length, all finite.

    ``weights``: those with which they count. A weight of 1 is that of a member which has learned nothing lately; these
    are no measure, and are judged by nothing but their direction.
    """
    norms = [torch.linalg.vector_norm(each).item() for each in contributions]
    found: dict[int, Refused] = {}
    learned = [number for number, weight in enumerate(weights) if weight > 1 and norms[number] > 0]
    if len(learned) >= JUDGED_MIN:
        usual_norm = statistics.median(norms[number] for number in learned)
        usual_weight = statistics.median(weights[number] for number in learned)
        for number in learned:
            excess = norms[number] / usual_norm
            if excess > NORM_MAX * max(1.0, weights[number] / usual_weight):
                found[number] = Refused("norm", f"its norm is {excess:.1f} times that of most")
    rest = [number for number, norm in enumerate(norms) if number not in found and norm > 0]
    if len(rest) < JUDGED_MIN:
        return found
    cosines = _agreement([contributions[number] for number in rest], [norms[number] for number in rest])
    if statistics.median(cosines) < AGREEMENT_MIN:
        return found
    for number, cosine in zip(rest, cosines, strict=True):
        if cosine < -AGREEMENT_MIN:
            found[number] = Refused("opposed", f"it goes against the others (cosine {cosine:.2f})")
    return found


def _agreement(contributions: Sequence[Tensor], norms: Sequence[float]) -> list[float]:
    """The cosine of each with the sum of the others' directions; 0 where these cancel out."""
    total = torch.zeros_like(contributions[0])
    for values, norm in zip(contributions, norms, strict=True):
        total.add_(values, alpha=1 / norm)
    square = torch.dot(total, total).item()
    found = []
    for values, norm in zip(contributions, norms, strict=True):
        along = torch.dot(values, total).item() / norm
        others = square - 2 * along + 1
        found.append((along - 1) / math.sqrt(others) if others > 1e-6 else 0.0)
    return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of what was pulled, by number: what is not to be mixed, and whose fault that is."""

    far: frozenset[int]
    """Farther than usual. So is whoever has just come, or has been elsewhere."""
    opposed: dict[int, Refused]
    """Against our own weights: no honest member's are, however it began."""

    @property
    def left_out(self) -> frozenset[int]:
        """Both."""
        return self.far.union(self.opposed)


NO_OBJECTION = Judgement(frozenset(), {})


class Distances:
    """How far what was pulled for one fragment is from one's own weights, as a rule."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=DISTANCES_KEPT)

    def judge(self, own: Tensor, pulled: Sequence[Tensor]) -> Judgement:
        """Which of ``pulled`` are too far from ``own``, or against it: flat fp32 of one length, all finite.

        What is left out counts as seen, too: whoever comes back from elsewhere and is far from all is soon judged by
        that.
        """
        norm = torch.linalg.vector_norm(own).item() or 1.0
        distances = [torch.linalg.vector_norm(values - own).item() / norm for values in pulled]
        self._seen.extend(distances)
        opposed = {}
        for number, values in enumerate(pulled):
            cosine = torch.dot(own, values).item() / (norm * (torch.linalg.vector_norm(values).item() or 1.0))
            if cosine < -AGREEMENT_MIN:
                opposed[number] = Refused("opposed", f"weights turned round (cosine with ours {cosine:.2f})")
        if len(self._seen) < DISTANCES_MIN:
            return Judgement(frozenset(), opposed)
        most = max(FAR_MIN, FARTHER_MAX * statistics.median_low(self._seen))
        return Judgement(frozenset(n for n, distance in enumerate(distances) if distance > most), opposed)
