"""Whose turn it is to propose, and when: the timing of attempts. IO-free; times are passed in, in seconds.

Owns what this node wants merged and the highest ballot it has met on the present link. Attempt k belongs to the
k-th member alive in the ranking, around and around; the first goes at once, every further one a turn later, so that
a dead proposer costs a second and two live ones rarely meet. Timing only: the safety of a ballot does not rest on it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

from gossip.merge_pace import MergePace
from gossip.merge_record import Link, ranking
from gossip.messages import Ballot
from p2p.limits import Limits
from p2p.transport import PeerId


class MergeTurns:
    """One node's view of the attempts at the present link."""

    def __init__(self, *, local: PeerId, pace: MergePace, limits: Limits, rng: random.Random) -> None:
        self._local = local
        self._pace = pace
        self._limits = limits
        self._rng = rng
        self._due_point: int | None = None
        self._unscheduled = False
        self._wanted_s = math.inf
        """Since when a merge is wanted here."""
        self._met: Ballot | None = None
        """The highest ballot met on this link."""
        self._heard_s = 0.0
        """When its proposer last gave a sign of life."""
        self._lost_s: float | None = None
        """When its proposer was found dead."""
        self._failures = 0
        self._retry_s = 0.0
        self.began_s: float | None = None
        """When this node first heard of the merge that is under way."""

    # --- what is wanted ---------------------------------------------------------------------------------------

    def due(self, point: int, link: Link, now_s: float) -> bool:
        """The scheduled merge after which ``point`` points are passed is due; False when that is no news."""
        if point <= max(link.point, self._due_point or 0):
            return False
        self._due_point = point
        self._want(now_s)
        return True

    def want_unscheduled(self, now_s: float) -> None:
        """Somebody asks for a merge outside the schedule."""
        self._unscheduled = True
        self._want(now_s)

    def point(self, link: Link) -> int:
        """The point to propose."""
        return max(self._due_point or 0, link.point)

    def called(self, now_s: float) -> None:
        """Some member has begun a merge."""
        if self.began_s is None:
            self.began_s = now_s

    def decided(self, link: Link, now_s: float) -> None:
        """The chain goes on with ``link``; everything about the old one is over."""
        self._met = self._lost_s = None
        self._failures = 0
        self._unscheduled = False
        if self._due_point is not None and self._due_point <= link.point:
            self._due_point = None
        self._wanted_s = math.inf if self._due_point is None else now_s

    def adopted(self) -> None:
        """The anchor has been taken: what began has ended, unless the next merge is wanted already."""
        self.began_s = self._wanted_s if self._wanted_s < math.inf else None

    def _want(self, now_s: float) -> None:
        self._wanted_s = min(self._wanted_s, now_s)
        self.called(now_s)

    # --- attempts ---------------------------------------------------------------------------------------------

    def heard(self, ballot: Ballot, now_s: float) -> None:
        """A sign of life from the proposer of ``ballot``."""
        if self._met is None or ballot >= self._met:
            self._met, self._heard_s, self._lost_s = ballot, now_s, None

    def lost(self, peer: PeerId, now_s: float) -> bool:
        """``peer`` is dead, or its connection broke; whether that matters here."""
        if self._met is None or self._met.proposer != peer or self._lost_s is not None:
            return False
        self._lost_s = now_s
        return True

    def failed(self, ballot: Ballot, outbid: Ballot | None, now_s: float) -> None:
        """This node's own attempt came to nothing, perhaps against a higher ballot."""
        self.heard(outbid or ballot, now_s)
        self._failures += 1
        self._retry_s = now_s + self._pace.retry_s(self._failures) * self._rng.uniform(1.0, 1.5)

    def next_ballot(self, promised: Ballot | None) -> Ballot:
        """A ballot of this node above all it has met or promised, earlier lives included."""
        attempts = [ballot.attempt for ballot in (self._met, promised) if ballot is not None]
        return Ballot(attempt=max(attempts, default=-1) + 1, proposer=self._local)

    def turn_s(self, parent: bytes, alive: Collection[PeerId], model_bytes: int, now_s: float) -> float:
        """When this node proposes, as things stand: infinity when nothing is wanted, in the past when it is late.

        ``alive`` includes this node. A live proposer is given time for a model of ``model_bytes``.
        """
        met = self._met
        if self._wanted_s == math.inf:
            return math.inf
        if met is None and self._unscheduled:
            return self._wanted_s  # Wanted here alone: nobody else would propose it.
        if met is None:
            since_s = self._wanted_s
        elif met.proposer == self._local:
            return self._retry_s
        else:
            if met.proposer not in alive:
                self.lost(PeerId(met.proposer), now_s)
            since_s = (
                self._lost_s
                if self._lost_s is not None
                else self._heard_s + self._pace.patience_s(model_bytes)
            )
        return since_s + turns_before(self._local, ranking(parent, alive), met) * self._limits.merge_turn_s


def turns_before(local: PeerId, ranked: Sequence[PeerId], met: Ballot | None) -> int:
    """How many members of ``ranked`` propose before ``local`` does, counted on from the attempt last met."""
    next_attempt = 0 if met is None else met.attempt + 1
    return (ranked.index(local) - next_attempt) % len(ranked)
