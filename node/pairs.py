"""Symmetric exchanges for NoLoCo: two members meet, and both step or neither does, as far as a network allows.

Owns this node's outer step of ``training.outer_steps.pair_step``: where it began, its momentum, and the one meeting
that may be under way. A meeting is an offer that is accepted, the pulling of what the other brought, and a receipt each
way; who holds both the other's bytes and the other's receipt steps. A receipt that is lost leaves one side without its
step: that side counts it. Training goes on meanwhile, ``live <- live + (next start - own end)``.

When everybody's step ends at one time, all would ask and find all others asking. So a coin decides who asks and who
waits to be asked for a while.

Relies on: ``node.exchange`` for whom this node may meet; merges to call ``void_mixes`` when they move the weights.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import torch
import trio

from gossip.ledger import PeerLedger
from gossip.messages import (
    PAIR_PROTOCOL,
    PairAccept,
    PairBusy,
    PairClaim,
    PairOffer,
    PairReceipt,
    PairReply,
    PairRequest,
    ShardRef,
)
from gossip.shard_transfer import ShardFetcher
from gossip.store import ShardStore
from node.compute import Compute
from node.costs import Costs
from node.partners import Partners
from node.rounds import Exchange
from node.status import MixReport
from p2p.codec import encode
from p2p.errors import CallRefused, GossamerError, MalformedMessage
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, Transport
from training.codecs.codec import Codec
from training.learner import Learner
from training.mixing import Refused, check_peer_values, decoded
from training.outer_steps import Side, pair_step
from training.schedules import Schedule
from training.spec_sections import PairsSpec

log = structlog.get_logger()

PURPOSE = "gossamer/pair-receipt/1"
MEETING_S_MAX = 30.0
"""A meeting that is not over by then is given up."""
ASKED_WAIT_S = 2.0
"""How long a node that waits to be asked does so before it asks itself."""
ASKED_MAX = 8
"""Members asked for one meeting."""
RECEIPTS_MAX = 3
"""Times that a receipt is sent which nobody answers."""


@dataclass(slots=True, eq=False)
class _Meeting:
    """One meeting, from the offer on."""

    peer: PeerId
    own: Side
    brought: ShardRef
    theirs: ShardRef
    epoch: int
    step: int
    """At which this node brought its weights."""
    ended: trio.Event = field(default_factory=trio.Event)
    pulled: trio.Event = field(default_factory=trio.Event)
    side: Side | None = None
    """What the other brought, once it is here and checked."""


class PairExchanger:
    """Carries out one meeting at a time for ``node.gossip_node``."""

    def __init__(
        self,
        *,
        spec: PairsSpec,
        codec: Codec,
        every_steps: int,
        schedule: Schedule,
        run: bytes,
        signer: Signer,
        transport: Transport,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        partners: Partners,
        may_mix_with: Callable[[PeerId], bool],
        is_elder: Callable[[PeerId], bool],
        pacer: Pacer | None,
    ) -> None:
        self._spec = spec
        self._codec = codec
        self._every_steps = every_steps
        self._schedule = schedule
        self._run = run
        self._signer = signer
        self._transport = transport
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._store = store
        self._fetcher = fetcher
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._partners = partners
        self._may_mix_with = may_mix_with
        self._is_elder = is_elder
        self._pacer = pacer
        self._begin_anew()
        self._epoch = 0
        self._asking = False
        self._meeting: _Meeting | None = None
        self._met = trio.Event()
        self._answered: tuple[PairClaim, PairReceipt] | None = None
        """The last receipt given, should it have to be given again."""
        self._serial = 0
        self.mixes = 0
        self.mixes_failed = 0
        self.one_sided = 0
        """Meetings after which the other may have stepped and this node has not."""
        self.last_mix: MixReport | None = None

    def serve(self, nursery: trio.Nursery) -> None:
        """Start answering; to be called once, when the weights are those that this life begins with."""
        self._nursery = nursery
        self._begin_anew()
        serve_calls(
            self._transport,
            PAIR_PROTOCOL,
            PairRequest,
            self._answer,
            limits=dataclasses.replace(self._limits, call_timeout_s=MEETING_S_MAX),
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )

    def void_mixes(self) -> None:
        """Have a meeting under way come to nothing: the weights it began with were contributed to a merge, or re-based.

        To be called in the ``train`` lane.
        """
        self._epoch += 1
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._start, self._start_step = self._trainer.read(), self._trainer.step
        self._momentum = torch.zeros_like(self._start)

    # --- asking ---------------------------------------------------------------------------------------------------

    async def exchange(self, due: Exchange) -> None:
        """Meet one member, whoever asks; failures are counted, logged, never raised."""
        if self._rng.random() >= self._schedule.at(due.step / self._trainer.spec.train.steps).probability:
            return
        if self._meeting is None and self._rng.random() < 0.5:
            with trio.move_on_after(ASKED_WAIT_S):
                await self._met.wait()
        if self._meeting is not None:
            return await self._meeting.ended.wait()
        if not self._ready():
            return  # Somebody asked, and it is over.
        self._asking = True
        try:
            if not await self._ask():
                self.mixes_failed += 1
        except (GossamerError, OSError) as error:
            self.mixes_failed += 1
            log.info("no meeting", reason=str(error))
        finally:
            self._asking = False

    async def _ask(self) -> bool:
        """Whether this node has stepped."""
        epoch, step = self._epoch, self._trainer.step
        own = await self._take_side()
        owner, brought = await self._bring(own)
        try:
            for peer in self._partners.choose(ASKED_MAX):
                theirs = await self._offer(peer, brought)
                if theirs is not None:
                    meeting = _Meeting(peer, own, brought, theirs, epoch, step)
                    with trio.move_on_after(MEETING_S_MAX):
                        return await self._settle(meeting)
                    return False
        finally:
            await self._store.release(owner)
        return False

    async def _offer(self, peer: PeerId, brought: ShardRef) -> ShardRef | None:
        """What ``peer`` brings; None when it will not meet now."""
        try:
            await self._fetcher.reach(peer)
            reply = await self._call(peer, PairOffer(shard=brought))
        except GossamerError as error:
            log.info("no meeting", peer=peer, reason=error.what)
            return None
        return reply.shard if isinstance(reply, PairAccept) else None

    async def _settle(self, meeting: _Meeting) -> bool:
        """Pull what the other brought, say so, and step once it says the same; whether it came to that."""
        await self._pull(meeting)
        if meeting.side is None:
            return False
        receipt = self._receipt(meeting)
        for _ in range(RECEIPTS_MAX):
            try:
                reply = await self._call(meeting.peer, receipt)
            except CallRefused:
                return False
            except GossamerError:
                continue
            if isinstance(reply, PairReceipt) and self._genuine(reply, meeting):
                return await self._step(meeting)
            self._ledger.note(meeting.peer, "malformed", "a receipt for something else")
            return False
        self.one_sided += 1
        return False

    async def _call(self, peer: PeerId, request: PairOffer | PairReceipt) -> PairReply:
        return await call(
            self._transport, peer, PAIR_PROTOCOL, request, PairReply, timeout_s=MEETING_S_MAX / RECEIPTS_MAX
        )

    # --- being asked ----------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: PairOffer | PairReceipt) -> PairReply:
        if isinstance(request, PairOffer):
            return await self._on_offer(peer, request)
        return await self._on_receipt(peer, request)

    async def _on_offer(self, peer: PeerId, offer: PairOffer) -> PairAccept | PairBusy:
        if self._ledger.shuns(peer):
            raise CallRefused("banned", "this node does not serve you for now")
        if offer.shard.size != self._codec.size_bytes(2 * len(self._start)):
            self._ledger.note(peer, "shape", f"an offer of {offer.shard.size} bytes")
            raise CallRefused("shape", "the offer is of another model")
        busy = self._asking or self._meeting is not None or not self._ready()
        if busy or not self._may_mix_with(peer):
            return PairBusy()
        # Taken before the first await, so that of two who ask at once one is told.
        nothing_yet = Side(self._start, self._start)
        meeting = _Meeting(peer, nothing_yet, offer.shard, offer.shard, self._epoch, self._trainer.step)
        self._meeting = meeting
        self._met.set()
        self._met = trio.Event()
        try:
            meeting.own = await self._take_side()
            owner, meeting.brought = await self._bring(meeting.own)
        except (GossamerError, OSError) as error:
            self._end(meeting)
            raise CallRefused("full", str(error)) from error
        self._nursery.start_soon(self._attend, meeting, owner)
        return PairAccept(shard=meeting.brought)

    async def _attend(self, meeting: _Meeting, owner: str) -> None:
        """Pull what the other brought, and give the meeting up in the end."""
        with trio.move_on_after(MEETING_S_MAX):
            await self._pull(meeting)
            await meeting.ended.wait()
        meeting.pulled.set()
        if self._meeting is meeting:
            self.mixes_failed += 1
            self._end(meeting)
        await self._store.release(owner)

    async def _on_receipt(self, peer: PeerId, receipt: PairReceipt) -> PairReceipt:
        if self._answered is not None and self._answered[0] == receipt.claim:
            return self._answered[1]
        meeting = self._meeting
        if meeting is None or meeting.peer != peer or not self._genuine(receipt, meeting):
            raise CallRefused("no-meeting", "there is no such meeting, or not any more")
        await meeting.pulled.wait()
        if meeting.side is None or not await self._step(meeting):
            self._end(meeting)
            raise CallRefused("void", "what was brought could not be used here")
        reply = self._receipt(meeting)
        self._answered = receipt.claim, reply
        self._end(meeting)
        return reply

    def _end(self, meeting: _Meeting) -> None:
        if self._meeting is meeting:
            self._meeting = None
        meeting.ended.set()

    # --- both -----------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether enough has been learned since the last meeting: half of what is between two, so that who is asked
        early has something to bring."""
        return 2 * (self._trainer.step - self._start_step) >= self._every_steps

    async def _take_side(self) -> Side:
        start = self._start
        end = await self._compute.run(self._trainer.read, lane="side", cost_s=self._costs.copy_s)
        return Side(start, end)

    async def _bring(self, own: Side) -> tuple[str, ShardRef]:
        """Store ``own`` for the other: under what it is pinned, and its name."""
        data = await self._compute.run(
            lambda: self._codec.encode(torch.cat([own.start, own.end])),
            lane="side",
            cost_s=self._costs.copy_s,
        )
        self._serial += 1
        owner = f"pair/{self._serial}"
        return owner, await self._store.put(data, owner=owner, volatile=True)

    async def _pull(self, meeting: _Meeting) -> None:
        """Have what the other brought checked and at hand, unless it cannot be had or used."""
        try:
            data = await self._fetcher.fetch(
                meeting.theirs, [meeting.peer], timeout_s=MEETING_S_MAX, pacer=self._pacer
            )
        except MalformedMessage as error:
            self._ledger.note(meeting.peer, "malformed", error.what)
            return meeting.pulled.set()
        except GossamerError as error:
            log.info("pull failed", peer=meeting.peer, reason=error.what)
            return meeting.pulled.set()
        side = await self._compute.run(
            lambda: self._checked(meeting, data), lane="side", cost_s=self._costs.copy_s
        )
        if isinstance(side, Refused):
            self._ledger.note(meeting.peer, side.code, side.text)
        else:
            meeting.side = side
        meeting.pulled.set()

    def _checked(self, meeting: _Meeting, data: bytes) -> Side | Refused:
        count, spans = len(meeting.own.start), self._trainer.layout.spans
        values = decoded(self._codec, data, 2 * count)
        if isinstance(values, Refused):
            return values
        side = Side(values[:count], values[count:])
        beginner = self._is_elder(meeting.peer)
        for own, theirs in ((meeting.own.start, side.start), (meeting.own.end, side.end)):
            if refused := check_peer_values(own, theirs, spans, beginner=beginner):
                return refused
        return side

    def _receipt(self, meeting: _Meeting) -> PairReceipt:
        claim = PairClaim(run=self._run, brought=meeting.brought, held=meeting.theirs)
        return PairReceipt(claim=claim, signature=self._signer.sign(PURPOSE, encode(claim)))

    def _genuine(self, receipt: PairReceipt, meeting: _Meeting) -> bool:
        """Whether the other says that it holds what this node brought to ``meeting``."""
        expected = PairClaim(run=self._run, brought=meeting.theirs, held=meeting.brought)
        return receipt.claim == expected and self._signer.verify(
            meeting.peer, PURPOSE, encode(expected), receipt.signature
        )

    async def _step(self, meeting: _Meeting) -> bool:
        """Take the outer step, unless a merge came between."""
        side, momentum = meeting.side, self._momentum
        assert side is not None
        # Both add up in one order.
        group = [meeting.own, side] if self._signer.peer < meeting.peer else [side, meeting.own]
        start, momentum = await self._compute.run(
            lambda: pair_step(meeting.own, group, momentum, rate=self._spec.rate, memory=self._spec.momentum),
            lane="side",
            cost_s=self._costs.mix_s,
        )
        applied = await self._compute.run(
            lambda: self._apply(meeting, start, momentum), lane="train", cost_s=self._costs.copy_s
        )
        self.mixes += applied
        return applied

    def _apply(self, meeting: _Meeting, start: torch.Tensor, momentum: torch.Tensor) -> bool:
        # Runs in the train lane, where merges re-base the weights too: the epoch cannot change underneath.
        if meeting.epoch != self._epoch:
            return False
        self._trainer.add(None, start - meeting.own.end)
        self._start, self._momentum, self._start_step = start, momentum, meeting.step
        return True
