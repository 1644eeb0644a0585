"""Where a node in one-byte mode gets what its run starts from: weights, and what a Hugging Face model is made of.

Owns the order of places to look: what was fetched before, a file or directory of one's own, the peers one was told of.
Whatever the place, the bytes must hash to what the spec names. Also owns the way back: the spec of a run that starts
from what lies here.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import structlog
import torch
import trio
from torch import Tensor

from gossip.address_book import parse_peer_address
from gossip.ledger import PeerLedger
from gossip.messages import ShardRef
from gossip.newcomer import members_known_to
from gossip.shard_transfer import ShardFetcher
from gossip.store import ShardMissing, ShardStore, outline_of
from node.config import format_bytes
from p2p.errors import GossamerError, MalformedMessage, TransportError
from p2p.limits import Limits
from p2p.service import open_service_nursery
from p2p.transport import PeerId, PeerRecord, Transport
from training.base_weights import BaseError, Shapes, base_from_bytes, base_to_bytes, load_base, shapes_of
from training.huggingface import Pretrained
from training.model import GPT
from training.run_spec import RunSpec, parse_run_spec, spec_as_toml
from training.spec_sections import GptSpec, HuggingFaceSpec, OneByteSpec

FETCH_TIMEOUT_S = 3600.0
ATTEMPTS, RETRY_S = 40, 3.0
"""Two minutes for the first member to be up."""
TOLD_EVERY_S = 3.0

log = structlog.get_logger()


# --- what a spec names ------------------------------------------------------------------------------------------------


def weights_ref(spec: RunSpec) -> ShardRef | None:
    """The shard of the base weights; None where they are drawn."""
    if not isinstance(spec.one_byte, OneByteSpec) or not spec.one_byte.base:
        return None
    return ShardRef(root=bytes.fromhex(spec.one_byte.base), size=4 * spec.model.parameters)


def files_ref(spec: RunSpec) -> ShardRef | None:
    """The shard of the config and the tokenizer of a Hugging Face model; None where there is nothing of the kind."""
    if not isinstance(spec.model, HuggingFaceSpec) or not spec.model.files:
        return None
    return ShardRef(root=bytes.fromhex(spec.model.files), size=spec.model.files_bytes)


async def spec_based_on(spec: RunSpec, path: Path) -> RunSpec:
    """``spec``, starting from what lies at ``path``: a safetensors file, or the directory of a Hugging Face model.

    Raises GossamerError where that cannot be its base.
    """
    model, one_byte = spec.model, spec.one_byte
    if isinstance(one_byte, OneByteSpec) and isinstance(model, HuggingFaceSpec):
        pretrained = await trio.to_thread.run_sync(Pretrained.read, path)
        files, _ = await outline_of(pretrained.to_bytes())
        weights = await trio.to_thread.run_sync(pretrained.read_weights, path)
        model = msgspec.structs.replace(
            model,
            files=files.root.hex(),
            files_bytes=files.size,
            parameters=sum(tensor.numel() for tensor in weights.values()),
        )
        check = partial(pretrained.check, parameters=model.parameters, context=model.context)
        await trio.to_thread.run_sync(check)
    elif isinstance(one_byte, OneByteSpec) and isinstance(model, GptSpec):
        weights = await trio.to_thread.run_sync(load_base, path, shapes_of(GPT(model, torch.Generator())))
    else:
        raise GossamerError(
            "this run starts from no given weights",
            why="only runs in one-byte mode do, whose spec has a section one_byte, with a model of text",
            fix="start one: gossamer testnet up --run examples/one_byte.toml --base FILE",
        )
    ref, _ = await outline_of(base_to_bytes(weights))
    one_byte = msgspec.structs.replace(one_byte, base=ref.root.hex())
    based = msgspec.structs.replace(spec, model=model, one_byte=one_byte)
    # By way of TOML, because that checks the bounds of what was found.
    return parse_run_spec(spec_as_toml(based), origin=f"for {path}")


# --- where it comes from ----------------------------------------------------------------------------------------------


class BaseSource:
    """What is to be had of a run's base. ``path``: a file or directory of one's own, if any.

    ``store`` holds everything that was obtained from then on, for those who come later.
    """

    def __init__(
        self,
        *,
        path: Path | None,
        store: ShardStore,
        transport: Transport,
        bootstrap: Sequence[str],
        limits: Limits,
    ) -> None:
        self._path = path
        self._store = store
        self._transport = transport
        self._bootstrap = bootstrap
        self._limits = limits

    async def pretrained(self, ref: ShardRef) -> Pretrained:
        """The config and the tokenizer that ``ref`` names. Raises GossamerError."""
        own = None
        if self._path is not None and self._path.is_dir():
            own = partial(_packed_files, self._path)
        return Pretrained.from_bytes(await self._obtain(ref, own))

    async def weights(
        self, ref: ShardRef, shapes: Shapes, pretrained: Pretrained | None
    ) -> dict[str, Tensor]:
        """The weights that ``ref`` names, of a model of ``shapes``, which is made of ``pretrained`` if of anything.

        Raises GossamerError.
        """
        own = None
        if self._path is not None:
            own = partial(_packed_weights, self._path, shapes, pretrained)
        return base_from_bytes(await self._obtain(ref, own), shapes)

    async def _obtain(self, ref: ShardRef, own: Callable[[], bytes] | None) -> bytes:
        with contextlib.suppress(ShardMissing):
            return await self._store.get(ref)
        if own is not None:
            data = await trio.to_thread.run_sync(own)
            if (await outline_of(data))[0] != ref:
                raise BaseError(
                    f"{self._path} holds another model than the run starts from",
                    why="its spec names weights, config and tokenizer by their hash",
                    fix="leave base_path out: they are fetched from the members then",
                )
        else:
            data = await self._fetch(ref)
        await self._store.put(data, owner="base", sync=True)
        return data

    async def _fetch(self, ref: ShardRef) -> bytes:
        """From whoever answers; a member that is itself just starting serves nothing yet, and is asked again."""
        why = "no member is known"

        async def reach(peer: PeerId) -> None:
            """They are connected, or they are not to be had."""

        fetcher = ShardFetcher(
            transport=self._transport,
            ledger=PeerLedger(),
            limits=self._limits,
            rng=random.Random(),
            reach=reach,
        )
        log.info("fetching what the run starts from", bytes=ref.size)
        for _ in range(ATTEMPTS):
            try:
                holders = await _connected(self._transport, self._bootstrap, self._limits)
                async with open_service_nursery() as services:
                    services.start_soon(_tell_progress, fetcher, ref)
                    return await fetcher.fetch(ref, holders, timeout_s=FETCH_TIMEOUT_S)
            except GossamerError as error:
                why = error.why or error.what
            await trio.sleep(RETRY_S)
        raise BaseError(
            "what this run starts from could not be fetched",
            why=why,
            fix="join by the invite of a member that is up, or name your own copy: --base PATH",
        )


def _packed_files(directory: Path) -> bytes:
    return Pretrained.read(directory).to_bytes()


def _packed_weights(path: Path, shapes: Shapes, pretrained: Pretrained | None) -> bytes:
    if pretrained is not None and path.is_dir():
        return base_to_bytes(pretrained.read_weights(path))
    return base_to_bytes(load_base(path, shapes))


async def _tell_progress(fetcher: ShardFetcher, ref: ShardRef) -> None:
    while True:
        await trio.sleep(TOLD_EVERY_S)
        received, givers = fetcher.progress_of(ref)
        log.info("fetching", received=format_bytes(received), of=format_bytes(ref.size), holders=len(givers))


async def _connected(transport: Transport, bootstrap: Sequence[str], limits: Limits) -> list[PeerId]:
    """Those of ``bootstrap`` that can be reached, and some whom they know: a rendezvous itself has nothing."""
    peers: dict[PeerId, None] = {}

    async def connect(record: PeerRecord) -> None:
        with contextlib.suppress(TransportError):
            await transport.connect(record)
            peers[record.peer] = None

    async def ask(peer: PeerId) -> None:
        with contextlib.suppress(TransportError, MalformedMessage):
            known = await members_known_to(transport, peer, limits=limits)
            for record in known[: limits.links_target]:
                nursery.start_soon(connect, record)

    async with trio.open_nursery() as nursery:
        for text in bootstrap:
            peer, address = parse_peer_address(text, chars_max=limits.address_chars_max)
            nursery.start_soon(connect, PeerRecord(peer, (address,)))
    async with trio.open_nursery() as nursery:
        for peer in list(peers):
            nursery.start_soon(ask, peer)
    return list(peers)
