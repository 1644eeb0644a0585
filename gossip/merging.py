"""Global merges: the shell around the acceptor and the proposer that a node runs.

Owns the trio tasks of a merge: serving MERGE_PROTOCOL, taking turns at proposing, catching up with a chain that
went on without us, and handing each committed record to the host. The rules are in ``merge_record``, the promises
in ``merge_acceptor``, an attempt in ``merge_proposer``, the moving of shards in ``merge_work``. A reader who
follows one merge starts at ``Merger.due``.

What holds: a promise and an acceptance are on disk before anybody hears of them. A member acknowledges a record
only while it holds every result, so whatever is committed can be had from most of the electorate, whoever dies.
Every wait has a deadline; without a quorum nothing is committed, ``problem`` says why, and the node trains on.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from gossip.disk import Disk
from gossip.merge_acceptor import AcceptorState, accept, promise
from gossip.merge_chain import MergeChain, sealed, unsealed
from gossip.merge_pace import MergePace, turns_before
from gossip.merge_proposer import Ask, Concluded, Effect, Failed, Proposal, Recompute, Suspect, Wait
from gossip.merge_record import (
    Link,
    RecordRefused,
    check_committed,
    check_contributions,
    check_record,
    check_rootless,
    outranks,
    ranking,
    record_hash,
    sign_acknowledgement,
    sign_contribution,
)
from gossip.merge_work import InputRefused, MergeHost, MergeWork
from gossip.messages import (
    MERGE_PROTOCOL,
    AcceptedRecord,
    Acknowledgement,
    Ballot,
    CommittedRecord,
    Elsewhere,
    MergeAccept,
    MergeCall,
    MergeCommit,
    MergeOffer,
    MergePlan,
    MergeRequest,
    MergeResults,
    Message,
    Noted,
    Outbid,
    RecordNotHeld,
    SignedContribution,
    WantRecord,
)
from p2p.codec import decode, encode
from p2p.errors import CallRefused, GossamerError, MalformedMessage
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.transport import PeerDown, PeerId, Transport

__all__ = ["InputRefused", "MergeHost", "MergeStatistics", "Merger"]

PROMISE = "merges/promise"
"""The file that holds this node's word on the present link."""
ABSENT_PERIODS = 3.0
"""A proposer leaves a member out of the quorum after this many merge periods without word from it."""
ABSENT_PERIODS_CONFIRMED = 2.0
"""An acceptor agrees from this many on: no two members hear the same word at the same time."""
TICK_S = 0.5
"""How often a node that waits for its turn looks whether the proposer is still alive."""
ADOPT_RETRY_S = 2.0
HEADS_REFUSED_KEPT = 256

MergeReply = (
    MergeOffer | Outbid | Elsewhere | MergeResults | Acknowledgement | Noted | CommittedRecord | RecordNotHeld
)


@dataclasses.dataclass(frozen=True, slots=True)
class MergeStatistics:
    """Counters of one node's part in merges."""

    head: bytes
    height: int
    adopted_height: int
    """Height of the last record whose anchor the host has taken."""
    participants: int
    attempts: int
    commits: int
    """Links this node concluded as their proposer."""
    problem: str


