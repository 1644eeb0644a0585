"""The votes for snapshots of records, counted: which snapshots are certified, and which of them are news.

Owns what this node knows of everybody's votes: which snapshot has enough of them, who relies on which, which one two
thirds have gone over to, and which do not come out here. Fetches nothing and works out no state: certificates are
handed in as bytes, and nothing in them is believed that is not signed.

Names cost nothing, so a third of the members that are alive and hold records must have voted for a snapshot or rely on
it: two keys certify nothing in a swarm of more than six. Who knows no such member has to take the votes as they are.
Parts of a swarm that were cut off from each other go over to the snapshot of most records that a third of all stand
for; a smaller part goes over to what two thirds stand for.

Relies on: ``gossip.notices`` for the votes themselves and their signatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

from gossip.ledger import PeerLedger
from gossip.messages import Certificate, RecordSnapshot, ShardRef, SnapshotVote
from gossip.notices import NoticeTable
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.transport import PeerId

OUTVOTED_S = 60.0
"""How long two thirds must have relied on another snapshot than ours before we go over to it although ours is later:
those who are a little behind us are not meant."""
READ_AGAIN_S = 20.0
"""Between two looks at a certificate that is no news, or whose voters are not known: both may change."""
CERTIFICATE_BYTES_MAX = 1 << 20
CANDIDATES_MAX = 64
"""Certified snapshots that are looked at side by side."""
REMEMBERED_MAX = 4096
"""Certificates that need not be read again, and snapshots that need not be worked out again."""


class SnapshotVotes:
    """Everybody's votes in one run, as one node knows them."""

    def __init__(
        self,
        *,
        local: PeerId,
        notices: NoticeTable,
        ledger: PeerLedger,
        learned: Callable[[], Collection[PeerId]],
        votes_needed: int,
    ) -> None:
        """``learned()``: the members that are alive and hold records."""
        self._local = local
        self._notices = notices
        self._ledger = ledger
        self._learned = learned
        self._needed = votes_needed
        self._refused: set[RecordSnapshot] = set()
        """Snapshots that do not come out here."""
        self._candidates: dict[RecordSnapshot, dict[PeerId, bytes]] = {}
        """Certified snapshots that we do not rely on yet, and the votes for them."""
        self._relied_on: dict[ShardRef, RecordSnapshot] = {}
        """What the certificates certify that have been read."""
        self._outvoted: dict[RecordSnapshot, float] = {}
        """Snapshots that two thirds rely on and we do not, and since when."""
        self._read: dict[ShardRef, float] = {}
        """Until when the certificates of others need not be looked at again."""
        self.ours: RecordSnapshot | None = None
        """The one that this node relies on."""

    # --- what members say -------------------------------------------------------------------------------------------

    def told(self) -> list[tuple[SnapshotVote, PeerId]]:
        """The latest vote of every peer that is not banned, our own among them."""
        found = []
        for peer in self._notices.authors():
            vote = self._notices.body_of(peer, "snapshot", SnapshotVote)
            if vote is not None and not self._ledger.banned(peer):
                found.append((vote, peer))
        return found

    @property
    def offered(self) -> bool:
        """Whether members tell of a certified snapshot, or enough of them vote for one."""
        certified = any(vote.certificate is not None for vote, _ in self.told())
        return certified or any(len(voters) >= self._needed for voters in self._voters().values())

    def _voters(self) -> dict[RecordSnapshot, list[PeerId]]:
        voters: dict[RecordSnapshot, list[PeerId]] = {}
        for vote, peer in self.told():
            voters.setdefault(vote.snapshot, []).append(peer)
        return voters

    def to_consider(self) -> Iterator[tuple[RecordSnapshot, PeerId]]:
        """What members voted for that may come out here as well: looked at as they are asked for."""
        members = set(self._learned()) - {self._local}
        for vote, peer in self.told():
            if peer in members and vote.snapshot not in self._refused:
                yield vote.snapshot, peer

    def proposed(self) -> set[RecordSnapshot]:
        """Every snapshot that anybody votes for, but those that do not come out here."""
        return {vote.snapshot for vote, _ in self.told()} - self._refused

    def holders(self, snapshot: RecordSnapshot) -> list[PeerId]:
        """Who may hold it: those who vote for it, and those who began from some snapshot."""
        return [
            peer for vote, peer in self.told() if vote.snapshot == snapshot or vote.certificate is not None
        ]

    # --- counting ---------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Count the votes that stand now."""
        for snapshot, voters in self._voters().items():
            packed = ((peer, self._notices.packed(peer, "snapshot")) for peer in voters)
            self._add(snapshot, {peer: notice for peer, notice in packed if notice is not None})

    def _add(self, snapshot: RecordSnapshot, votes: dict[PeerId, bytes]) -> bool:
        """Returns whether these, with those that are known, are enough."""
        votes = {**self._candidates.get(snapshot, {}), **votes}
        if not self._enough(snapshot, votes):
            return False
        self._candidates[snapshot] = votes
        if len(self._candidates) > CANDIDATES_MAX:
            del self._candidates[min(self._candidates, key=_order)]
        return True

    def _enough(self, snapshot: RecordSnapshot, voters: Collection[PeerId]) -> bool:
        """Whether what these members voted for is to be relied on."""
        voters = {peer for peer in voters if not self._ledger.banned(peer)}
        members = set(self._learned())
        knows_nobody = members <= {self._local}
        standing = members & (voters | self._relying(snapshot))
        return len(voters) >= self._needed and (knows_nobody or 3 * len(standing) >= len(members))

    def _relying(self, snapshot: RecordSnapshot) -> set[PeerId]:
        """Those who say that they rely on it."""
        return {
            peer
            for vote, peer in self.told()
            if vote.certificate is not None and self._relied_on.get(vote.certificate) == snapshot
        }

    def note_majorities(self, now_s: float) -> None:
        """Take notice of what two thirds rely on and we do not."""
        members = set(self._learned())
        found = {
            snapshot
            for snapshot in set(self._relied_on.values()) - {self.ours}
            if 3 * len(members & self._relying(snapshot)) > 2 * len(members)
        }
        self._outvoted = {snapshot: self._outvoted.get(snapshot, now_s) for snapshot in found}

    # --- certificates of others -------------------------------------------------------------------------------------

    def unread(self, now_s: float) -> Iterator[tuple[ShardRef, PeerId]]:
        """The certificates that are to be fetched and read, and from whom.

        They hold votes whose voters have voted for later snapshots since, or are gone.
        """
        for vote, peer in self.told():
            ref = vote.certificate
            if ref is None or ref.size > CERTIFICATE_BYTES_MAX or now_s < self._read.get(ref, 0.0):
                continue
            yield ref, peer

    def read(self, ref: ShardRef, peer: PeerId, data: bytes, now_s: float) -> None:
        """Count the votes of the certificate ``ref``, whose bytes are ``data``; ``peer`` answers for it."""
        if len(self._read) >= REMEMBERED_MAX:
            self._read.clear()
            self._relied_on.clear()
        self._read[ref] = math.inf
        try:
            certificate = decode(data, Certificate, bytes_max=CERTIFICATE_BYTES_MAX)
        except MalformedMessage as error:
            self._ledger.note(peer, "malformed", error.what)
            return
        found = self._certified_by(certificate)
        if found is None:
            self._ledger.note(peer, "false-snapshot", "a certificate that certifies nothing")
            return
        self._relied_on[ref] = found[0]
        if not self.is_news(found[0], now_s):
            self._read[ref] = now_s + READ_AGAIN_S
        elif not self._add(*found):
            self._read[ref] = now_s + READ_AGAIN_S
            self._ledger.note(peer, "unvouched", "a snapshot for which too few have voted that we know")

    def _certified_by(self, certificate: Certificate) -> tuple[RecordSnapshot, dict[PeerId, bytes]] | None:
        """The snapshot that enough different members have voted for, and their votes."""
        votes: dict[PeerId, bytes] = {}
        snapshots = set()
        for packed in certificate.votes:
            vote = self._notices.verified(packed, SnapshotVote)
            if vote is None:
                return None
            votes[vote[0]] = packed
            snapshots.add(vote[1].snapshot)
        if len(snapshots) != 1 or len(votes) < self._needed:
            return None
        return snapshots.pop(), votes

    # --- what is certified ------------------------------------------------------------------------------------------

    def is_news(self, snapshot: RecordSnapshot, now_s: float) -> bool:
        """Whether we should go over to ``snapshot`` once it is certified."""
        if snapshot in self._refused:
            return False
        if self.ours is None or _order(snapshot) > _order(self.ours):
            return True
        return now_s - self._outvoted.get(snapshot, math.inf) > OUTVOTED_S

    def best(self, now_s: float) -> tuple[RecordSnapshot, dict[PeerId, bytes]] | None:
        """The certified snapshot to go over to, and the votes for it; what is no news is let go of."""
        self._candidates = {
            snapshot: votes for snapshot, votes in self._candidates.items() if self.is_news(snapshot, now_s)
        }
        if not self._candidates:
            return None
        return max(self._candidates.items(), key=lambda item: _order(item[0]))

    def refuse(self, snapshot: RecordSnapshot) -> None:
        """Never again consider what does not come out here, or is no snapshot."""
        if len(self._refused) >= REMEMBERED_MAX:
            self._refused.clear()
        self._refused.add(snapshot)


def _order(snapshot: RecordSnapshot) -> tuple[int, bytes]:
    """Of two certified snapshots the greater one is relied on, by everybody."""
    return snapshot.records, encode(snapshot)
