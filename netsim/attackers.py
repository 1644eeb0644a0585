"""Hostile members: whole nodes with one wrong part, so that each comes as far as its one lie lets it.

Owns the lies. Each is told by spoiling a node that was built and does not run yet: a method of one of its parts, or the
part itself, is replaced, and everything else goes by the book. It trains, mixes, merges and keeps its links like
anybody, under its own name. Knows nothing of the world the node lives in; what honest members must make of it is for
checkers and tests to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar, cast

import torch
from msgspec.structs import replace
from torch import Tensor

from gossip.messages import (
    CHUNK_BYTES,
    PACKED_NOTICE_BYTES_MAX,
    Contribution,
    Heartbeat,
    Message,
    Notice,
    PieceResult,
    ShardRef,
)
from gossip.notices import Difference, Verdict
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore
from node.gossip_node import GossipNode
from node.snapshots import Snapshots
from p2p.codec import decode
from p2p.transport import PeerId
from training.codecs.codec import Codec
from training.codecs.plain import FP32
from training.layout import TensorSpan
from training.learner import Learner
from training.outer_state import streams, updates_of
from training.pieces import Pieces
from training.schedules import Schedule

P = ParamSpec("P")
R = TypeVar("R")
Forge: TypeAlias = Callable[[Tensor, Sequence[TensorSpan]], Tensor]
"""What is offered in place of a fragment, which is its own to change, given where its tensors lie."""


@dataclass(frozen=True, slots=True)
class Attacker:
    """A lie: what it is, and how a node comes to tell it."""

    about: str
    """One line for people."""
    refused_as: str
    """The reason under which the ledgers of honest members count it; empty where it is no offence, but of no use."""
    spoil: Callable[[GossipNode], None]
    """Makes a node that does not run yet tell the lie, for one life."""


# --- weights ------------------------------------------------------------------------------------------------------


def with_a_nan(values: Tensor, _: Sequence[TensorSpan]) -> Tensor:
    """One element is not a number."""
    values[len(values) // 2] = torch.nan
    return values


def one_short(values: Tensor, _: Sequence[TensorSpan]) -> Tensor:
    """One element is missing."""
    return values[:-1]


def a_million_times(values: Tensor, _: Sequence[TensorSpan]) -> Tensor:
    """Out of all proportion."""
    return 1e6 * values


def one_tensor_five_times(values: Tensor, spans: Sequence[TensorSpan]) -> Tensor:
    """The norm is still within bounds; the variance of one tensor is not."""
    span = next(span for span in spans if span.kind == "weight")
    values[span.start : span.stop] *= 5
    return values


def turned_round(values: Tensor, _: Sequence[TensorSpan]) -> Tensor:
    """Away from where everybody goes, and about as large as may be."""
    return -2.5 * values


def one_and_a_half_times(values: Tensor, _: Sequence[TensorSpan]) -> Tensor:
    """Such as might well be true."""
    return 1.5 * values


class _ForgingLearner:
    """A learner as far as snapshots need one."""

    def __init__(self, learner: Learner, forge: Forge) -> None:
        self.layout = learner.layout
        self._learner = learner
        self._forge = forge

    def read(self, fragment: int) -> Tensor:
        """Not quite the live weights."""
        return self._forge(self._learner.read(fragment), self.layout.fragment_spans(fragment))


def _serving_forged_fragments(forge: Forge) -> Callable[[GossipNode], None]:
    def spoil(node: GossipNode) -> None:
        node.snapshots = Snapshots(
            transport=node.runtime.transport,
            trainer=cast(Learner, _ForgingLearner(node.trainer, forge)),
            compute=node.runtime.compute,
            costs=node.runtime.costs,
            store=node.store,
            ledger=node.ledger,
            limits=node.limits,
            peers_max=Schedule.of(node.spec).peers_max,
            wire=node.spec.exchange.wire,
        )

    return spoil


def _contributing_forged_inputs(forge: Forge) -> Callable[[GossipNode], None]:
    def spoil(node: GossipNode) -> None:
        pieces = Pieces.of(node.trainer.layout, streaming=streams(node.spec.outer))
        updates = updates_of(node.spec.outer)

        async def contribute(
            honest: Callable[[bytes, Sequence[int]], Awaitable[Contribution | None]],
            parent: bytes,
            moved: Sequence[int],
        ) -> Contribution | None:
            contribution = await honest(parent, moved)
            if contribution is None:
                return None
            await node.store.release("forged")
            first = node.merger.head_record is None
            inputs = []
            for piece, ref in zip(moved, contribution.inputs, strict=True):
                codec = updates.codec if updates and node.merge_host.shape.by_update(first=first) else FP32
                forged = _forged(await node.store.get(ref), forge, pieces, piece, codec)
                inputs.append(await node.store.put(forged, owner="forged"))
            return replace(contribution, inputs=inputs)

        _instead(node.merge_host, "contribute", contribute)

    return spoil


def _forged(data: bytes, forge: Forge, pieces: Pieces, piece: int, codec: Codec = FP32) -> bytes:
    """Weights, differences or a state with the forgery in them."""
    count = len(data) // 4 if codec is FP32 else pieces.size(piece)
    forged = forge(codec.decode(data, count), pieces.spans(piece))
    # What a codec does not take could not be sent in it.
    fits = codec is not FP32 and len(forged) == count and bool(torch.isfinite(forged).all())
    return codec.encode(forged) if fits else FP32.encode(forged)


def _publishing_forged_sums(forge: Forge) -> Callable[[GossipNode], None]:
    def spoil(node: GossipNode) -> None:
        pieces = Pieces.of(node.trainer.layout, streaming=streams(node.spec.outer))

        async def sum_piece(
            honest: Callable[[bytes, int, Sequence[tuple[PeerId, ShardRef, int]]], Awaitable[PieceResult]],
            parent: bytes,
            piece: int,
            inputs: Sequence[tuple[PeerId, ShardRef, int]],
        ) -> PieceResult:
            result = await honest(parent, piece, inputs)
            forged = _forged(await node.store.get(result.shard), forge, pieces, piece)
            return replace(result, shard=await node.store.put(forged))

        _instead(node.merge_host, "sum_piece", sum_piece)

    return spoil


# --- bytes --------------------------------------------------------------------------------------------------------


class RottenStore:
    """A shard store as far as serving needs one, which hands out what it holds with one bit of each chunk turned."""

    def __init__(self, store: ShardStore) -> None:
        self.outline = store.outline
        self._store = store

    async def get(self, ref: ShardRef) -> bytes:
        """Almost the bytes of ``ref``."""
        data = bytearray(await self._store.get(ref))
        for end in (*range(CHUNK_BYTES, len(data), CHUNK_BYTES), len(data)):
            data[end - 1] ^= 1
        return bytes(data)


def _serve_rotten_shards(node: GossipNode) -> None:
    node.shard_server = ShardServer(
        transport=node.runtime.transport, store=cast(ShardStore, RottenStore(node.store)), ledger=node.ledger
    )


# --- words --------------------------------------------------------------------------------------------------------


def _scramble_signatures(node: GossipNode) -> None:
    def sign(honest: Callable[[str, bytes], bytes], purpose: str, payload: bytes) -> bytes:
        return bytes(len(honest(purpose, payload)))

    _instead(node.runtime.signer, "sign", sign)


def _boasting(**claims: object) -> Callable[[GossipNode], None]:
    def publish(honest: Callable[[str, Message], Notice], kind: str, body: Message) -> Notice:
        return honest(kind, replace(body, **claims) if isinstance(body, Heartbeat) else body)

    return lambda node: _instead(node.notices, "publish", publish)


def _replay_old_notices(node: GossipNode) -> None:
    """Of others their first words are offered, in every round, to everybody."""
    hoard: dict[PeerId, bytes] = {}

    def offer(honest: Callable[[bytes, float], Verdict], packed: bytes, now_s: float) -> Verdict:
        verdict = honest(packed, now_s)
        if verdict is Verdict.ACCEPTED and len(hoard) < node.limits.members_max:
            hoard.setdefault(author_of(packed), packed)
        return verdict

    def held(honest: Callable[[Iterable[bytes]], list[bytes]], keys: Iterable[bytes]) -> list[bytes]:
        return [hoard.get(author_of(packed), packed) for packed in honest(keys)]

    def compare(honest: Callable[[bytes], Difference], registers: bytes) -> Difference:
        difference = honest(registers)
        own = [packed for packed in difference.missing if author_of(packed) == node.local]
        return Difference(missing=[*own, *hoard.values()], wanted=difference.wanted)

    def author_of(packed: bytes) -> PeerId:
        return PeerId(decode(packed, Notice, bytes_max=PACKED_NOTICE_BYTES_MAX).author)

    _instead(node.notices, "offer", offer)
    _instead(node.notices, "held", held)
    _instead(node.notices, "compare", compare)


def _instead(part: object, method: str, lie: Callable[Concatenate[Callable[P, R], P], R]) -> None:
    """Have ``lie(honest, ...)`` answer for ``part.method(...)``, where ``honest`` is what answered before."""
    setattr(part, method, partial(lie, getattr(part, method)))


ATTACKERS: Mapping[str, Attacker] = MappingProxyType(
    {
        "nan-fragments": Attacker(
            "snapshots with a NaN in them", "non-finite", _serving_forged_fragments(with_a_nan)
        ),
        "short-fragments": Attacker(
            "snapshots that lack an element", "shape", _serving_forged_fragments(one_short)
        ),
        "huge-fragments": Attacker(
            "snapshots a million times as large", "norm", _serving_forged_fragments(a_million_times)
        ),
        "lopsided-fragments": Attacker(
            "snapshots with one tensor five times as large",
            "variance",
            _serving_forged_fragments(one_tensor_five_times),
        ),
        "turned-fragments": Attacker(
            "snapshots turned round, as large as may be",
            "opposed",
            _serving_forged_fragments(turned_round),
        ),
        "rotten-shards": Attacker("bytes that are not what they are called", "hash", _serve_rotten_shards),
        "scrambled-signatures": Attacker("signatures that prove nothing", "signature", _scramble_signatures),
        "replays": Attacker("others' old notices, over and over", "", _replay_old_notices),
        "boasts": Attacker(
            "a chain of merges that it cannot show",
            "",
            _boasting(head=b"h" * 32, head_height=1000, head_participants=1_000_000),
        ),
        "endless-run": Attacker(
            "a run without end, hardly begun", "", _boasting(step=0, steps_total=2**53, steps_per_s=1e-9)
        ),
        "empty-run": Attacker(
            "a run of no steps, taken fast", "", _boasting(step=0, steps_total=0, steps_per_s=1e9)
        ),
        "nan-inputs": Attacker(
            "NaN in what it contributes to merges", "non-finite", _contributing_forged_inputs(with_a_nan)
        ),
        "short-inputs": Attacker(
            "contributions to merges that lack an element", "shape", _contributing_forged_inputs(one_short)
        ),
        "huge-inputs": Attacker(
            "contributions to merges a million times as large",
            "norm",
            _contributing_forged_inputs(a_million_times),
        ),
        "turned-inputs": Attacker(
            "contributions to merges turned round, as large as may be",
            "opposed",
            _contributing_forged_inputs(turned_round),
        ),
        "wrong-sums": Attacker(
            "sums of merges one and a half times as large; noticed where merge.replicas is 2 or more",
            "equivocation",
            _publishing_forged_sums(one_and_a_half_times),
        ),
        "nan-sums": Attacker(
            "sums of merges with a NaN in them", "equivocation", _publishing_forged_sums(with_a_nan)
        ),
        "short-sums": Attacker(
            "sums of merges that lack an element", "shape", _publishing_forged_sums(one_short)
        ),
        "huge-sums": Attacker(
            "sums of merges a million times as large",
            "equivocation",
            _publishing_forged_sums(a_million_times),
        ),
    }
)
"""All hostile members, by the name scenarios use."""
