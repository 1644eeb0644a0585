"""A member's side of a merge: it promises, contributes, sums, accepts, and tells what it holds.

Owns this node's word on the present link (``merges/promise``, sealed) and what it has contributed to it. Every
request is checked here before anything is done about it. A promise and an acceptance are on disk before anybody
hears of them; a record is accepted only while all its results are held, so that whatever a quorum decides can be
had from most of the electorate, whoever dies. Who is absent, and with that whether a record may be given up, each
member judges by what it heard itself, whatever a proposer says.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection

import trio

from gossip.disk import Disk
from gossip.merge_acceptor import AcceptorState, accept, promise
from gossip.merge_chain import MergeChain, sealed, unsealed
from gossip.merge_record import (
    Link,
    RecordRefused,
    can_decide,
    check_committed,
    check_contributions,
    check_record,
    electorate,
    record_hash,
    require,
    sign_acknowledgement,
    sign_contribution,
)
from gossip.merge_shape import MergeShape
from gossip.merge_work import MergeHost, MergeWork
from gossip.messages import (
    AcceptedRecord,
    Acknowledgement,
    Ballot,
    CommittedRecord,
    Elsewhere,
    MergeAccept,
    MergeCall,
    MergeCommit,
    MergeOffer,
    MergeOutlook,
    MergePlan,
    MergeRecord,
    MergeReply,
    MergeResults,
    Message,
    Noted,
    Outbid,
    RecordNotHeld,
    SignedContribution,
    WantRecord,
)
from gossip.progress import Progress
from p2p.codec import decode, encode
from p2p.errors import CallRefused, GossamerError, MalformedMessage
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId

PROMISE = "merges/promise"
ABSENT_PERIODS = 3.0
"""A proposer leaves a member out of the quorum after this many merge periods without word from it, and gives up a
record that cannot be decided without such members."""
ADOPTED_WAIT_S = 1.0
"""How long a call for a contribution waits for the anchor to be taken that it builds on: merges may follow closely."""
ABSENT_PERIODS_CONFIRMED = 2.0
"""An acceptor agrees from this many on: no two members hear the same word at the same time."""


class MergeMember:
    """Answers every request on MERGE_PROTOCOL, this node's own included.

    ``heard(ballot)`` is told of signs of life from a proposer, ``hint(peer, head)`` of records that are not here,
    ``extend(records)`` of verified records, ``note(peer, code, what)`` of offences.
    """

    def __init__(
        self,
        *,
        chain: MergeChain,
        work: MergeWork,
        host: MergeHost,
        signer: Signer,
        disk: Disk,
        shape: MergeShape,
        merge_period_s: float,
        limits: Limits,
        heard: Callable[[Ballot], None],
        hint: Callable[[PeerId, bytes], None],
        extend: Callable[[list[CommittedRecord]], Awaitable[None]],
        note: Callable[[PeerId, str, str], None],
    ) -> None:
        self._chain = chain
        self._work = work
        self._host = host
        self._signer = signer
        self._local = signer.peer
        self._disk = disk
        self._shape = shape
        self._merge_period_s = merge_period_s
        self._limits = limits
        self._heard = heard
        self._hint = hint
        self._extend = extend
        self._note = note

        self._state = AcceptorState(parent=chain.head)
        self._promising = trio.Lock()
        self._voiceless: set[bytes] = set()
        """Links on which damaged files keep this node from voting: it may have voted, and does not know how."""
        self._contributing = trio.Lock()
        self._contributions: dict[bytes, dict[tuple[int, ...], SignedContribution]] = {}
        """What this node offered, by parent and by the pieces that were to move, since it last adopted an anchor."""
        self._adopted = chain.head
        self._adoption = Progress()
        self._started_s = math.inf
        self.problem = ""
        """What keeps this node from voting or contributing, for people; whoever extends the chain clears it."""

    async def load(self) -> None:
        """Read this node's promise back, once the chain is loaded."""
        self._started_s = trio.current_time()
        self._adopted = self._chain.head
        try:
            data = unsealed(await self._disk.read(PROMISE))
            self._state = decode(data, AcceptorState, bytes_max=self._limits.frame_bytes_max)
        except FileNotFoundError:
            return
        except MalformedMessage:
            # Nobody knows what was promised, so nothing may be promised before the next link.
            self._voiceless = {self._chain.head} | self._chain.lost
            return
        if self._state.parent in self._chain.lost:
            # The promise is for a link beyond the records that are left, and took the place of those for links before.
            self._voiceless = ({self._chain.head} | self._chain.lost) - {self._state.parent}
        if (accepted := self._acceptor(self._chain.link).accepted) is not None:
            self._host.hold(accepted.record)

    @property
    def promised(self) -> Ballot | None:
        """The highest ballot promised on the present link."""
        return self._acceptor(self._chain.link).promised

    def contributions(self, parent: bytes) -> list[SignedContribution]:
        """What this node has offered to the link after ``parent``, and still remembers."""
        return list(self._contributions.get(parent, {}).values())

    def adopted(self, head: bytes) -> None:
        """The live weights stand on the anchor of ``head`` now."""
        self._adopted = head
        self._contributions.clear()
        self._adoption.made()

    def absent(self, members: Collection[PeerId], periods: float = ABSENT_PERIODS) -> set[PeerId]:
        """Who of ``members`` has been unheard for ``periods`` merge periods."""
        # Who has only just started has heard of nobody, which says nothing about them.
        up_s = trio.current_time() - self._started_s
        silence_s = periods * self._merge_period_s
        return {
            peer
            for peer in members
            if peer != self._local and min(self._host.unheard_s(peer), up_s) > silence_s
        }

    async def answer(self, peer: PeerId, request: Message) -> MergeReply:
        """The reply to ``request``. Raises CallRefused."""
        try:
            match request:
                case MergeCall():
                    return await self._on_call(peer, request)
                case MergePlan():
                    return await self._on_plan(peer, request)
                case MergeOutlook():
                    return await self._on_outlook(peer, request)
                case MergeAccept():
                    return await self._on_accept(peer, request)
                case MergeCommit():
                    await self._on_commit(peer, request.committed)
                    return Noted()
                case WantRecord():
                    return self._chain.get(request.record) or RecordNotHeld()
        except RecordRefused as refused:
            if peer != self._local:
                self._note(peer, refused.code, refused.what)
            raise CallRefused(refused.code, refused.what) from refused
        except CallRefused:
            raise
        except GossamerError as error:
            raise CallRefused("failed", error.what) from error
        except OSError as error:
            self.problem = f"this node cannot vote: its promise was not written to disk ({error.strerror})"
            raise CallRefused("disk", self.problem) from error
        raise CallRefused("unknown", f"no answer to a {type(request).__name__}")

    # --- requests ---------------------------------------------------------------------------------------------

    async def _on_call(self, peer: PeerId, request: MergeCall) -> MergeOffer | Outbid | Elsewhere:
        link = self._chain.link
        if request.parent != link.parent:
            return self._elsewhere(peer, request.parent)
        require(peer == request.ballot.proposer, "malformed", "a call under another peer's ballot")
        require(
            request.height == link.height and request.point >= link.point,
            "malformed",
            "a call for another link",
        )
        self._check_absent(request.absent)
        async with self._promising:
            state, answer = promise(self._acceptor(link), request.ballot)
            await self._write(link, state)
        self._heard(request.ballot)
        if isinstance(answer, Outbid):
            return answer
        return MergeOffer(contribution=await self._contribute(link, request.point), accepted=answer)

    async def _on_plan(self, peer: PeerId, request: MergePlan) -> MergeResults | Outbid | Elsewhere:
        link = self._chain.link
        if request.parent != link.parent:
            return self._elsewhere(peer, request.parent)
        promised = self._acceptor(link).promised
        if promised is not None and request.ballot < promised:
            return Outbid(ballot=promised)
        require(
            peer == request.ballot.proposer and request.ballot == promised,
            "malformed",
            "a plan without a promise",
        )
        own = next((c for c in self.contributions(link.parent) if c in request.contributors), None)
        if own is None:
            raise CallRefused("not-planned", "the plan does not contain what this owner offered")
        check_contributions(link.run, link.parent, request.contributors, own.moved, self._shape, self._signer)
        self._heard(request.ballot)
        return await self._work.sum_owned(request)

    async def _on_outlook(self, peer: PeerId, request: MergeOutlook) -> Noted | Outbid | Elsewhere:
        link, record = self._chain.link, request.record
        if record.parent != link.parent:
            return self._elsewhere(peer, record.parent)
        promised = self._acceptor(link).promised
        if promised is not None and request.ballot < promised:
            return Outbid(ballot=promised)
        require(
            peer == request.ballot.proposer and request.ballot == record.ballot,
            "malformed",
            "an outlook under another ballot",
        )
        if request.ballot != promised:
            # A proposer cannot know whose promise did not reach its disk.
            raise CallRefused("not-promised", "nothing was promised to this ballot here")
        check_record(record, link, self._shape, self._signer)
        await self._work.foresee(record, request.timeout_s)
        return Noted()

    async def _on_accept(self, peer: PeerId, request: MergeAccept) -> Acknowledgement | Outbid | Elsewhere:
        link, record = self._chain.link, request.record
        if record.parent != link.parent:
            return self._elsewhere(peer, record.parent)
        require(peer == request.ballot.proposer, "malformed", "a record under another peer's ballot")
        require(record.ballot <= request.ballot, "malformed", "a record from a later ballot")
        promised = self._acceptor(link).promised
        if promised is not None and request.ballot < promised:
            return Outbid(ballot=promised)
        check_record(record, link, self._shape, self._signer)
        # A record proposed again was judged by its first acceptors; who was absent then may be back by now.
        if record.ballot == request.ballot:
            self._check_absent(record.absent)
            self._check_founders(link, record)
            self._check_given_up(link, record)
        self._heard(request.ballot)
        holders = [peer, *map(PeerId, request.holders)]
        await self._work.verify_and_obtain(record, request.disputed, holders, request.timeout_s)
        # Whoever has accepted a record may be the last that holds its results when it has to be proposed again.
        await self._host.secure(record)
        async with self._promising:
            proposal = AcceptedRecord(ballot=request.ballot, record=record)
            state, outbid = accept(self._acceptor(link), proposal)
            await self._write(link, state)
        return outbid or sign_acknowledgement(self._signer, record, request.ballot)

    async def _on_commit(self, peer: PeerId, committed: CommittedRecord) -> None:
        link = self._chain.link
        if committed.record.parent == link.parent:
            check_committed(committed, link, self._shape, self._signer)
            await self._extend([committed])
        else:
            self._hint(peer, record_hash(committed.record))

    def _elsewhere(self, peer: PeerId, parent: bytes) -> Elsewhere:
        self._hint(peer, parent)
        link = self._chain.link
        return Elsewhere(head=link.parent, height=link.height - 1, participants=link.participants_total)

    def _check_absent(self, absent: list[str]) -> None:
        """Raise CallRefused when a member is to be left out of the quorum that was heard of here lately."""
        present = {PeerId(peer) for peer in absent} - self.absent(
            [PeerId(peer) for peer in absent], ABSENT_PERIODS_CONFIRMED
        )
        if present:
            raise CallRefused("present", f"{min(present)} has been heard of lately")

    def _check_founders(self, link: Link, record: MergeRecord) -> None:
        alive = set(self._host.alive())
        if not link.voters(record.absent) and 2 * len(alive & electorate(record, link)) <= len(alive):
            raise CallRefused(
                "minority", "most members alive here would have no voice in a record that names who has"
            )

    def _check_given_up(self, link: Link, record: MergeRecord) -> None:
        """Raise CallRefused when a new record is to replace the one accepted here, which can still be decided.

        A proposer that has not heard of the accepted record makes a new one too. Refusing that one costs at most
        another attempt: whoever has accepted it reports it, and proposed again it is not judged any more.
        """
        accepted = self._acceptor(link).accepted
        if accepted is None or accepted.record == record:
            return
        deciders = electorate(accepted.record, link)
        gone = self.absent(deciders - electorate(record, link), ABSENT_PERIODS_CONFIRMED)
        if can_decide(deciders, gone):
            raise CallRefused("decidable", "the record that was accepted here can still be decided")

    # --- this node's word -------------------------------------------------------------------------------------

    def _acceptor(self, link: Link) -> AcceptorState:
        return self._state if self._state.parent == link.parent else AcceptorState(parent=link.parent)

    async def _write(self, link: Link, state: AcceptorState) -> None:
        """Make ``state`` durable, while ``_promising`` is held."""
        if link.parent != self._chain.head:
            raise CallRefused("decided", "this link has been decided")
        if link.parent in self._voiceless:
            self.problem = "this node cannot vote on this merge: a file with what it promised was damaged"
            raise CallRefused("voiceless", self.problem)
        if state != self._state:
            await self._disk.write_atomic(PROMISE, sealed(encode(state)))
            self._state = state
        self.problem = ""

    async def _contribute(self, link: Link, point: int) -> SignedContribution | None:
        async with self._contributing:
            # Before the last anchor is adopted the live weights do not stand on it yet.
            with trio.move_on_after(ADOPTED_WAIT_S):
                while self._adopted != self._chain.head:
                    await self._adoption.wait()
            offered = self._contributions.get(link.parent, {})
            moved = self._shape.moved(link.point, point, first=link.is_genesis)
            if moved not in offered and self._adopted == link.parent == self._chain.head:
                try:
                    contribution = await self._host.contribute(link.parent, moved)
                except (GossamerError, OSError) as error:
                    self.problem = f"this node votes but contributes nothing: {error}"
                    return None
                if contribution is not None:
                    offered[moved] = sign_contribution(self._signer, link, contribution)
                    self._contributions[link.parent] = offered
            return offered.get(moved)
