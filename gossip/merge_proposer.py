"""One attempt at a link, as its proposer sees it: call, plan, accept, conclude. IO-free.

Owns the order of the phases, when each is over, and what is proposed. Every method is an event and returns effects
for the shell in ``gossip.merging`` to carry out: messages to send (the proposer itself included), deadlines, sums
to recompute, and the end. Replies and deadlines of phases that are over are recognised by their stage and ignored.

* *Calling*: promises and contributions are collected from everybody alive. With promises of a quorum, a record
  that some member has already accepted is proposed again (the one of the highest ballot); without one, plan. A
  record of which too many deciders have been unheard for long counts as none: see ``_is_given_up``.
* *Planning*: the owners sum. Whoever does not answer or whose inputs do not arrive is left out, and the smaller
  list is planned anew, until every piece has a result under one list. The list only ever shrinks. The results are
  looked at before they are proposed, and the others bring them home meanwhile.
* *Accepting*: the record is decided once a quorum has acknowledged it under this ballot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

from gossip.merge_effects import Ask, Concluded, Effect, Failed, Inspect, Recompute, Suspect, Wait
from gossip.merge_pace import MergePace
from gossip.merge_record import (
    Link,
    RecordRefused,
    can_decide,
    check_acknowledgement,
    check_contributions,
    check_record,
    electorate,
    next_roster,
    quorum,
    record_hash,
    require,
)
from gossip.merge_shape import MergeShape
from gossip.merge_sums import Sums
from gossip.messages import (
    AcceptedRecord,
    Acknowledgement,
    Ballot,
    CommittedRecord,
    MergeAccept,
    MergeCall,
    MergeOffer,
    MergeOutlook,
    MergePlan,
    MergeRecord,
    MergeResults,
    Outbid,
    PieceResult,
    SignedContribution,
)
from p2p.identity import Signer
from p2p.transport import PeerId

HOLDERS_MAX = 16
"""Known holders of the results that a MergeAccept names."""
OWNER_MARGIN = 0.8
"""Owners get this part of the proposer's own wait, so that they report what is missing before it is over."""

Phase = Literal["calling", "planning", "accepting", "over"]


