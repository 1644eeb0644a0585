"""Snapshots of the live weights, taken when a peer asks and kept until it has had time to pull them.

Owns SNAPSHOT_PROTOCOL, the snapshots that are kept for somebody, and the bounds on what asking may cost: whoever asks
within a tenth of a second of another gets the same snapshot, taking them uses at most a tenth of the time, a peer has
one of each fragment kept for it, and a bounded number of each is kept in all. Never mixes, and never changes weights.

A snapshot is taken on request and not on a schedule because its age is lost progress: mixing pulls a node half-way
back to where the other was when its snapshot was taken (figures in docs/LOG.md).

Relies on: the shard store, which keeps what is pinned.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from gossip.ledger import PeerLedger
from gossip.messages import SNAPSHOT_PROTOCOL, ShardRef, Snapshot, WantSnapshot
from gossip.store import ShardStore, StoreFull
from node.compute import Compute
from node.costs import Costs
from p2p.errors import CallRefused
from p2p.limits import Limits
from p2p.rpc import serve_calls
from p2p.transport import PeerId, Transport
from training.codecs.named import WIRES
from training.learner import Learner
from training.spec_sections import Wire

SHARED_S = 0.1
"""For how long a snapshot is given to others who ask."""
TIME_SHARE_MAX = 0.1
"""Taking snapshots uses at most this share of the time; where it is slow, each is shared for longer."""


@dataclass(slots=True)
class _Kept:
    """A snapshot in the store, pinned under ``owner`` for the peers that were given it last."""

    shard: ShardRef
    owner: str
    shared_until_s: float
    peers: set[PeerId] = field(default_factory=set)


class Snapshots:
    """Answers WantSnapshot for one node."""

    def __init__(
        self,
        *,
        transport: Transport,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        ledger: PeerLedger,
        limits: Limits,
        peers_max: int,
        wire: Wire,
    ) -> None:
        self._transport = transport
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._store = store
        self._ledger = ledger
        self._limits = limits
        self._codec = WIRES[wire]
        # On average as many peers pull from us as we pull from; twice as many at a time are rare.
        self._kept_max = 2 + 2 * peers_max
        self._kept: dict[int, deque[_Kept]] = {}
        """By fragment, the newest last."""
        self._answering = trio.Lock()
        self.taken = 0

    def serve(self) -> None:
        """Start answering; to be called once."""
        serve_calls(
            self._transport,
            SNAPSHOT_PROTOCOL,
            WantSnapshot,
            self._answer,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )

    async def _answer(self, peer: PeerId, want: WantSnapshot) -> Snapshot:
        if self._ledger.shuns(peer):
            raise CallRefused("banned", "this node does not serve you for now")
        if want.fragment >= self._trainer.layout.fragments:
            raise CallRefused("no-fragment", f"this run has {self._trainer.layout.fragments} fragments")
        async with self._answering:
            kept = self._kept.setdefault(want.fragment, deque())
            if not kept or trio.current_time() >= kept[-1].shared_until_s:
                kept.append(await self._take(want.fragment))
            for snapshot in kept:
                snapshot.peers.discard(peer)
            kept[-1].peers.add(peer)
            unused = [snapshot for snapshot in kept if not snapshot.peers]
            for snapshot in unused or list(kept)[: -self._kept_max]:
                kept.remove(snapshot)
                await self._store.release(snapshot.owner)
            return Snapshot(shard=kept[-1].shard)

    async def _take(self, fragment: int) -> _Kept:
        """A snapshot of the live weights as they are now."""
        began_s = trio.current_time()
        # Not in the ``train`` lane: there it would wait for the end of the inner step, and lose the asker as much
        # time. What is read in the middle of an optimizer step is for each element from before or after it.
        data = await self._compute.run(
            lambda: self._codec.encode(self._trainer.read(fragment)),
            lane="side",
            cost_s=self._costs.copy_s,
        )
        self.taken += 1
        owner = f"snapshot/{self.taken}"
        try:
            shard = await self._store.put(data, owner=owner, volatile=True)
        except StoreFull as error:
            raise CallRefused("full", error.what) from error
        took_s = trio.current_time() - began_s
        return _Kept(shard, owner, began_s + max(SHARED_S, took_s / TIME_SHARE_MAX))
