"""The rules of the merge chain as pure functions: hashes, electorates, owners, weights, what makes a record valid.

Owns every rule that all members must compute alike; nothing here knows time, network or disk. A chain starts at
the run's genesis hash; each link is a MergeRecord that names the one before it. A link is decided like a value of
single-decree Paxos (Lamport, "Paxos Made Simple", 2001, section 2.2) among the link's *electorate*: the roster of
the record before, without members that have been unheard for long. At genesis nobody has named a roster, so the
first record names its own; its acceptors check that it covers most of the members they believe alive. So does a record
after one whose whole roster has been unheard for long: a swarm outlives those who merged last.

Electorates of one link may differ, so more than one record can be decided on it. Either quorums of both need not meet:
a long partition. Or the earlier one was *given up*: the proposer of the later one, and whoever first accepted that in
place of the earlier, had not heard for long of so many of the earlier one's electorate that the rest is no quorum of
it. If the missing had decided it after all, they are on a branch of their own, as after a partition. Either way
``outranks`` says which branch goes on when they meet.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from blake3 import blake3

from gossip.merge_shape import MergeShape
from gossip.messages import (
    Acknowledgement,
    AcknowledgementClaim,
    Ballot,
    CommittedRecord,
    Contribution,
    ContributionClaim,
    MergeRecord,
    RosterEntry,
    ShardRef,
    SignedContribution,
)
from p2p.codec import encode
from p2p.errors import GossamerError
from p2p.identity import Signer
from p2p.transport import PeerId

ROSTER_MEMORY = 3
"""A member whose last contribution is more than this many heights ago has no voice any more."""
CONTRIBUTION_PURPOSE = "gossamer/contribution/1"
ACKNOWLEDGEMENT_PURPOSE = "gossamer/merge-acknowledgement/1"


class RecordRefused(GossamerError):
    """A record, contribution or certificate breaks a rule; ``code`` is the reason the peer ledger counts."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


def genesis_hash(run: bytes) -> bytes:
    """The parent of a run's first record: BLAKE3("gossamer/genesis/1" || 0x00 || run id)."""
    return blake3(b"gossamer/genesis/1\x00" + run).digest()


def record_hash(record: MergeRecord) -> bytes:
    """The name of a record: BLAKE3 over its canonical bytes."""
    return blake3(encode(record)).digest()


@dataclass(frozen=True, slots=True)
class Link:
    """The next link of a chain: what its record must build on."""

    run: bytes
    parent: bytes
    height: int
    """Height of the record that will fill this link; the first is 1."""
    point: int
    """The parent's point, which the next record's may not fall below."""
    roster: tuple[RosterEntry, ...]
    """Empty at genesis."""
    participants_total: int
    results: tuple[ShardRef, ...] = ()
    """The parent's; empty at genesis."""

    @classmethod
    def genesis(cls, run: bytes) -> Link:
        """The first link of ``run``."""
        return cls(run, genesis_hash(run), 1, 0, (), 0)

    @classmethod
    def after(cls, record: MergeRecord) -> Link:
        """The link that follows ``record``."""
        return cls(
            record.run,
            record_hash(record),
            record.height + 1,
            record.point,
            tuple(record.roster),
            record.participants_total,
            tuple(record.results),
        )

    @property
    def is_genesis(self) -> bool:
        """Whether no record has been committed before this link."""
        return self.height == 1

    def voters(self, absent: Collection[str]) -> frozenset[PeerId]:
        """The electorate once ``absent`` members do not count; empty where a record has to name its own."""
        return frozenset(PeerId(entry.peer) for entry in self.roster if entry.peer not in absent)


def electorate(record: MergeRecord, link: Link) -> frozenset[PeerId]:
    """Whose acknowledgements decide about ``record``."""
    named = (PeerId(entry.peer) for entry in record.roster)
    return link.voters(record.absent) or frozenset(named).difference(map(PeerId, record.absent))


def quorum(members: Collection[PeerId]) -> int:
    """The smallest number of ``members`` that is more than half of them."""
    return len(members) // 2 + 1


def can_decide(members: frozenset[PeerId], gone: Collection[PeerId]) -> bool:
    """Whether ``members`` can still decide about a record once ``gone`` have no voice any more."""
    return len(members.difference(gone)) >= quorum(members)


def next_roster(
    link: Link, contributors: Collection[str], founders: Collection[str] = (), absent: Collection[str] = ()
) -> list[RosterEntry]:
    """The roster that a record on ``link`` leaves to the next: who contributed lately.

    ``founders`` are the members alive where nobody else has a voice, at genesis or because all who had one are
    ``absent``: each has one from then on, contributor or not. Other rosters are a function of the parent's roster and
    the contributors alone.
    """
    last_height = {} if link.voters(absent) else dict.fromkeys(founders, link.height - 1)
    last_height |= {entry.peer: entry.last_height for entry in link.roster}
    last_height |= dict.fromkeys(contributors, link.height)
    return [
        RosterEntry(peer=peer, last_height=height)
        for peer, height in sorted(last_height.items())
        if link.height - height <= ROSTER_MEMORY
    ]