class Proposal:
    """One ballot of one proposer for one link.

    ``unheard(members)`` tells who of ``members`` has been unheard for so long that nobody waits for them any more.
    """

    def __init__(
        self,
        *,
        link: Link,
        ballot: Ballot,
        point: int,
        alive: Collection[PeerId],
        absent: Collection[PeerId],
        unheard: Callable[[Collection[PeerId]], Collection[PeerId]],
        shape: MergeShape,
        replicas: int,
        pace: MergePace,
        signer: Signer,
    ) -> None:
        self.link = link
        """What the record of this attempt would fill."""
        self._ballot = ballot
        self._point = point
        self._alive = frozenset(alive)
        self._absent = sorted(absent)
        self._unheard = unheard
        self._shape = shape
        self._moved = shape.moved(link.point, point, first=link.is_genesis)
        self._replicas = replicas
        self._pace = pace
        self._signer = signer

        self._phase: Phase = "calling"
        self._stage = 0
        self._awaited: set[PeerId] = set()
        """Whose reply the present phase waits for."""
        self._voters = link.voters(self._absent) or self._alive
        self.called = self._alive | self._voters
        """Everybody this attempt concerns: the members alive and the electorate."""
        self._outbid: Ballot | None = None

        self._promised: set[PeerId] = set()
        self._offers: dict[PeerId, SignedContribution] = {}
        self._accepted: dict[PeerId, AcceptedRecord] = {}

        self._sums: Sums | None = None
        """Of the present plan."""
        self._inspected: MergeRecord | None = None
        """The record whose results are being looked at."""
        self._record: MergeRecord | None = None
        self._record_hash = b""
        self._acknowledgements: dict[PeerId, Acknowledgement] = {}

    # --- events -----------------------------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """Call everybody."""
        call = MergeCall(
            parent=self.link.parent,
            height=self.link.height,
            point=self._point,
            ballot=self._ballot,
            absent=list(self._absent),
        )
        # Members believed dead may still vote, but nobody waits for them once there is a quorum without.
        self._awaited = set(self.called)
        return [*self._ask(sorted(self.called), call), Wait(self._stage, self._pace.call_s())]

    def answered(self, peer: PeerId, stage: int, reply: object) -> list[Effect]:
        """``peer`` answered what it was asked in ``stage``."""
        if stage != self._stage or peer not in self._awaited:
            return []
        self._awaited.discard(peer)
        try:
            match self._phase, reply:
                case "calling", MergeOffer():
                    self._take_offer(peer, reply)
                case "planning", MergeResults() if self._sums is not None:
                    self._sums.take(peer, reply)
                case "accepting", Acknowledgement():
                    self._take_acknowledgement(peer, reply)
                case _, Outbid():
                    self._outbid = max(reply.ballot, self._outbid or reply.ballot)
        except RecordRefused as refused:
            return [Suspect(peer, refused.code, refused.what), *self._move_on()]
        return self._move_on()

    def unanswered(self, peer: PeerId, stage: int) -> list[Effect]:
        """``peer`` will not answer what it was asked in ``stage``: it declined, or the call broke."""
        if stage != self._stage or peer not in self._awaited:
            return []
        self._awaited.discard(peer)
        return self._move_on()

    def deadline(self, stage: int) -> list[Effect]:
        """The wait of ``stage`` is over; who has not answered is not waited for any more."""
        if stage != self._stage:
            return []
        if self._awaited & self._alive:
            self._pace.missed()
        self._awaited.clear()
        return self._move_on()

    def recomputed(self, piece: int, result: PieceResult | None) -> list[Effect]:
        """What this member computed for a disputed piece; None when it could not."""
        sums = self._sums
        if self._phase != "planning" or sums is None or piece not in sums.disputed():
            return []
        if result is None:
            return self._fail(f"owners disagree about piece {piece} and it could not be recomputed here")
        if not sums.settle(piece, result):
            return []
        wrong: list[Effect] = [
            Suspect(owner, "equivocation", f"a wrong sum for piece {piece}") for owner, piece in sums.wrong()
        ]
        return [*wrong, *self._propose_sums(sums)]

    def inspected(self, record: MergeRecord, faults: Mapping[int, str | None]) -> list[Effect]:
        """What is wrong with the results of ``record``: a code for each piece, None where it could not be had.

        Owners of such pieces are left out of the next plan; those who gave what must not be used are to blame.
        """
        sums = self._sums
        if record is not self._inspected or sums is None:
            return []
        self._inspected = None
        if not faults:
            return self._propose(record, holders=[])
        dropped: set[PeerId] = set()
        blamed: list[Effect] = []
        for piece, code in sorted(faults.items()):
            givers = sums.givers(piece)
            dropped.update(givers)
            if code is not None:
                blamed += [Suspect(peer, code, f"a sum of piece {piece}") for peer in givers]
        return [*blamed, *self._plan(sums.without(dropped))]

    # --- calling ----------------------------------------------------------------------------------------------

    def _take_offer(self, peer: PeerId, offer: MergeOffer) -> None:
        if offer.contribution is not None:
            require(offer.contribution.peer == peer, "malformed", "a contribution in another peer's name")
            check_contributions(
                self.link.run, self.link.parent, [offer.contribution], self._moved, self._shape, self._signer
            )
        if offer.accepted is not None:
            require(offer.accepted.ballot < self._ballot, "malformed", "a record accepted in the future")
            check_record(offer.accepted.record, self.link, self._shape, self._signer)
            self._accepted[peer] = offer.accepted
        if offer.contribution is not None and peer not in self._absent:
            self._offers[peer] = offer.contribution
        self._promised.add(peer)

    def _end_call(self) -> list[Effect]:
        standing = [a for a in self._accepted.values() if not self._is_given_up(a.record)]
        if standing:
            newest = max(standing, key=lambda accepted: accepted.ballot)
            # Who decides about that record may be others than those this attempt counts; unless a quorum of them has
            # promised too, they may have decided for another one under a ballot in between.
            members = electorate(newest.record, self.link)
            promised, needed = len(self._promised & members), quorum(members)
            if promised < needed:
                return self._fail(
                    f"{promised} of the {needed} promises needed for a record that was accepted before"
                )
            holders = [peer for peer, accepted in self._accepted.items() if accepted.record == newest.record]
            return self._propose(newest.record, holders=sorted(holders)[:HOLDERS_MAX])
        return self._plan([self._offers[peer] for peer in sorted(self._offers)])

    def _is_given_up(self, record: MergeRecord) -> bool:
        """Whether ``record`` cannot be decided any more: a quorum of its electorate will not come together again.

        Its electorate is fixed, so proposing it again would hold the survivors up for ever. Only who has no voice in
        this attempt counts as gone. If the gone have decided it before they went, they are on another branch, as
        after a long partition, and the branch rule joins the two.
        """
        members = electorate(record, self.link)
        return not can_decide(members, self._unheard(members - self._voters))

    # --- planning ---------------------------------------------------------------------------------------------

    def _plan(self, contributors: list[SignedContribution]) -> list[Effect]:
        if not contributors:
            return self._fail("nobody's weights could be had")
        self._phase = "planning"
        self._stage += 1
        self._sums = Sums(
            contributors,
            link=self.link,
            moved=self._moved,
            shape=self._shape,
            replicas=self._replicas,
        )
        self._awaited = self._sums.owners()
        wait_s = self._pace.transfer_s(
            max(sum(ref.size for ref in contribution.inputs) for contribution in contributors)
        )
        plan = MergePlan(
            parent=self.link.parent,
            ballot=self._ballot,
            contributors=contributors,
            timeout_s=OWNER_MARGIN * wait_s,
        )
        return [*self._ask(sorted(self._awaited), plan), Wait(self._stage, wait_s)]

    def _end_plan(self, sums: Sums) -> list[Effect]:
        if not sums.complete():
            return self._plan(sums.reliable())
        disputed = sums.disputed()
        if disputed:
            self._stage += 1
            return [Recompute(piece, tuple(sums.contributors)) for piece in disputed]
        return self._propose_sums(sums)

    def _propose_sums(self, sums: Sums) -> list[Effect]:
        names = [contribution.peer for contribution in sums.contributors]
        sums_made = sums.results()
        results = dict(enumerate(self.link.results)) | {result.piece: result.shard for result in sums_made}
        record = MergeRecord(
            run=self.link.run,
            parent=self.link.parent,
            height=self.link.height,
            point=self._point,
            ballot=self._ballot,
            contributors=sums.contributors,
            results=[results[piece] for piece in sorted(results)],
            moved=list(self._moved),
            updates=[result.update for result in sums_made if result.update is not None],
            roster=next_roster(self.link, names, self._alive, self._absent),
            absent=list(self._absent),
            participants_total=self.link.participants_total + len(names),
        )
        self._stage += 1
        self._inspected = record
        # While the proposer looks at the results the others bring them home too, or everybody would wait for its own
        # transfer after this one.
        outlook = MergeOutlook(
            ballot=self._ballot, record=record, timeout_s=OWNER_MARGIN * self._wait_for_results_s(record)
        )
        others = self._asked_to_accept(record) - {self._signer.peer}
        return [*self._ask(sorted(others), outlook), Inspect(record)]

    # --- accepting --------------------------------------------------------------------------------------------

    def _propose(self, record: MergeRecord, holders: Sequence[PeerId]) -> list[Effect]:
        self._phase = "accepting"
        self._stage += 1
        self._record, self._record_hash = record, record_hash(record)
        self._voters = electorate(record, self.link)
        self._awaited = set(self._voters)
        wait_s = self._wait_for_results_s(record)
        accept = MergeAccept(
            ballot=self._ballot,
            record=record,
            holders=list(holders),
            disputed=self._sums.disputed() if self._sums is not None else [],
            timeout_s=OWNER_MARGIN * wait_s,
        )
        return [*self._ask(sorted(self._asked_to_accept(record)), accept), Wait(self._stage, wait_s)]

    def _asked_to_accept(self, record: MergeRecord) -> frozenset[PeerId]:
        return electorate(record, self.link) | {PeerId(c.peer) for c in record.contributors}

    def _wait_for_results_s(self, record: MergeRecord) -> float:
        return self._pace.transfer_s(sum(ref.size for ref in record.updates or record.results))

    def _take_acknowledgement(self, peer: PeerId, acknowledgement: Acknowledgement) -> None:
        require(acknowledgement.peer == peer, "malformed", "an acknowledgement in another peer's name")
        check_acknowledgement(acknowledgement, self.link.run, self._record_hash, self._ballot, self._signer)
        self._acknowledgements[peer] = acknowledgement

    def _conclude(self) -> list[Effect]:
        assert self._record is not None
        self._phase = "over"
        acknowledgements = [self._acknowledgements[peer] for peer in sorted(self._acknowledgements)]
        return [
            Concluded(
                CommittedRecord(record=self._record, ballot=self._ballot, acknowledgements=acknowledgements)
            )
        ]

    # --- all phases -------------------------------------------------------------------------------------------

    def _ask(
        self, peers: Iterable[PeerId], request: MergeCall | MergePlan | MergeOutlook | MergeAccept
    ) -> list[Effect]:
        return [Ask(peer, request, self._stage) for peer in peers]

    def _move_on(self) -> list[Effect]:
        match self._phase:
            case "calling":
                return self._call_progress()
            case "planning" if self._sums is not None and not self._awaited:
                return self._end_plan(self._sums)
            case "accepting":
                return self._accept_progress()
            case _:
                return []

    def _call_progress(self) -> list[Effect]:
        promised, needed = len(self._promised & self._voters), quorum(self._voters)
        if promised >= needed and not self._awaited & self._alive:
            return self._end_call()
        if promised + len(self._awaited & self._voters) < needed:
            return self._fail(
                f"{promised} of the {needed} promises needed, {len(self._voters)} members count"
            )
        return []

    def _accept_progress(self) -> list[Effect]:
        acknowledged, needed = len(self._acknowledgements), quorum(self._voters)
        if acknowledged >= needed:
            return self._conclude()
        if acknowledged + len(self._awaited) < needed:
            return self._fail(f"{acknowledged} of the {needed} acknowledgements needed")
        return []

    def _fail(self, why: str) -> list[Effect]:
        self._phase = "over"
        self._stage += 1
        return [Failed(why, self._outbid)]
