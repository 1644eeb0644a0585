"""What the shards of merges hold, and the arithmetic on them: nothing of who agrees on what, or when.

Owns the bytes of contributions, sums and results, made and read beside training. Where merges move by updates it also
owns what the sums that this node made for everybody have left out so far, a debt settled by the caller, who knows what
has become of a sum.

Bits: everything that must be equal on all members is computed on the CPU from shard bytes, in the order of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from gossip.ledger import PeerLedger
from gossip.merge_shape import MergeShape
from gossip.merge_work import InputRefused, ResultRefused
from gossip.messages import MergeRecord, PieceResult, ShardRef
from gossip.store import ShardStore
from node.compute import Compute
from node.costs import Costs
from p2p.transport import PeerId
from training.codecs.plain import FP32
from training.layout import ParameterLayout
from training.merge_math import weighted_average
from training.mixing import Refused, Yardstick, check_peer_values, decoded
from training.outer_state import OuterState, Updates, decode_state, encode_state, state_bytes
from training.outliers import unlike
from training.pieces import Pieces
from training.spec_sections import Outliers

T = TypeVar("T")
SOUND_KEPT = 256
"""Results remembered as sound within one link: more are only seen where many proposals fail."""


@dataclass(frozen=True, slots=True, eq=False)
class Pledge:
    """What this node has for one link: its live weights of one moment, and what was learned for them."""

    values: Tensor
    weight: int
    last: bool
    """Whether no other will follow that could tell of what this one leaves out."""
    told: dict[int, Tensor] = field(default_factory=dict)
    """By piece that a codec has thinned out: the weights that others can read in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The inputs of one sum, in the order of summation, and what is needed to judge them."""

    piece: int
    shards: Sequence[tuple[PeerId, ShardRef, int]]
    own: Tensor
    """This node's weights in that piece, the measure for others': pledged, or for a mere checker live."""
    local: PeerId
    beginner: bool
    """Whether those may be no measure at all."""
    elders: frozenset[PeerId]
    """Who has learned so much more that they are none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """What one sum comes to, not yet stored."""

    result: bytes
    """The average, or the state that the update leads to."""
    update: bytes | None = None
    owed: Tensor | None = None
    """What the update leaves out."""
    sound: bool = False
    """Whether the result was measured, and is in proportion to this node's weights."""