def ranking(parent: bytes, members: Collection[PeerId]) -> list[PeerId]:
    """``members`` in the order in which they propose: by BLAKE3(parent || peer), lowest first."""
    return sorted(members, key=lambda peer: blake3(parent + peer.encode()).digest())


def owners(parent: bytes, contributors: Sequence[str], pieces: int, replicas: int) -> list[list[PeerId]]:
    """For each piece, the contributors that sum it: of those that own the fewest so far, the highest in its ranking.

    The ranking is BLAKE3(parent || piece || peer), as in rendezvous hashing. The load comes first because the merge
    is as slow as its busiest owner: no two contributors differ by more than one piece.
    """
    copies = min(replicas, len(contributors))
    load: Counter[str] = Counter()
    chosen = []
    for piece in range(pieces):
        salt = parent + piece.to_bytes(4, "big")
        ranked = sorted(contributors, key=lambda peer: blake3(salt + peer.encode()).digest(), reverse=True)
        ranked.sort(key=lambda peer: load[peer])
        chosen.append([PeerId(peer) for peer in ranked[:copies]])
        load.update(ranked[:copies])
    return chosen


def capped_weights(weights: Sequence[int]) -> list[int]:
    """Self-declared weights, none above twice their median, so that no member can claim most of the average."""
    ordered = sorted(weights)
    # The two middle elements (one, counted twice, for odd numbers): their sum is twice the median, exactly.
    cap = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
    return [min(weight, cap) for weight in weights]


def outranks(participants: int, head: bytes, over_participants: int, over_head: bytes) -> bool:
    """Whether the branch ending in ``head`` wins: more accumulated participants, then the lower hash.

    A record always outranks its ancestors, so the best of all records known is always the head to follow.
    """
    if participants != over_participants:
        return participants > over_participants
    return head < over_head


def sign_contribution(signer: Signer, link: Link, contribution: Contribution) -> SignedContribution:
    """``contribution`` with its author's signature, good for ``link`` alone."""
    return SignedContribution(
        peer=contribution.peer,
        weight=contribution.weight,
        moved=contribution.moved,
        inputs=contribution.inputs,
        signature=signer.sign(CONTRIBUTION_PURPOSE, _contribution_claim(link.run, link.parent, contribution)),
    )


def sign_acknowledgement(signer: Signer, record: MergeRecord, ballot: Ballot) -> Acknowledgement:
    """This member's acknowledgement of ``record`` under ``ballot``."""
    claim = _acknowledgement_claim(record.run, record_hash(record), ballot)
    return Acknowledgement(peer=signer.peer, signature=signer.sign(ACKNOWLEDGEMENT_PURPOSE, claim))


def check_contributions(
    run: bytes,
    parent: bytes,
    contributions: Sequence[SignedContribution],
    moved: Sequence[int],
    shape: MergeShape,
    signer: Signer,
) -> None:
    """Raise RecordRefused unless each contribution is its author's, for this link, these pieces of this model, and all
    are in order.
    """
    expected = shape.input_sizes(moved, first=parent == genesis_hash(run))
    _check_ascending([contribution.peer for contribution in contributions], "contributors")
    for contribution in contributions:
        require(
            contribution.moved == list(moved) and [ref.size for ref in contribution.inputs] == expected,
            "shape",
            "a contribution of another shape than the model's",
        )
        claim = _contribution_claim(run, parent, contribution)
        genuine = signer.verify(
            PeerId(contribution.peer), CONTRIBUTION_PURPOSE, claim, contribution.signature
        )
        require(genuine, "signature", f"a contribution that {contribution.peer} did not sign")


def check_record(record: MergeRecord, link: Link, shape: MergeShape, signer: Signer) -> None:
    """Raise RecordRefused unless ``record`` follows every rule that can be checked from ``link`` alone."""
    require(record.run == link.run, "wrong-run", "a record of another run")
    require(record.parent == link.parent, "malformed", "a record with another parent")
    require(record.height == link.height, "malformed", "a record at the wrong height")
    require(record.point >= link.point, "malformed", "a record that goes back to an earlier merge point")
    moved = shape.moved(link.point, record.point, first=link.is_genesis)
    require(
        record.moved == list(moved),
        "malformed",
        "a record that moves other pieces than those whose turn it is",
    )
    _check_results(record, shape)
    still = set(range(len(link.results))).difference(moved)
    kept = all(record.results[piece] == link.results[piece] for piece in still)
    require(kept, "malformed", "a record that changes pieces which it does not average")
    contributors = [contribution.peer for contribution in record.contributors]
    total = link.participants_total + len(contributors)
    require(record.participants_total == total, "malformed", "a record that miscounts its participants")
    _check_ascending(record.absent, "absent members")
    roster = {entry.peer for entry in link.roster}
    require(roster.issuperset(record.absent), "malformed", "an absent member that has no voice anyway")
    require(not set(contributors) & set(record.absent), "malformed", "an absent member that contributes")
    founders = [entry.peer for entry in record.roster]
    require(
        record.roster == next_roster(link, contributors, founders, record.absent),
        "malformed",
        "a record with a wrong roster",
    )
    check_contributions(record.run, record.parent, record.contributors, record.moved, shape, signer)


