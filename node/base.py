"""Where a node in one-byte mode gets the weights from that its run starts with.

Owns the order of places to look: what was fetched before, a file of one's own, the peers one was told of. Whatever the
place, the bytes must hash to what the spec names.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path

import structlog
import trio
from torch import Tensor

from gossip.address_book import parse_peer_address
from gossip.ledger import PeerLedger
from gossip.messages import ShardRef
from gossip.shard_transfer import ShardFetcher
from gossip.store import ShardMissing, ShardStore, outline_of
from p2p.errors import GossamerError, TransportError
from p2p.limits import Limits
from p2p.transport import PeerId, PeerRecord, Transport
from training.base_weights import BaseError, Shapes, base_from_bytes, base_to_bytes, load_base
from training.run_spec import OneByteSpec

FETCH_TIMEOUT_S = 3600.0
ATTEMPTS, RETRY_S = 40, 3.0
"""Two minutes for the first member to be up."""

log = structlog.get_logger()


def base_ref(spec: OneByteSpec, parameters: int) -> ShardRef | None:
    """The shard of the base weights of a model of so many parameters; None where they are drawn."""
    return ShardRef(root=bytes.fromhex(spec.base), size=4 * parameters) if spec.base else None


async def root_of_base(path: Path, shapes: Shapes) -> str:
    """What a spec has to say under ``one_byte.base`` for a run to start from the file ``path``. Raises BaseError."""
    ref, _ = await outline_of(base_to_bytes(load_base(path, shapes)))
    return ref.root.hex()


async def obtain_base(
    ref: ShardRef,
    shapes: Shapes,
    *,
    path: Path | None,
    store: ShardStore,
    transport: Transport,
    bootstrap: Sequence[str],
    limits: Limits,
) -> dict[str, Tensor]:
    """The base weights that ``ref`` names, which ``store`` holds from then on. Raises BaseError."""
    with contextlib.suppress(ShardMissing):
        return base_from_bytes(await store.get(ref), shapes)
    if path is not None:
        data = base_to_bytes(load_base(path, shapes))
        if (await outline_of(data))[0] != ref:
            raise BaseError(
                f"{path} holds other weights than the run starts from",
                why="its spec names them by their hash",
                fix="leave base_path out: they are fetched from the members then",
            )
    else:
        data = await _fetch(ref, transport, bootstrap, limits)
    await store.put(data, owner="base", sync=True)
    return base_from_bytes(data, shapes)


async def _fetch(ref: ShardRef, transport: Transport, bootstrap: Sequence[str], limits: Limits) -> bytes:
    """From whoever answers; a member that is itself just starting serves nothing yet, and is asked again."""
    why = "no member is known"

    async def reach(peer: PeerId) -> None:
        """They are connected, or they are not to be had."""

    fetcher = ShardFetcher(
        transport=transport, ledger=PeerLedger(), limits=limits, rng=random.Random(), reach=reach
    )
    log.info("fetching the base weights", bytes=ref.size)
    for _ in range(ATTEMPTS):
        try:
            holders = await _connected(transport, bootstrap, limits)
            return await fetcher.fetch(ref, holders, timeout_s=FETCH_TIMEOUT_S)
        except GossamerError as error:
            why = error.why or error.what
        await trio.sleep(RETRY_S)
    raise BaseError(
        "the weights that this run starts from could not be fetched",
        why=why,
        fix="join by the invite of a member that is up, or name your own copy: --base FILE",
    )


async def _connected(transport: Transport, bootstrap: Sequence[str], limits: Limits) -> list[PeerId]:
    peers = []
    for text in bootstrap:
        peer, address = parse_peer_address(text, chars_max=limits.address_chars_max)
        with contextlib.suppress(TransportError):
            await transport.connect(PeerRecord(peer, (address,)))
            peers.append(peer)
    return peers