class MergeValues:
    """Makes and reads the shards of merges. ``updates`` is None where weights themselves always travel.

    ``alike``: whether all members begin with the same weights. ``streaming``: whether merges but the first and the last
    of the run's ``points`` move one fragment each. ``owes``: whether sums that this node makes may include what it left
    out of earlier ones. Where several members make the same sum they must not.
    """

    def __init__(
        self,
        *,
        layout: ParameterLayout,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        ledger: PeerLedger,
        updates: Updates | None,
        alike: bool,
        outliers: Outliers,
        streaming: bool,
        points: int,
        owes: bool,
    ) -> None:
        self.pieces = Pieces.of(layout, streaming=streaming)
        self._compute = compute
        self._costs = costs
        self._store = store
        self._ledger = ledger
        self._updates = updates
        self._owes = owes
        self._outliers = outliers
        self._owed: dict[int, Tensor] = {}
        """By this node's sums, piece by piece."""
        self._sums_made: dict[ShardRef, tuple[int, Tensor]] = {}
        """What it will owe if the sum in that shard is the one that counts."""
        self._applied: dict[tuple[int, ShardRef], ShardRef] = {}
        """Where updates of pieces of ``_applied_to`` have led to: a merge asks for it up to three times."""
        self._applied_to: OuterState | None = None
        self._found_sound: set[tuple[int, ShardRef]] = set()
        """Results of this link: a merge asks for the same ones when they are made, proposed and accepted."""
        self._points = points
        self.shape = _shape(self.pieces, updates, alike, streaming, points)

    async def offer(
        self, base: OuterState | None, pledge: Pledge, moved: Sequence[int], owner: str
    ) -> list[ShardRef]:
        """Store the ``moved`` pieces as they are, or without what they have in common with ``base``; pinned."""
        updates = self._updates

        def encode() -> list[bytes]:
            data = []
            for piece in moved:
                values = self.pieces.cut(pledge.values, piece)
                if updates is None or base is None:
                    data.append(FP32.encode(values))
                    continue
                anchor = self.pieces.cut(base.anchor, piece)
                encoded, delta = updates.encode(anchor - values)
                if not updates.codec.lossless:
                    pledge.told[piece] = anchor - delta
                data.append(encoded)
            return data

        encoded = await self._beside(encode)
        return [await self._store.put(data, owner=owner, volatile=True) for data in encoded]

    def accounted_for(self, pledge: Pledge) -> Tensor:
        """What of the pledged weights an average has that counts them: what is beyond has yet to be told."""
        values = pledge.values.clone()
        if not pledge.last:
            for piece, told in pledge.told.items():
                self.pieces.cut(values, piece).copy_(told)
        return values

    async def sum(self, base: OuterState | None, inputs: Inputs) -> PieceResult:
        """Store the weighted average, and what it leads to where it is one of updates.

        Raises InputRefused naming the contributor whose values are not finite, out of all proportion, or unlike those
        of all others.
        """
        arrived = [(peer, await self._store.get(ref), weight) for peer, ref, weight in inputs.shards]
        owed = self._owed.get(inputs.piece)
        made = await self._compute.run(
            lambda: self._made(base, inputs, arrived, owed),
            lane="side",
            cost_s=self._costs.mix_s + self._costs.copy_s,
        )
        if isinstance(made, tuple):
            peer, refused = made
            self._ledger.note(peer, refused.code, refused.text)
            raise InputRefused(peer, refused.text)
        if base is None or made.update is None:
            return PieceResult(piece=inputs.piece, shard=await self._store.put(made.result), update=None)
        ref = await self._store.put(made.update, volatile=True)
        if self._owes and made.owed is not None:
            self._sums_made[ref] = inputs.piece, made.owed
        self._start_from(base)
        shard = await self._keep_applied(base, inputs.piece, ref, made.result, sound=made.sound)
        return PieceResult(piece=inputs.piece, shard=shard, update=ref)

    def _made(
        self,
        base: OuterState | None,
        inputs: Inputs,
        arrived: Sequence[tuple[PeerId, bytes, int]],
        owed: Tensor | None,
    ) -> _Sum | tuple[PeerId, Refused]:
        """Everything that a sum takes, in one go: each change of threads costs training more than the arithmetic."""
        average = self._average(base, inputs, arrived)
        if isinstance(average, tuple):
            return average
        updates, piece = self._updates, inputs.piece
        if updates is None or base is None:
            return _Sum(FP32.encode(average))
        update, owed = updates.encode_sum(average, torch.zeros_like(average) if owed is None else owed)
        delta = updates.codec.decode(update, len(average))
        state = encode_state(updates.apply(self._piece_of(base, piece), delta))
        fault = self._fault_of(piece, state, inputs.own, beginner=inputs.beginner)
        return _Sum(state, update, owed, sound=fault is None)

    def _average(
        self,
        base: OuterState | None,
        inputs: Inputs,
        arrived: Sequence[tuple[PeerId, bytes, int]],
    ) -> Tensor | tuple[PeerId, Refused]:
        updates, size = self._updates, self.pieces.size(inputs.piece)
        values_of: dict[PeerId, Tensor] = {}
        weights_of: dict[PeerId, Tensor] = {}
        """What each contributor has come to, as far as its input tells."""
        for peer, data, _ in arrived:
            values = updates.decode(data, size) if updates and base else decoded(FP32, data, size)
            if isinstance(values, Refused):
                return peer, values
            values_of[peer] = values
            weights_of[peer] = (
                self.pieces.cut(base.anchor, inputs.piece) - values if updates and base else values
            )
        # One's own are the measure for others'. They are checked first, lest a broken node take all others for broken.
        measure = Yardstick.of(inputs.own, self.pieces.spans(inputs.piece))
        for peer in sorted(weights_of, key=lambda peer: peer != inputs.local):
            if refused := measure.check(weights_of[peer], beginner=peer in inputs.elders):
                return peer, refused
        if self._outliers == "leave-out":
            told = [values_of[peer] for peer, _, _ in arrived]
            for number, refused in unlike(told, [weight for _, _, weight in arrived]).items():
                return arrived[number][0], refused
        return weighted_average([(values_of[peer], weight) for peer, _, weight in arrived])

    async def apply(
        self, base: OuterState, piece: int, update: ShardRef, own: Tensor, *, beginner: bool
    ) -> ShardRef:
        """Store the state of ``piece`` that ``update``, which is in the store, leads to. Raises ResultRefused.

        Durable at once: whoever applies an update is about to accept its record, and would write it a second time. It
        is measured at once too, by ``own`` weights; what ``check`` would refuse is left to be refused there.
        """
        self._start_from(base)
        if (known := self._applied.get((piece, update))) is not None and self._store.holds(known):
            return known
        assert self._updates is not None
        updates, data = self._updates, await self._store.get(update)

        def work_out() -> tuple[bytes, bool] | Refused:
            delta = updates.decode(data, self.pieces.size(piece))
            if isinstance(delta, Refused):
                return delta
            state = encode_state(updates.apply(self._piece_of(base, piece), delta))
            return state, self._fault_of(piece, state, own, beginner=beginner) is None

        led_to = await self._beside(work_out)
        if isinstance(led_to, Refused):
            raise ResultRefused(led_to.code, led_to.text)
        state, sound = led_to
        return await self._keep_applied(base, piece, update, state, sound=sound)

    def _start_from(self, base: OuterState) -> None:
        if base is not self._applied_to:
            self._applied.clear()
            self._applied_to = base

    async def _keep_applied(
        self, base: OuterState, piece: int, update: ShardRef, state: bytes, *, sound: bool
    ) -> ShardRef:
        led_to = await self._store.put(state, sync=True)
        if base is self._applied_to:
            self._applied[piece, update] = led_to
        if sound:
            self._remember_sound(piece, led_to)
        return led_to

    def _piece_of(self, base: OuterState, piece: int) -> OuterState:
        return base.of(*self.pieces.bounds[piece : piece + 2])

    async def check(self, piece: int, ref: ShardRef, own: Tensor, *, beginner: bool) -> None:
        """Raise ResultRefused unless this result, in the store, is finite and in proportion to ``own`` weights."""
        if (piece, ref) in self._found_sound:
            return
        data = await self._store.get(ref)
        if refused := await self._beside(lambda: self._fault_of(piece, data, own, beginner=beginner)):
            raise ResultRefused(refused.code, refused.text)
        self._remember_sound(piece, ref)

    def _fault_of(self, piece: int, result: bytes, own: Tensor, *, beginner: bool) -> Refused | None:
        state = decode_state(result, self.pieces.size(piece))
        if isinstance(state, Refused):
            return state
        return check_peer_values(own, state.anchor, self.pieces.spans(piece), beginner=beginner)

    def _remember_sound(self, piece: int, ref: ShardRef) -> None:
        if len(self._found_sound) >= SOUND_KEPT:
            self._found_sound.clear()
        self._found_sound.add((piece, ref))

    async def assemble(self, record: MergeRecord) -> OuterState | Refused:
        """The state that ``record`` left, whose results are in the store, or what is wrong with them."""
        stored = [await self._store.get(ref) for ref in record.results]

        def decode() -> OuterState | Refused:
            parts: list[OuterState] = []
            for piece, data in enumerate(stored):
                part = decode_state(data, self.pieces.size(piece))
                if isinstance(part, Refused):
                    return part
                parts.append(part)
            return OuterState.joined(parts, passed=record.point / self._points)

        return await self._beside(decode)

    def settle(self, record: MergeRecord) -> None:
        """A link is decided: which of this node's sums counted, if any."""
        for update in record.updates:
            if update in self._sums_made:
                piece, owed = self._sums_made[update]
                self._owed[piece] = owed
        self._sums_made.clear()
        self._found_sound.clear()

    async def _beside(self, work: Callable[[], T]) -> T:
        return await self._compute.run(work, lane="side", cost_s=self._costs.copy_s)


def _shape(pieces: Pieces, updates: Updates | None, alike: bool, streaming: bool, points: int) -> MergeShape:
    sizes = pieces.sizes
    weights = tuple(FP32.size_bytes(size) for size in sizes)
    if updates is None:
        return MergeShape(weights)
    return MergeShape(
        weights,
        updates=tuple(updates.codec.size_bytes(size) for size in sizes),
        states=tuple(state_bytes(size) for size in sizes),
        alike=alike,
        turns=pieces.turns if streaming else (),
        points=points,
    )
