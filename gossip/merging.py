"""Global merges: the shell around the protocol's machines that a node runs. Start reading at ``Merger.due``.

Owns the trio tasks of a merge: serving MERGE_PROTOCOL, taking turns at proposing, and handing each committed record
to the host. Decides nothing itself: the rules are in ``merge_record``, the timing in ``merge_turns``, an attempt in
``merge_proposer``, the other side of it in ``merge_member``, the moving of shards in ``merge_work``.

Every wait has a deadline. Without a quorum nothing is committed, ``problem`` says why, and the node trains on.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from gossip.disk import Disk
from gossip.merge_catch_up import MergeCatchUp
from gossip.merge_chain import MergeChain
from gossip.merge_effects import Ask, Concluded, Effect, Failed, Inspect, Recompute, Suspect, Wait
from gossip.merge_member import MergeMember
from gossip.merge_pace import MergePace
from gossip.merge_proposer import Proposal
from gossip.merge_record import outranks
from gossip.merge_shape import MergeShape
from gossip.merge_turns import MergeTurns
from gossip.merge_work import InputRefused, MergeHost, MergeWork, ResultRefused
from gossip.messages import (
    MERGE_PROTOCOL,
    Ballot,
    CommittedRecord,
    Elsewhere,
    MergeAccept,
    MergeCall,
    MergeCommit,
    MergePlan,
    MergeReply,
    MergeRequest,
    Message,
    ShardRef,
)
from gossip.progress import Progress
from p2p.errors import GossamerError
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.transport import PeerDown, PeerId, Transport

__all__ = ["InputRefused", "MergeHost", "MergeStatistics", "Merger"]

TICK_S = 0.5
"""How often a node that waits for its turn looks whether the proposer is still alive."""
ADOPT_RETRY_S = 2.0

Events = trio.MemorySendChannel[Callable[[], list[Effect]]]


@dataclasses.dataclass(frozen=True, slots=True)
class MergeStatistics:
    """Where the chain stands here, and counters of this node's part in it."""

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
        shape: MergeShape,
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
        self._host = host
        self._shape = shape
        self._replicas = replicas
        self._limits = limits
        self._note = note
        self._reach = reach

        self._pace = MergePace(limits)
        self._turns = MergeTurns(local=self._local, pace=self._pace, limits=limits, rng=rng)
        self._chain = MergeChain(disk, run=run, limits=limits)
        self._catch_up = MergeCatchUp(
            chain=self._chain,
            run=run,
            shape=shape,
            signer=signer,
            limits=limits,
            ask=partial(self._request, timeout_s=limits.call_timeout_s),
            extend=self._extend,
            note=note,
        )
        self._work = MergeWork(local=self._local, host=host, replicas=replicas, limits=limits)
        self._member = MergeMember(
            chain=self._chain,
            work=self._work,
            host=host,
            signer=signer,
            disk=disk,
            shape=shape,
            merge_period_s=merge_period_s,
            limits=limits,
            heard=self._heard,
            hint=self._catch_up.hint,
            extend=self._extend,
            note=note,
        )
        self._changed = Progress()
        self._attempt = trio.CancelScope()
        """The attempt under way, cancelled when the link is decided by somebody else."""
        self._adopted = self._chain.head
        self._adopted_height = 0
        self.obtaining: list[ShardRef] = []
        """What a committed merge consists of that this node is bringing here in order to take it over."""
        self._attempts = 0
        self._commits = 0
        self._problem = ""

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

    @property
    def under_way(self) -> bool:
        """Whether this node has contributed to a merge that is not decided, or has not taken over one that is."""
        return bool(self._member.contributions(self.head)) or self._adopted != self.head

    @property
    def problem(self) -> str:
        """What stands in the way of the present merge, for people; empty when nothing does."""
        return self._member.problem or self._problem

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
        if self._turns.due(point, self._chain.link, trio.current_time()):
            self._changed.made()

    def merge_now(self) -> None:
        """Merge once, outside the schedule."""
        self._turns.want_unscheduled(trio.current_time())
        self._changed.made()

    def heads_changed(self, peer: PeerId, head: bytes, height: int, participants: int) -> None:
        """``peer`` advertises the end of its chain."""
        if height > 0 and outranks(participants, head, self.head_participants, self.head):
            self._catch_up.hint(peer, head)

    async def load(self) -> None:
        """Read the chain and this node's promise back from disk. Call before ``run``."""
        await self._chain.load()
        await self._member.load()
        self._adopted, self._adopted_height = self.head, self.head_height

    async def run(self) -> None:
        """Take part in merges until cancelled."""
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
            self._nursery.start_soon(self._catch_up.run)
            self._nursery.start_soon(self._watch_proposer)

    async def _answer(self, peer: PeerId, request: Message) -> MergeReply:
        began_s = trio.current_time()
        reply = await self._member.answer(peer, request)
        self._observe(request, began_s)
        return reply

    def _observe(self, request: Message, began_s: float) -> None:
        """Learn how long such requests take; a member that never proposed knows it from its own answers."""
        duration_s = trio.current_time() - began_s
        match request:
            case MergeCall():
                self._pace.called(duration_s)
            case MergePlan() | MergeAccept():
                self._pace.transferred(duration_s)

    # --- proposing --------------------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        while True:
            own = self._member.contributions(self.head)
            model_bytes = sum(ref.size for ref in own[-1].inputs) if own else 0
            now_s = trio.current_time()
            wait_s = self._turns.turn_s(self.head, self._alive(), model_bytes, now_s) - now_s
            if wait_s <= 0:
                await self._propose()
            else:
                with trio.move_on_after(min(wait_s, TICK_S) if wait_s < math.inf else math.inf):
                    await self._changed.wait()

    async def _propose(self) -> None:
        """One attempt at the link, under a ballot above all that were met."""
        link = self._chain.link
        ballot = self._turns.next_ballot(self._member.promised)
        alive = self._alive()
        proposal = Proposal(
            link=link,
            ballot=ballot,
            point=self._turns.point(link),
            alive=alive,
            absent=self._member.absent(link.voters(absent=()) - alive),
            unheard=self._member.absent,
            shape=self._shape,
            replicas=self._replicas,
            pace=self._pace,
            signer=self._signer,
        )
        self._attempts += 1
        outcome: Concluded | Failed | None = None
        with trio.CancelScope() as self._attempt:
            outcome = await self._carry_out(proposal)
        match outcome:
            case Concluded():
                await self._conclude(outcome.committed, proposal.called)
            case Failed():
                self._turns.failed(ballot, outcome.outbid, trio.current_time())
                self._problem = f"merge {link.height}: {outcome.why}"

    async def _conclude(self, committed: CommittedRecord, called: frozenset[PeerId]) -> None:
        """Tell everybody, and take the record over."""
        self._commits += 1
        contributors = {PeerId(contribution.peer) for contribution in committed.record.contributors}
        for peer in sorted((called | contributors) - {self._local}):
            self._nursery.start_soon(self._tell, peer, MergeCommit(committed=committed))
        try:
            await self._extend([committed])
        except OSError as error:
            # The others have it; here it will be fetched again for as long as the disk refuses it.
            self._turns.failed(committed.ballot, None, trio.current_time())
            self._problem = f"merge {committed.record.height} cannot be written to disk: {error.strerror}"

    def _alive(self) -> frozenset[PeerId]:
        return frozenset(self._host.alive()) | {self._local}

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
                        case Inspect():
                            nursery.start_soon(self._inspect, proposal, effect, events_in)
                        case Suspect():
                            self._note(effect.peer, effect.code, effect.what)
                        case Concluded() | Failed():
                            nursery.cancel_scope.cancel()
                            return effect
                effects = (await events.receive())()

    async def _ask(self, proposal: Proposal, ask: Ask, events: Events) -> None:
        began_s = trio.current_time()
        calling = isinstance(ask.request, MergeCall)
        timeout_s = self._limits.merge_call_timeout_s if calling else self._limits.merge_transfer_timeout_s
        try:
            reply = await self._request(ask.peer, ask.request, timeout_s)
        except GossamerError:
            await events.send(partial(proposal.unanswered, ask.peer, ask.stage))
            return
        self._observe(ask.request, began_s)
        if isinstance(reply, Elsewhere):
            self.heads_changed(ask.peer, reply.head, reply.height, reply.participants)
        await events.send(partial(proposal.answered, ask.peer, ask.stage, reply))

    async def _wait(self, proposal: Proposal, wait: Wait, events: Events) -> None:
        await trio.sleep(wait.seconds)
        await events.send(partial(proposal.deadline, wait.stage))

    async def _recompute(
        self,
        proposal: Proposal,
        effect: Recompute,
        events: Events,
    ) -> None:
        size = sum(ref.size for ref in effect.contributors[0].inputs)
        parent = proposal.link.parent
        timeout_s = self._pace.transfer_s(size)
        result = await self._work.recompute(parent, effect.piece, effect.contributors, timeout_s)
        await events.send(partial(proposal.recomputed, effect.piece, result))

    async def _inspect(self, proposal: Proposal, effect: Inspect, events: Events) -> None:
        size = sum(ref.size for ref in effect.record.updates or effect.record.results)
        faults = await self._work.inspect(effect.record, self._pace.transfer_s(size))
        codes = {
            piece: error.code if isinstance(error, ResultRefused) else None for piece, error in faults.items()
        }
        await events.send(partial(proposal.inspected, effect.record, codes))

    async def _request(self, peer: PeerId, request: Message, timeout_s: float) -> MergeReply:
        """The reply of ``peer``, which may be this node itself. Raises GossamerError."""
        if peer == self._local:
            return await self._member.answer(peer, request)
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

    def _heard(self, ballot: Ballot) -> None:
        now_s = trio.current_time()
        self._turns.heard(ballot, now_s)
        self._turns.called(now_s)
        self._changed.made()

    async def _watch_proposer(self) -> None:
        """A proposer whose connection breaks is taken for dead: at worst, two propose at once."""
        async for event in self._transport.peer_events():
            if (
                isinstance(event, PeerDown)
                and event.broken
                and self._turns.lost(event.peer, trio.current_time())
            ):
                self._changed.made()

    # --- the chain --------------------------------------------------------------------------------------------

    async def _extend(self, branch: list[CommittedRecord]) -> None:
        """Take over verified records, oldest first; when they win, everything about the old link is over."""
        before = self.head
        await self._chain.add_branch(branch)
        if self.head == before:
            return
        self._work.forget()
        self._turns.decided(self._chain.link, trio.current_time())
        self._problem = self._member.problem = ""
        self._attempt.cancel()
        self._changed.made()

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
                self._problem = f"merge {committed.record.height} is committed but not adopted: {error}"
                with trio.move_on_after(ADOPT_RETRY_S):
                    await self._changed.wait()

    async def _adopt(self, committed: CommittedRecord, name: bytes) -> None:
        record = committed.record
        holders = [PeerId(acknowledgement.peer) for acknowledgement in committed.acknowledgements]
        # Nobody waits for this, and it may be a whole model over a slow line: a holder that stalls is noticed anyway.
        patience_s = self._limits.merge_transfer_timeout_s
        self.obtaining = self._work.to_obtain(record)
        try:
            await self._work.obtain(record, [*holders, *self._host.alive()], patience_s)
        finally:
            self.obtaining = []
        contributed = any(own in record.contributors for own in self._member.contributions(record.parent))
        began_s = self._turns.began_s
        duration_s = trio.current_time() - began_s if began_s is not None else 0.0
        await self._host.adopt(committed, name, contributed, duration_s=duration_s)
        self._adopted, self._adopted_height = name, record.height
        self._member.adopted(name)
        self._turns.adopted()
        self._problem = ""
        self._changed.made()