class Merger:
    """One node's part in the global merges of a run.

    ``note(peer, code, what)`` is told of offences; ``reach(peer)`` makes sure of a connection and may raise
    GossamerError.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        signer: Signer,
        run: bytes,
        disk: Disk,
        host: MergeHost,
        fragments: int,
        replicas: int,
        merge_period_s: float,
        limits: Limits,
        rng: random.Random,
        note: Callable[[PeerId, str, str], None],
        reach: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._signer = signer
        self._local = signer.peer
        self._run = run
        self._disk = disk
        self._host = host
        self._fragments = fragments
        self._replicas = replicas
        self._merge_period_s = merge_period_s
        self._limits = limits
        self._rng = rng
        self._note = note
        self._reach = reach

        self._chain = MergeChain(disk, run=run, limits=limits)
        self._work = MergeWork(
            local=self._local, host=host, fragments=fragments, replicas=replicas, limits=limits
        )
        self._pace = MergePace(limits)
        self._changed = _Signal()
        self._promising = trio.Lock()
        self._contributing = trio.Lock()

        self._state = AcceptorState(parent=self._chain.head)
        self._voiceless: bytes | None = None
        """The link on which a damaged promise file keeps this node from voting."""
        self._contributions: dict[bytes, SignedContribution] = {}
        """What this node offered, by parent, since it last adopted an anchor."""
        self._adopted = self._chain.head
        self._adopted_height = 0

        self._due: int | None = None
        self._wanted_now = False
        self._wanted_s = math.inf
        self._began_s: float | None = None
        """When this node first heard of the merge under way."""
        self._seen: Ballot | None = None
        """The highest ballot met on this link, and when its proposer was last heard or found dead."""
        self._seen_s = 0.0
        self._lost_s: float | None = None
        self._failures = 0
        self._retry_s = 0.0
        self._attempt = trio.CancelScope()
        self._hints: dict[PeerId, bytes] = {}
        self._heads_refused: deque[bytes] = deque(maxlen=HEADS_REFUSED_KEPT)

        self._attempts = 0
        self._commits = 0
        self.problem = ""
        """Why the last attempt came to nothing, for people; empty after a commit."""

    # --- what the node sees -----------------------------------------------------------------------------------

    @property
    def head(self) -> bytes:
        """Hash of the newest committed record this node holds; the run's genesis hash before the first."""
        return self._chain.head

    @property
    def head_height(self) -> int:
        """Its height; 0 at genesis."""
        return self._chain.link.height - 1

    @property
    def head_participants(self) -> int:
        """Participants accumulated over its whole branch."""
        return self._chain.link.participants_total

    @property
    def head_record(self) -> CommittedRecord | None:
        """The newest committed record this node holds."""
        return self._chain.head_record

    def statistics(self) -> MergeStatistics:
        """Where the chain stands and what this node has done for it."""
        return MergeStatistics(
            head=self.head,
            height=self.head_height,
            adopted_height=self._adopted_height,
            participants=self.head_participants,
            attempts=self._attempts,
            commits=self._commits,
            problem=self.problem,
        )

    async def wait_committed(self, height: int) -> None:
        """Return once a record of at least ``height`` is committed here and adopted by the host."""
        while self._adopted_height < height:
            await self._changed.wait()

    def due(self, point: int) -> None:
        """The scheduled merge after which ``point`` points are passed is due now. Idempotent."""
        if point > max(self._chain.link.point, self._due or 0):
            self._due = point
            self._want()

    def merge_now(self) -> None:
        """Merge once, outside the schedule."""
        self._wanted_now = True
        self._want()

    def heads_changed(self, peer: PeerId, head: bytes, height: int, participants: int) -> None:
        """``peer`` advertises the end of its chain."""
        if outranks(participants, head, self.head_participants, self.head) and height > 0:
            self._hint(peer, head)

    async def load(self) -> None:
        """Read the chain and this node's promise back from disk. Call before ``run``."""
        await self._chain.load()
        self._adopted, self._adopted_height = self.head, self.head_height
        try:
            state = decode(
                unsealed(await self._disk.read(PROMISE)),
                AcceptorState,
                bytes_max=self._limits.frame_bytes_max,
            )
        except FileNotFoundError:
            return
        except MalformedMessage:
            # Nobody knows what was promised, so nothing may be promised before the next link.
            self._voiceless = self.head
            return
        self._state = state

    async def run(self) -> None:
        """Take part in merges until cancelled."""
        self._started_s = trio.current_time()
        serve_calls(
            self._transport,
            MERGE_PROTOCOL,
            MergeRequest,
            self._answer,
            limits=dataclasses.replace(self._limits, call_timeout_s=self._limits.merge_transfer_timeout_s),
            on_malformed=lambda peer, error: self._note(peer, "malformed", error.what),
        )
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._take_turns)
            self._nursery.start_soon(self._adopt_heads)
            self._nursery.start_soon(self._catch_up)
            self._nursery.start_soon(self._watch_proposer)

    # --- answering --------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: Message) -> MergeReply:
        try:
            match request:
                case MergeCall():
                    return await self._on_call(peer, request)
                case MergePlan():
                    return await self._on_plan(peer, request)
                case MergeAccept():
                    return await self._on_accept(peer, request)
                case MergeCommit():
                    await self._on_commit(peer, request.committed)
                    return Noted()
                case WantRecord():
                    return self._chain.get(request.record) or RecordNotHeld()
        except RecordRefused as refused:
            self._note(peer, refused.code, refused.what)
            raise CallRefused(refused.code, refused.what) from refused
        except GossamerError as error:
            raise CallRefused("failed", error.what) from error
        except OSError as error:
            self.problem = f"merges cannot be written to disk: {error.strerror}"
            raise CallRefused("disk", self.problem) from error
        raise CallRefused("unknown", f"no answer to a {type(request).__name__}")

    async def _on_call(self, peer: PeerId, request: MergeCall) -> MergeOffer | Outbid | Elsewhere:
        link = self._chain.link
        if request.parent != link.parent:
            return self._elsewhere(peer, request.parent)
        _require(peer == request.ballot.proposer, "a call under another peer's ballot")
        _require(request.height == link.height and request.point >= link.point, "a call for another link")
        self._check_absent(link, request.absent)
        self._begin()
        accepted = await self._promise(link, request.ballot)
        if isinstance(accepted, Outbid):
            return accepted
        return MergeOffer(contribution=await self._contribute(link, request.point), accepted=accepted)

    async def _on_plan(self, peer: PeerId, request: MergePlan) -> MergeResults | Outbid | Elsewhere:
        link = self._chain.link
        if request.parent != link.parent:
            return self._elsewhere(peer, request.parent)
        promised = self._acceptor(link).promised
        _require(peer == request.ballot.proposer and promised is not None, "a plan without a promise")
        assert promised is not None
        if request.ballot != promised:
            return Outbid(ballot=promised)
        own = self._contributions.get(link.parent)
        _require(own is not None and own in request.contributors, "a plan without its owner's contribution")
        assert own is not None
        check_contributions(link.run, link.parent, request.contributors, self._fragments, self._signer)
        self._heard(request.ballot)
        return await self._work.sum_owned(request, own)

    async def _on_accept(self, peer: PeerId, request: MergeAccept) -> Acknowledgement | Outbid | Elsewhere:
        link, record = self._chain.link, request.record
        if record.parent != link.parent:
            return self._elsewhere(peer, record.parent)
        _require(peer == request.ballot.proposer, "a record under another peer's ballot")
        _require(record.ballot <= request.ballot, "a record from a later ballot")
        promised = self._acceptor(link).promised
        if promised is not None and request.ballot < promised:
            return Outbid(ballot=promised)
        check_record(record, link, self._fragments, self._signer)
        # A record proposed again was judged by its first acceptors; who was absent then may be back by now.
        if record.ballot == request.ballot:
            self._check_absent(link, record.absent)
            self._check_founders(link, {PeerId(entry.peer) for entry in record.roster})
        self._heard(request.ballot)
        holders = [peer, *map(PeerId, request.holders)]
        await self._work.verify_and_obtain(record, request.disputed, holders, request.timeout_s)
        outbid = await self._accept(link, AcceptedRecord(ballot=request.ballot, record=record))
        return outbid or sign_acknowledgement(self._signer, record, request.ballot)

    async def _on_commit(self, peer: PeerId, committed: CommittedRecord) -> None:
        link = self._chain.link
        if committed.record.parent == link.parent:
            check_committed(committed, link, self._fragments, self._signer)
            await self._extend([committed])
        else:
            self._hint(peer, record_hash(committed.record))

    def _elsewhere(self, peer: PeerId, parent: bytes) -> Elsewhere:
        if self._chain.link_after(parent) is None:
            self._hint(peer, parent)
        return Elsewhere(head=self.head, height=self.head_height, participants=self.head_participants)

    def _check_absent(self, link: Link, absent: list[str]) -> None:
        """Raise CallRefused when a member is to be left out of the quorum that was heard of here."""
        for peer in absent:
            if peer == self._local or not self._is_absent(PeerId(peer), ABSENT_PERIODS_CONFIRMED):
                raise CallRefused("present", f"{peer} has been heard of lately")

    def _is_absent(self, peer: PeerId, periods: float) -> bool:
        # Who has only just started has heard of nobody, which says nothing about them.
        unheard_s = min(self._host.unheard_s(peer), trio.current_time() - self._started_s)
        return unheard_s > periods * self._merge_period_s

    def _check_founders(self, link: Link, founders: set[PeerId]) -> None:
        alive = set(self._host.alive())
        if link.is_genesis and 2 * len(alive & founders) <= len(alive):
            raise CallRefused("minority", "most members alive here would have no voice in the first record")

    # --- promising, contributing, accepting -------------------------------------------------------------------

    def _acceptor(self, link: Link) -> AcceptorState:
        return self._state if self._state.parent == link.parent else AcceptorState(parent=link.parent)

    async def _promise(self, link: Link, ballot: Ballot) -> AcceptedRecord | Outbid | None:
        async with self._promising:
            state, answer = promise(self._acceptor(link), ballot)
            await self._write(link, state)
        self._heard(ballot)
        return answer

    async def _accept(self, link: Link, proposal: AcceptedRecord) -> Outbid | None:
        async with self._promising:
            state, outbid = accept(self._acceptor(link), proposal)
            await self._write(link, state)
        return outbid

    async def _write(self, link: Link, state: AcceptorState) -> None:
        if link.parent == self._voiceless:
            raise CallRefused(
                "voiceless", "this member's promise file is damaged; it votes again on the next link"
            )
        if link.parent != self.head:
            raise CallRefused("decided", "this link has been decided")
        if state != self._state:
            await self._disk.write_atomic(PROMISE, sealed(encode(state)))
            self._state = state

    async def _contribute(self, link: Link, point: int) -> SignedContribution | None:
        async with self._contributing:
            # Before the last anchor is adopted the live weights do not stand on it yet.
            if link.parent not in self._contributions and self._adopted == link.parent == self.head:
                contribution = await self._host.contribute(link.parent, point)
                if contribution is not None:
                    self._contributions[link.parent] = sign_contribution(self._signer, link, contribution)
            return self._contributions.get(link.parent)

    # --- proposing --------------------------------------------------------------------------------------------

    def _want(self) -> None:
        if self._wanted_s == math.inf:
            self._wanted_s = trio.current_time()
        self._begin()
        self._changed.pulse()

    def _begin(self) -> None:
        if self._began_s is None:
            self._began_s = trio.current_time()

    def _heard(self, ballot: Ballot) -> None:
        """A sign of life from the proposer of ``ballot``."""
        if self._seen is None or ballot >= self._seen:
            self._seen, self._seen_s, self._lost_s = ballot, trio.current_time(), None
            self._changed.pulse()

    async def _take_turns(self) -> None:
        while True:
            wait_s = self._turn_s() - trio.current_time()
            if wait_s <= 0:
                await self._propose()
            else:
                with trio.move_on_after(min(wait_s, TICK_S) if wait_s < math.inf else math.inf):
                    await self._changed.wait()

    def _turn_s(self) -> float:
        """When this node proposes, as things stand: infinity when nothing is due, in the past when it is late."""
        if self._wanted_s == math.inf:
            return math.inf
        seen = self._seen
        if seen is not None and seen.proposer == self._local:
            return self._retry_s
        alive = {*self._host.alive(), self._local}
        turns = turns_before(self._local, ranking(self.head, alive), seen)
        if seen is None:
            since_s = self._wanted_s
        else:
            if seen.proposer not in alive and self._lost_s is None:
                self._lost_s = trio.current_time()
            since_s = self._lost_s if self._lost_s is not None else self._seen_s + self._patience_s()
        return since_s + turns * self._limits.merge_turn_s

    def _patience_s(self) -> float:
        own = self._contributions.get(self.head)
        return self._pace.patience_s(sum(ref.size for ref in own.inputs) if own is not None else 0)

    async def _propose(self) -> None:
        """One attempt at the link, under a ballot above all that were met."""
        link = self._chain.link
        met = [ballot.attempt for ballot in (self._seen, self._acceptor(link).promised) if ballot is not None]
        ballot = Ballot(attempt=max(met, default=-1) + 1, proposer=self._local)
        alive = {*self._host.alive(), self._local}
        voters = link.voters(absent=())
        proposal = Proposal(
            link=link,
            ballot=ballot,
            point=max(self._due or 0, link.point),
            alive=alive,
            absent={peer for peer in voters - alive if self._is_absent(peer, ABSENT_PERIODS)},
            fragments=self._fragments,
            replicas=self._replicas,
            pace=self._pace,
            signer=self._signer,
        )
        self._attempts += 1
        outcome: Concluded | Failed | None = None
        # Cancelled when the link is decided by somebody else.
        with trio.CancelScope() as self._attempt:
            outcome = await self._carry_out(proposal)
        match outcome:
            case Concluded():
                self._commits += 1
                await self._extend([outcome.committed])
                contributors = (PeerId(c.peer) for c in outcome.committed.record.contributors)
                for peer in sorted({*proposal.called, *contributors} - {self._local}):
                    self._nursery.start_soon(self._tell, peer, MergeCommit(committed=outcome.committed))
            case Failed():
                self._heard(ballot)
                if outcome.outbid is not None:
                    self._heard(outcome.outbid)
                self._failures += 1
                pause_s = self._pace.retry_s(self._failures) * self._rng.uniform(1.0, 1.5)
                self._retry_s = trio.current_time() + pause_s
                self.problem = f"merge {link.height}: {outcome.why}"

    async def _carry_out(self, proposal: Proposal) -> Concluded | Failed:
        """Do what ``proposal`` says, and tell it what came of it, until it ends."""
        events_in, events = trio.open_memory_channel[Callable[[], list[Effect]]](0)
        async with trio.open_nursery() as nursery:
            effects = proposal.start()
            while True:
                for effect in effects:
                    match effect:
                        case Ask():
                            nursery.start_soon(self._ask, proposal, effect, events_in)
                        case Wait():
                            nursery.start_soon(self._wait, proposal, effect, events_in)
                        case Recompute():
                            nursery.start_soon(self._recompute, proposal, effect, events_in)
                        case Suspect():
                            self._note(effect.peer, effect.code, effect.what)
                        case Concluded() | Failed():
                            nursery.cancel_scope.cancel()
                            return effect
                effects = (await events.receive())()

    async def _ask(
        self, proposal: Proposal, ask: Ask, events: trio.MemorySendChannel[Callable[[], list[Effect]]]
    ) -> None:
        began_s = trio.current_time()
        calling = isinstance(ask.request, MergeCall)
        timeout_s = self._limits.merge_call_timeout_s if calling else self._limits.merge_transfer_timeout_s
        try:
            reply = await self._request(ask.peer, ask.request, timeout_s)
        except GossamerError:
            await events.send(partial(proposal.unanswered, ask.peer, ask.stage))
            return
        if ask.peer != self._local:
            (self._pace.called if calling else self._pace.transferred)(trio.current_time() - began_s)
        if isinstance(reply, Elsewhere):
            self.heads_changed(ask.peer, reply.head, reply.height, reply.participants)
        await events.send(partial(proposal.answered, ask.peer, ask.stage, reply))

    async def _wait(
        self, proposal: Proposal, wait: Wait, events: trio.MemorySendChannel[Callable[[], list[Effect]]]
    ) -> None:
        await trio.sleep(wait.seconds)
        await events.send(partial(proposal.deadline, wait.stage))

    async def _recompute(
        self,
        proposal: Proposal,
        effect: Recompute,
        events: trio.MemorySendChannel[Callable[[], list[Effect]]],
    ) -> None:
        size = sum(ref.size for ref in effect.contributors[0].inputs)
        result = await self._work.recompute(effect.fragment, effect.contributors, self._pace.transfer_s(size))
        await events.send(partial(proposal.recomputed, effect.fragment, result))

    async def _request(self, peer: PeerId, request: Message, timeout_s: float) -> MergeReply:
        """The reply of ``peer``, which may be this node itself. Raises GossamerError."""
        if peer == self._local:
            return await self._answer(peer, request)
        with trio.move_on_after(timeout_s):
            await self._reach(peer)
            return await call(
                self._transport,
                peer,
                MERGE_PROTOCOL,
                request,
                MergeReply,
                timeout_s=timeout_s,
                bytes_max=self._limits.frame_bytes_max,
            )
        raise GossamerError(f"{peer} could not be reached within {timeout_s:g} s")

    async def _tell(self, peer: PeerId, commit: MergeCommit) -> None:
        """Best effort: who misses it hears of the new head through the members' heartbeats."""
        try:
            await self._request(peer, commit, self._limits.call_timeout_s)
        except GossamerError:
            return

    async def _watch_proposer(self) -> None:
        """A proposer whose connection breaks is taken for dead: at worst, two propose at once."""
        async for event in self._transport.peer_events():
            seen = self._seen
            if isinstance(event, PeerDown) and seen is not None and event.peer == seen.proposer:
                self._lost_s = trio.current_time()
                self._changed.pulse()

    # --- the chain --------------------------------------------------------------------------------------------

    async def _extend(self, branch: list[CommittedRecord]) -> None:
        """Take over verified records, oldest first; when they win, everything about the old link is over."""
        before = self.head
        await self._chain.add_branch(branch)
        if self.head == before:
            return
        self._work.forget()
        self._seen = self._lost_s = None
        self._failures, self.problem = 0, ""
        self._wanted_now = False
        if self._due is not None and self._due <= self._chain.link.point:
            self._due = None
        self._wanted_s = trio.current_time() if self._due is not None else math.inf
        self._attempt.cancel()
        self._changed.pulse()

    async def _adopt_heads(self) -> None:
        """Hand each new head to the host, the newest only when several arrive at once."""
        while True:
            committed, name = self._chain.head_record, self.head
            if committed is None or self._adopted == name:
                await self._changed.wait()
                continue
            try:
                await self._adopt(committed, name)
            except (GossamerError, OSError) as error:
                self.problem = f"merge {committed.record.height} is committed but not adopted: {error}"
                with trio.move_on_after(ADOPT_RETRY_S):
                    await self._changed.wait()

    async def _adopt(self, committed: CommittedRecord, name: bytes) -> None:
        record = committed.record
        model_bytes = sum(ref.size for ref in record.results)
        holders = [PeerId(acknowledgement.peer) for acknowledgement in committed.acknowledgements]
        await self._work.obtain(record, [*holders, *self._host.alive()], self._pace.transfer_s(model_bytes))
        own = self._contributions.get(record.parent)
        duration_s = trio.current_time() - self._began_s if self._began_s is not None else 0.0
        await self._host.adopt(
            committed, name, own is not None and own in record.contributors, duration_s=duration_s
        )
        self._adopted, self._adopted_height = name, record.height
        self._contributions.clear()
        self._began_s = self._wanted_s if self._wanted_s < math.inf else None
        self._changed.pulse()

    def _hint(self, peer: PeerId, head: bytes) -> None:
        """``peer`` knows a record that may be, or lead to, a better head."""
        if head in self._heads_refused or peer == self._local:
            return
        if peer in self._hints or len(self._hints) < self._limits.members_max:
            self._hints[peer] = head
            self._changed.pulse()

    async def _catch_up(self) -> None:
        while True:
            if not self._hints:
                await self._changed.wait()
                continue
            peer, head = self._hints.popitem()
            try:
                await self._climb(peer, head)
            except RecordRefused as refused:
                self._heads_refused.append(head)
                self._note(peer, refused.code, refused.what)
            except (GossamerError, OSError):
                continue  # The peer's next heartbeat asks again.

    async def _climb(self, peer: PeerId, head: bytes) -> None:
        """Fetch the branch that ends in ``head`` back to a record held here, verify it, and take it if it wins."""
        branch: list[CommittedRecord] = []
        wanted = head
        while self._chain.link_after(wanted) is None and len(branch) < self._limits.merge_records_kept:
            reply = await self._request(peer, WantRecord(record=wanted), self._limits.call_timeout_s)
            if not isinstance(reply, CommittedRecord):
                break
            if record_hash(reply.record) != wanted:
                raise RecordRefused("hash", "another record than the one asked for")
            branch.insert(0, reply)
            wanted = reply.record.parent
        if not branch:
            return
        link = self._chain.link_after(wanted)
        if link is None:
            newest = branch[-1].record.height
            if self.head_height and newest - self.head_height < self._limits.merge_records_kept:
                raise GossamerError(f"{peer} does not hold the whole of its branch")
            check_rootless(branch[0], self._run, self._fragments, self._signer)
            link = Link.after(branch[0].record)
        else:
            check_committed(branch[0], link, self._fragments, self._signer)
            link = Link.after(branch[0].record)
        for committed in branch[1:]:
            check_committed(committed, link, self._fragments, self._signer)
            link = Link.after(committed.record)
            await trio.lowlevel.checkpoint()
        if outranks(link.participants_total, head, self.head_participants, self.head):
            await self._extend(branch)


class _Signal:
    """Wakes every task that waits now; who comes later waits for the next pulse."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def pulse(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RecordRefused("malformed", what)
