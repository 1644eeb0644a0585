"""One search of the hash table: whom to ask next, and when there is nobody left to ask. No input or output.

Owns the course of an iterative Kademlia lookup: it asks the closest that it knows, who name closer ones, until those
closest to the key have all answered. Believes nobody: a name is somebody to ask, and only who answers counts.

What is named may be made up, always closer and without end. Two things bound that. A lookup asks ASKED_MAX peers at
most. And what a peer names is of its branch, one for each peer that the search began with (where it began with a single
one, for each that this one names). A branch comes after the others once more for each failure in it, and for every
TURN questions: a liar has a share of the questions and never all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gossip.dht_table import BUCKET_MAX, closest, distance, peer_key
from p2p.transport import PeerId, PeerRecord

ALPHA = 3
"""Questions under way at once."""
ASKED_MAX = 64
NAMED_MAX = 512
"""Peers remembered, of whom it asks some."""
TURN = BUCKET_MAX

_State = Literal["named", "asked", "answered", "failed"]


@dataclass(slots=True)
class _Candidate:
    record: PeerRecord
    distance: int
    branch: PeerId
    state: _State = "named"


class Lookup:
    """The search for ``key``, by ``local``, beginning with ``seeds``."""

    def __init__(self, key: bytes, seeds: Iterable[PeerRecord], *, local: PeerId) -> None:
        self._key = key
        self._local = local
        self._candidates: dict[PeerId, _Candidate] = {}
        self._asked: Counter[PeerId] = Counter()
        """Questions by branch."""
        self._failed: Counter[PeerId] = Counter()
        """Those of them that came to nothing."""
        for record in seeds:
            self._add(record, branch=record.peer)
        self._root = next(iter(self._candidates)) if len(self._candidates) == 1 else None

    def next(self) -> PeerRecord | None:
        """Whom to ask now; None while the answers under way must be waited for, and once there is nobody left."""
        under_way = sum(each.state == "asked" for each in self._candidates.values())
        if under_way >= ALPHA or self._asked.total() >= ASKED_MAX:
            return None
        named = [each for each in self._candidates.values() if each.state == "named"]
        answered = self.closest()
        for candidate in sorted(named, key=self._order):
            if len(answered) < BUCKET_MAX or candidate.record in closest(
                [*answered, candidate.record], self._key
            ):
                candidate.state = "asked"
                self._asked[candidate.branch] += 1
                return candidate.record
        return None

    def answered(self, peer: PeerId, named: Iterable[PeerRecord]) -> None:
        """``peer``, who was asked, has answered and named others."""
        candidate = self._candidates[peer]
        candidate.state = "answered"
        for record in list(named)[:BUCKET_MAX]:
            self._add(record, branch=record.peer if peer == self._root else candidate.branch)

    def failed(self, peer: PeerId) -> None:
        """``peer``, who was asked, has not answered, or with something that is no answer."""
        candidate = self._candidates[peer]
        candidate.state = "failed"
        self._failed[candidate.branch] += 1

    def closest(self) -> list[PeerRecord]:
        """Of those that have answered the closest, in order."""
        return closest(
            (each.record for each in self._candidates.values() if each.state == "answered"), self._key
        )

    def _order(self, candidate: _Candidate) -> tuple[int, int]:
        branch = candidate.branch
        return self._failed[branch] + self._asked[branch] // TURN, candidate.distance

    def _add(self, record: PeerRecord, *, branch: PeerId) -> None:
        if record.peer == self._local or record.peer in self._candidates or not record.addresses:
            return
        if len(self._candidates) < NAMED_MAX:
            far = distance(peer_key(record.peer), self._key)
            self._candidates[record.peer] = _Candidate(record, far, branch)