def check_committed(committed: CommittedRecord, link: Link, shape: MergeShape, signer: Signer) -> None:
    """Raise RecordRefused unless ``committed`` proves that a quorum decided ``link`` for its record."""
    check_record(committed.record, link, shape, signer)
    members = electorate(committed.record, link)
    acknowledged = {PeerId(acknowledgement.peer) for acknowledgement in committed.acknowledgements}
    require(acknowledged <= members, "malformed", "an acknowledgement by a member without a voice")
    require(len(acknowledged) >= quorum(members), "malformed", "fewer acknowledgements than a quorum")
    _check_acknowledgements(committed, signer)


def check_rootless(committed: CommittedRecord, run: bytes, shape: MergeShape, signer: Signer) -> None:
    """Raise RecordRefused unless ``committed``, whose parent is out of reach, is at least consistent in itself.

    All a newcomer can check of the oldest record that anyone still keeps: signatures, order and counts. That
    its signers were a quorum rests on the peers it was fetched from.
    """
    record = committed.record
    require(record.height > 1, "malformed", "a first record that does not start at genesis")
    require(record.run == run, "wrong-run", "a record of another run")
    _check_results(record, shape)
    _check_ascending([entry.peer for entry in record.roster], "roster")
    check_contributions(record.run, record.parent, record.contributors, record.moved, shape, signer)
    _check_acknowledgements(committed, signer)


def check_acknowledgement(
    acknowledgement: Acknowledgement, run: bytes, record: bytes, ballot: Ballot, signer: Signer
) -> None:
    """Raise RecordRefused unless ``acknowledgement`` is its peer's, for the record of that hash under ``ballot``."""
    claim = _acknowledgement_claim(run, record, ballot)
    genuine = signer.verify(
        PeerId(acknowledgement.peer), ACKNOWLEDGEMENT_PURPOSE, claim, acknowledgement.signature
    )
    require(genuine, "signature", f"an acknowledgement that {acknowledgement.peer} did not sign")


def _check_acknowledgements(committed: CommittedRecord, signer: Signer) -> None:
    record = committed.record
    require(committed.ballot >= record.ballot, "malformed", "a record acknowledged before it was proposed")
    _check_ascending(
        [acknowledgement.peer for acknowledgement in committed.acknowledgements], "acknowledgements"
    )
    name = record_hash(record)
    for acknowledgement in committed.acknowledgements:
        check_acknowledgement(acknowledgement, record.run, name, committed.ballot, signer)


def _contribution_claim(run: bytes, parent: bytes, contribution: Contribution) -> bytes:
    bare = Contribution(
        peer=contribution.peer,
        weight=contribution.weight,
        moved=contribution.moved,
        inputs=contribution.inputs,
    )
    return encode(ContributionClaim(run=run, parent=parent, contribution=bare))


def _acknowledgement_claim(run: bytes, record: bytes, ballot: Ballot) -> bytes:
    return encode(AcknowledgementClaim(run=run, record=record, ballot=ballot))


def _check_results(record: MergeRecord, shape: MergeShape) -> None:
    """Of the pieces that are moved: what the others are is a matter between this record and its parent."""
    first, moved = record.height == 1, record.moved
    in_order = moved == sorted(set(moved)) and moved[-1] < shape.pieces == len(record.results)
    require(in_order, "malformed", "pieces that the model has not, or out of order")
    updates = [size for piece in moved if (size := shape.update_size(piece, first=first)) is not None]
    fits = [record.results[p].size for p in moved] == [shape.result_size(p, first=first) for p in moved]
    fits &= [ref.size for ref in record.updates] == updates
    require(fits, "shape", "a record of another shape than the model's")


def _check_ascending(peers: Sequence[str], what: str) -> None:
    ascending = all(left < right for left, right in itertools.pairwise(peers))
    require(ascending, "malformed", f"{what} not sorted, or named twice")


def require(holds: bool, code: str, what: str) -> None:
    """Raise RecordRefused unless ``holds``."""
    if not holds:
        raise RecordRefused(code, what)
