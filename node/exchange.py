"""The background exchange: publish a fragment of the live weights, pull the same fragment from peers, mix.

Owns the published snapshots and the checks on what peers serve. Never stops training: weights are read and changed only
by short calls in the ``train`` lane, and the result is blended with the progress made meanwhile,
``live <- live + (mixed - own snapshot)``. Nothing of a failed exchange is applied.

Relies on: the shard fetcher (bytes match their hash), ``training.mixing`` (what the numbers must satisfy).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog
import torch
import trio

from gossip.ledger import PeerLedger
from gossip.messages import FragmentEntry, Fragments, ShardRef
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed, Pacer, ShardFetcher
from gossip.store import ShardStore
from node.compute import Compute
from node.costs import Costs
from node.rounds import Exchange
from node.status import MixReport
from p2p.transport import PeerId
from training.mixing import Refused, check_peer_values, mix
from training.run_spec import ExchangeSpec
from training.trainer import Trainer
from training.wire import decode_values, encode_values

log = structlog.get_logger()

SNAPSHOTS_KEPT = 2
"""Published snapshots kept per fragment: the advertised one and the one peers may still be pulling."""


class Exchanger:
    """Carries out one exchange at a time for ``node.node``."""

    def __init__(
        self,
        *,
        spec: ExchangeSpec,
        trainer: Trainer,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        fetcher: ShardFetcher,
        notices: NoticeTable,
        ledger: PeerLedger,
        rng: random.Random,
        alive_peers: Callable[[], list[PeerId]],
        fetch_timeout_s: float,
        pacer: Pacer | None,
    ) -> None:
        self._spec = spec
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._store = store
        self._fetcher = fetcher
        self._notices = notices
        self._ledger = ledger
        self._rng = rng
        self._alive_peers = alive_peers
        self._fetch_timeout_s = fetch_timeout_s
        self._pacer = pacer
        self._published: dict[int, FragmentEntry] = {}
        self._pinned: dict[int, deque[str]] = {}
        self._weights_epoch = 0
        self.mixes = 0
        self.mixes_failed = 0
        self.last_mix: MixReport | None = None

    def weights_replaced(self) -> None:
        """The live weights were re-based (a merge was adopted): a mix begun before no longer applies to them."""
        self._weights_epoch += 1

    async def exchange(self, due: Exchange) -> None:
        """Publish the fragment, then pull and mix; failures are counted and logged, never raised."""
        rule, epoch = self._spec.rule, self._weights_epoch
        assert rule != "none", "a run without exchanges never asks for one"
        own = await self._compute.run(
            partial(self._trainer.read, due.fragment), lane="train", cost_s=self._costs.copy_s
        )
        await self._publish(due, own)
        offers = self._offers(due.fragment)
        if not offers:
            return
        pulled = await self._pull(offers, due.fragment, own)
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
            variance_ratio=round(result.variance_ratio_before, 4),
        )

    def _apply(self, epoch: int, fragment: int, delta: torch.Tensor) -> bool:
        # Runs in the train lane, where merges re-base the weights too: the epoch cannot change underneath.
        if epoch != self._weights_epoch:
            return False
        self._trainer.add(fragment, delta)
        return True

    async def _publish(self, due: Exchange, own: torch.Tensor) -> None:
        data = await self._compute.run(
            lambda: encode_values(own, self._spec.wire), lane="side", cost_s=self._costs.copy_s
        )
        owner = f"published/{due.fragment}/{due.step}"
        shard = await self._store.put(data, owner=owner)
        pinned = self._pinned.setdefault(due.fragment, deque())
        pinned.append(owner)
        if len(pinned) > SNAPSHOTS_KEPT:
            await self._store.release(pinned.popleft())
        self._published[due.fragment] = FragmentEntry(fragment=due.fragment, step=due.step, shard=shard)
        entries = [self._published[fragment] for fragment in sorted(self._published)]
        self._notices.publish("fragments", Fragments(entries=entries))

    def _offers(self, fragment: int) -> list[tuple[PeerId, ShardRef]]:
        """The alive members that publish the fragment, and what they publish."""
        bodies = ((peer, self._notices.body_of(peer, "fragments", Fragments)) for peer in self._alive_peers())
        return [
            (peer, entry.shard)
            for peer, body in bodies
            if body is not None
            for entry in body.entries
            if entry.fragment == fragment
        ]

    async def _pull(
        self, offers: list[tuple[PeerId, ShardRef]], fragment: int, own: torch.Tensor
    ) -> list[tuple[PeerId, torch.Tensor]]:
        """The fragment from up to ``spec.peers`` random members of ``offers``, checked; by ascending peer."""
        chosen = self._rng.sample(offers, min(self._spec.peers, len(offers)))
        pulled: list[tuple[PeerId, torch.Tensor]] = []
        async with trio.open_nursery() as nursery:
            for peer, shard in chosen:
                nursery.start_soon(self._pull_one, peer, shard, own, fragment, pulled)
        return sorted(pulled, key=lambda item: item[0])

    async def _pull_one(
        self,
        peer: PeerId,
        shard: ShardRef,
        own: torch.Tensor,
        fragment: int,
        pulled: list[tuple[PeerId, torch.Tensor]],
    ) -> None:
        try:
            data = await self._fetcher.fetch(
                shard, [peer], timeout_s=self._fetch_timeout_s, pacer=self._pacer
            )
        except FetchFailed as error:
            log.info("pull failed", peer=peer, reason=error.what)
            return
        spans = self._trainer.layout.fragment_spans(fragment)

        def check() -> torch.Tensor | Refused:
            try:
                values = decode_values(data, own.numel(), self._spec.wire)
            except ValueError as error:
                return Refused("shape", str(error))
            return check_peer_values(own, values, spans) or values

        checked = await self._compute.run(check, lane="side", cost_s=self._costs.copy_s)
        if isinstance(checked, Refused):
            self._ledger.note(peer, checked.code, checked.text)
            return
        pulled.append((peer, checked))
