"""Pulling a peer's snapshot: asked for, fetched, decoded and checked against one's own weights of the same moment.

Owns the asking side of SNAPSHOT_PROTOCOL. What cannot be had or used is logged, or noted in the peer's ledger, and
comes to nothing; it never raises.

Relies on: ``node.snapshots`` at the other side, the shard fetcher (bytes match their hash), ``training.mixing`` (what
the numbers must satisfy).
"""

from __future__ import annotations

import structlog
from torch import Tensor

from gossip.ledger import PeerLedger
from gossip.messages import SNAPSHOT_PROTOCOL, Snapshot, WantSnapshot
from gossip.shard_transfer import FetchFailed, ShardFetcher
from node.compute import Compute
from node.costs import Costs
from p2p.errors import MalformedMessage, TransportError
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.rpc import call
from p2p.transport import PeerId, Transport
from training.codecs.codec import Codec
from training.layout import ParameterLayout
from training.mixing import Refused, check_peer_values, decoded

log = structlog.get_logger()

FETCH_TIMEOUT_S = 30.0


class SnapshotPuller:
    """Pulls snapshots for one node."""

    def __init__(
        self,
        *,
        codec: Codec,
        layout: ParameterLayout,
        transport: Transport,
        compute: Compute,
        costs: Costs,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        limits: Limits,
        pacer: Pacer | None,
    ) -> None:
        self._codec = codec
        self._layout = layout
        self._transport = transport
        self._compute = compute
        self._costs = costs
        self._fetcher = fetcher
        self._ledger = ledger
        self._limits = limits
        self._pacer = pacer

    async def pull(self, peer: PeerId, fragment: int, own: Tensor, *, beginner: bool) -> Tensor | None:
        """A fragment of what ``peer`` holds now; None when it cannot be had, or must not be used beside ``own``.

        ``beginner``: our weights are no measure for those of ``peer``.
        """
        try:
            data = await self._fetch(peer, fragment, self._codec.size_bytes(own.numel()))
        except (TransportError, FetchFailed) as error:
            log.info("pull failed", peer=peer, reason=error.what)
            return None
        except MalformedMessage as error:
            self._ledger.note(peer, "malformed", error.what)
            return None
        if data is None:
            return None
        spans = self._layout.fragment_spans(fragment)

        def check() -> Tensor | Refused:
            values = decoded(self._codec, data, own.numel())
            if isinstance(values, Refused):
                return values
            return check_peer_values(own, values, spans, beginner=beginner) or values

        checked = await self._compute.run(check, lane="side", cost_s=self._costs.copy_s)
        if isinstance(checked, Refused):
            self._ledger.note(peer, checked.code, checked.text)
            return None
        return checked

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
        return await self._fetcher.fetch(snapshot.shard, [peer], timeout_s=FETCH_TIMEOUT_S, pacer=self._pacer)
