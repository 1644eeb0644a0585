"""The background exchange: ask peers for a snapshot of one fragment, pull it, mix it with one's own of the same moment.

Owns the order of an exchange and the checks on what peers serve. Never stops training: weights are changed only by a
short call in the ``train`` lane, and the result is blended with the progress made meanwhile,
``live <- live + (mixed - own snapshot)``. Nothing of a failed exchange is applied.

Relies on: ``node.snapshots`` at the other side, the shard fetcher (bytes match their hash), ``training.mixing``
(what the numbers must satisfy).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import structlog
import torch
import trio

from gossip.ledger import PeerLedger
from gossip.messages import SNAPSHOT_PROTOCOL, Snapshot, WantSnapshot
from gossip.shard_transfer import FetchFailed, Pacer, ShardFetcher
from node.compute import Compute
from node.costs import Costs
from node.rounds import Exchange
from node.status import MixReport
from p2p.errors import MalformedMessage, TransportError
from p2p.limits import Limits
from p2p.rpc import call
from p2p.transport import PeerId, Transport
from training.codecs.named import WIRES
from training.learner import Learner
from training.mixing import Refused, check_peer_values, decoded, mix
from training.schedules import Schedule
from training.spec_sections import ExchangeSpec

T = TypeVar("T")
log = structlog.get_logger()


BEGINNER_MIXES = 10
"""After so many mixes our own weights are a measure for everybody's, whatever they say of themselves."""


class Exchanger:
    """Carries out one exchange at a time for ``node.node``."""

    def __init__(
        self,
        *,
        spec: ExchangeSpec,
        schedule: Schedule,
        transport: Transport,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        members: Callable[[], list[PeerId]],
        may_mix_with: Callable[[PeerId], bool],
        is_elder: Callable[[PeerId], bool],
        fetch_timeout_s: float,
        pacer: Pacer | None,
    ) -> None:
        self._spec = spec
        self._schedule = schedule
        self._codec = WIRES[spec.wire]
        self._transport = transport
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._fetcher = fetcher
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._members = members
        self._may_mix_with = may_mix_with
        self._is_elder = is_elder
        self._fetch_timeout_s = fetch_timeout_s
        self._pacer = pacer
        self._weights_epoch = 0
        self.mixes = 0
        self.mixes_failed = 0
        self.one_sided = 0
        """Pulls have one side."""
        self.last_mix: MixReport | None = None

    def void_mixes(self) -> None:
        """Have a mix under way come to nothing: the weights it began with were contributed to a merge, or re-based.

        To be called in the ``train`` lane.
        """
        self._weights_epoch += 1

    async def exchange(self, due: Exchange) -> None:
        """Pull the fragment from some random members and mix; failures are counted, logged, never raised.

        How many, and with what chance anything happens at all, is the schedule's.
        """
        rule, epoch = self._spec.rule, self._weights_epoch
        phase = self._schedule.at(due.step / self._trainer.spec.train.steps)
        if self._rng.random() >= phase.probability:
            return
        chosen = self._choose_partners(phase.peers)
        if not chosen:
            return
        own = await self._compute.run(
            partial(self._trainer.read, due.fragment), lane="side", cost_s=self._costs.copy_s
        )
        pulled = await self._pull(chosen, due.fragment, own)
        if not pulled:
            self.mixes_failed += 1
            return
        spans = self._trainer.layout.fragment_spans(due.fragment)
        values = [values for _, values in pulled]
        result = await self._compute.run(
            lambda: mix(rule, own, values, spans), lane="side", cost_s=self._costs.mix_s
        )
        applied = await self._compute.run(
            lambda: self._apply(epoch, due.fragment, result.values - own),
            lane="train",
            cost_s=self._costs.copy_s,
        )
        if not applied:
            return
        self.mixes += 1
        self.last_mix = MixReport(
            rule=rule,
            fragment=due.fragment,
            peers=[peer for peer, _ in pulled],
            step=due.step,
            variance_ratio_before=result.variance_ratio_before,
            variance_ratio_after=result.variance_ratio_after,
        )
        log.debug(
            "mixed",
            step=due.step,
            fragment=due.fragment,
            peers=self.last_mix.peers,
            steps_late=self._trainer.step - due.step,
            variance_ratio=round(result.variance_ratio_before, 4),
        )

    def _choose_partners(self, count: int) -> list[PeerId]:
        """Some of the members at random; of a thousand only those are looked at that are drawn."""
        drawn = filter(self._may_mix_with, in_random_order(self._members(), self._rng))
        return list(islice(drawn, count))

    def _apply(self, epoch: int, fragment: int, delta: torch.Tensor) -> bool:
        # Runs in the train lane, where merges re-base the weights too: the epoch cannot change underneath.
        if epoch != self._weights_epoch:
            return False
        self._trainer.add(fragment, delta)
        return True

    async def _pull(
        self, partners: list[PeerId], fragment: int, own: torch.Tensor
    ) -> list[tuple[PeerId, torch.Tensor]]:
        """The fragment from each of ``partners`` that serves it and passes the checks; by ascending peer."""
        pulled: list[tuple[PeerId, torch.Tensor]] = []
        async with trio.open_nursery() as nursery:
            for peer in partners:
                nursery.start_soon(self._pull_one, peer, fragment, own, pulled)
        return sorted(pulled, key=lambda item: item[0])

    async def _pull_one(
        self, peer: PeerId, fragment: int, own: torch.Tensor, pulled: list[tuple[PeerId, torch.Tensor]]
    ) -> None:
        try:
            data = await self._fetch(peer, fragment, self._codec.size_bytes(own.numel()))
        except (TransportError, FetchFailed) as error:
            log.info("pull failed", peer=peer, reason=error.what)
            return
        except MalformedMessage as error:
            self._ledger.note(peer, "malformed", error.what)
            return
        if data is None:
            return
        spans = self._trainer.layout.fragment_spans(fragment)
        beginner = self._is_elder(peer) and self.mixes < BEGINNER_MIXES

        def check() -> torch.Tensor | Refused:
            values = decoded(self._codec, data, own.numel())
            if isinstance(values, Refused):
                return values
            return check_peer_values(own, values, spans, beginner=beginner) or values

        checked = await self._compute.run(check, lane="side", cost_s=self._costs.copy_s)
        if isinstance(checked, Refused):
            self._ledger.note(peer, checked.code, checked.text)
            return
        pulled.append((peer, checked))

    async def _fetch(self, peer: PeerId, fragment: int, size: int) -> bytes | None:
        """A fresh snapshot of ``size`` bytes; None when ``peer`` names one that cannot be of this model."""
        await self._fetcher.reach(peer)
        snapshot = await call(
            self._transport,
            peer,
            SNAPSHOT_PROTOCOL,
            WantSnapshot(fragment=fragment),
            Snapshot,
            timeout_s=self._limits.call_timeout_s,
        )
        if snapshot.shard.size != size:
            self._ledger.note(peer, "shape", f"a snapshot of {snapshot.shard.size} bytes, expected {size}")
            return None
        return await self._fetcher.fetch(
            snapshot.shard, [peer], timeout_s=self._fetch_timeout_s, pacer=self._pacer
        )


def in_random_order(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Each of ``items`` once, drawn as they are asked for (Fisher and Yates, from the end)."""
    rest = list(items)
    while rest:
        at = rng.randrange(len(rest))
        rest[at], rest[-1] = rest[-1], rest[at]
        yield rest.pop()
