"""What a global merge must come to: the average of what was pledged, the same bits everywhere, taken over without loss.

Owns the checkers of promise S2 (docs/ARCHITECTURE.md, "A merge"): ``exact-average``, ``equal-bits`` and ``rebase``.
They recompute in numpy, from the weights they saw a node pledge, what the product computes in torch from shards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from gossip.merge_record import genesis_hash, owners
from gossip.messages import (
    CHUNK_BYTES,
    CommittedRecord,
    Contribution,
    MergeRecord,
    Outline,
    ShardRef,
    SignedContribution,
)
from gossip.store import ref_of
from netsim.checkers.base import Machine, Report, Watcher, World, short
from node.gossip_node import GossipNode
from node.merge_host import Adoption
from node.merge_values import Pledge as OwnPledge
from training.outer_state import OuterState, streams, updates_of
from training.pieces import Pieces
from training.run_spec import run_id
from training.schedules import Schedule

Values = npt.NDArray[np.float32]

LINKS_KEPT = 4
"""Of each member: what it pledged to the last so many links. A record is committed long before that."""
RECORDS_KEPT = 256
"""Records whose anchors are remembered; nobody goes back further."""


@dataclass(frozen=True, slots=True)
class Pledge:
    """What one life of one member put into one link: its weights at that moment."""

    contribution: Contribution
    values: Values


class Pledges:
    """Every pledge seen, by member and link. A member that dies and comes back may pledge to one link twice."""

    def __init__(self) -> None:
        self._by_peer: dict[str, OrderedDict[bytes, list[Pledge]]] = {}

    def add(self, parent: bytes, pledge: Pledge) -> None:
        """Remember a pledge."""
        links = self._by_peer.setdefault(pledge.contribution.peer, OrderedDict())
        links.setdefault(parent, []).append(pledge)
        while len(links) > LINKS_KEPT:
            links.popitem(last=False)

    def find(self, parent: bytes, contribution: Contribution) -> Pledge | None:
        """The pledge with that weight and those inputs."""
        wanted = contribution.weight, contribution.inputs
        for pledge in self._by_peer.get(contribution.peer, OrderedDict()).get(parent, []):
            if (pledge.contribution.weight, pledge.contribution.inputs) == wanted:
                return pledge
        return None


class ExactAverage(Watcher):
    """A committed anchor is the fp64 average, weights capped, members in order, of exactly what its members pledged.

    Each contribution is what its author pledged for that link, and the members are sorted, none named twice. Where
    merges go by updates, the anchor is where the one before and its update lead to, worked out anew.
    """

    name = "exact-average"

    def __init__(self, world: World, report: Report, pledges: Pledges) -> None:
        super().__init__(world, report)
        self._pledges = pledges
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        """Records that were checked."""
        self._updates = updates_of(world.spec.outer)
        self._states: OrderedDict[bytes, list[tuple[Values, Values] | None]] = OrderedDict()
        """By record, where merges go by updates: anchor and momentum of each piece, as far as its update was seen."""
        self._initial: Values | None = None
        self._points: dict[bytes, int] = {}
        """How many merge points lie behind the records whose states are known."""
        self._points_all = len(Schedule.of(world.spec).merge_points)

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See the weights that are pledged, each committed record, and each anchor that is taken."""
        host, pieces = node.merge_host, pieces_of(node)
        self._begin_alike(machine, pieces, host._genesis, host._state)
        pledged: list[Values] = []
        self.after(host, "_pledge", lambda values: pledged.append(values.numpy().copy()))

        def contribute(parent: bytes, moved: Sequence[int]) -> Callable[[Contribution | None], None]:
            def done(contribution: Contribution | None) -> None:
                if contribution is not None:
                    self._take_pledge(machine, pieces, parent, Pledge(contribution, pledged[-1]))

            return done

        self.watch(host, "contribute", contribute)
        chain = node.merger._chain
        self.after(
            chain, "_follow", lambda _, name: self._check_record(machine, pieces, name, chain.get(name))
        )
        self.after(host, "_adopted", lambda _, adoption: self._check_adoption(machine, pieces, adoption))

    def _begin_alike(
        self, machine: Machine, pieces: Pieces, genesis: bytes, initial: OuterState | None
    ) -> None:
        """Where the first updates are of the weights that all begin with, those are the same for all."""
        if initial is None:
            return
        weights = initial.anchor.numpy().copy()
        if self._initial is None:
            self._initial = weights
            at_rest = [(part, np.zeros_like(part)) for part in cut(pieces, weights)]
            self._states[genesis], self._points[genesis] = list(at_rest), 0
        elif not np.array_equal(self._initial, weights):
            self.fail("begins with other weights than the rest", machine.number)

    def _take_pledge(self, machine: Machine, pieces: Pieces, parent: bytes, pledge: Pledge) -> None:
        parts = cut(pieces, pledge.values)
        expected = [name_of(parts[piece].tobytes()) for piece in pledge.contribution.moved]
        as_weights = [ref.size for ref in pledge.contribution.inputs] == [ref.size for ref in expected]
        if (
            pledge.contribution.peer != machine.identity.peer
            or as_weights != self._by_weights(parent)
            or (as_weights and pledge.contribution.inputs != expected)
        ):
            self.fail(
                f"a contribution to link {short(parent)} that is not the weights pledged", machine.number
            )
        self._pledges.add(parent, pledge)

    def _by_weights(self, parent: bytes) -> bool:
        """Whether weights travel in the link after ``parent``."""
        at_first = parent == genesis_hash(run_id(self.world.spec))
        return self._updates is None or (at_first and self._initial is None)

    def _check_record(
        self, machine: Machine, pieces: Pieces, name: bytes, committed: CommittedRecord | None
    ) -> None:
        """A record that ``machine`` holds from now on, under the name that its chain has worked out."""
        if committed is None or name in self._seen:
            return
        self._seen[name] = None
        while len(self._seen) > RECORDS_KEPT:
            self._seen.popitem(last=False)
        record = committed.record
        names = [contribution.peer for contribution in record.contributors]
        if names != sorted(set(names)):
            self.fail(f"record {short(name)} with contributors out of order, or named twice", machine.number)
        for contribution in record.contributors:
            pledged = self._pledges.find(record.parent, contribution)
            if self.is_honest(contribution.peer) and pledged is None:
                self.fail(
                    f"record {short(name)} with a contribution that {contribution.peer} never pledged to it",
                    machine.number,
                )
        if self._updates is not None and record.updates:
            return self._check_updates(machine, pieces, record, name)
        summed_by = owners(record.parent, names, len(pieces), self.world.spec.merge.replicas)
        for piece, result in enumerate(record.results):
            # What only hostile members have summed, nobody can refute.
            if any(map(self.is_honest, summed_by[piece])):
                self._check_result(machine, pieces, record, piece, result, name)
        if self._updates is not None:
            at_rest = [
                np.frombuffer(data, np.float32) for ref in record.results if (data := self._bytes_of(ref))
            ]
            if len(at_rest) == len(pieces):
                self._remember_state(name, record, [(values, np.zeros_like(values)) for values in at_rest])

    def _check_result(
        self,
        machine: Machine,
        pieces: Pieces,
        record: MergeRecord,
        piece: int,
        result: ShardRef,
        name: bytes,
    ) -> None:
        inputs = [self._input(pieces, record.parent, one, piece) for one in record.contributors]
        known = [values for values in inputs if values is not None]
        if len(known) < len(inputs):
            return
        expected = average(known, [contribution.weight for contribution in record.contributors])
        if result != name_of(expected.tobytes()):
            self.fail(
                f"piece {piece} of record {short(name)} is not the average of its inputs",
                machine.number,
            )

    def _check_updates(self, machine: Machine, pieces: Pieces, record: MergeRecord, name: bytes) -> None:
        """Whether each result is the state that its update leads to from the parent's."""
        assert self._updates is not None
        grown, warmup = 1.0, self._updates.warmup
        if warmup:
            if record.parent not in self._points:
                return
            grown = min(1.0, self._points[record.parent] / self._points_all / warmup)
        rate, memory = 1.0 + (self._updates.rate - 1.0) * grown, self._updates.memory * grown
        after = list(self._states.get(record.parent) or [None] * len(pieces))
        for piece, update in zip(record.moved, record.updates, strict=True):
            result, state, data = record.results[piece], after[piece], self._bytes_of(update)
            if state is None or data is None:
                told = self._bytes_of(result)
                after[piece] = None if told is None else halves(told)
                continue
            delta = self._updates.codec.decode(data, pieces.size(piece)).numpy()
            after[piece] = led_to = stepped(*state, delta, rate=rate, memory=memory)
            if result != name_of(np.concatenate(led_to).tobytes()):
                self.fail(
                    f"piece {piece} of record {short(name)} is not what its update leads to", machine.number
                )
        self._remember_state(name, record, after)

    def _remember_state(
        self, name: bytes, record: MergeRecord, state: list[tuple[Values, Values] | None]
    ) -> None:
        self._states[name], self._points[name] = state, record.point
        while len(self._states) > LINKS_KEPT:
            forgotten, _ = self._states.popitem(last=False)
            del self._points[forgotten]

    def _check_adoption(self, machine: Machine, pieces: Pieces, adoption: Adoption) -> None:
        parts = cut(pieces, adoption.anchor.numpy())
        if adoption.record.updates:
            known = self._states.get(adoption.record_hash, [None] * len(parts))
            wrong = any(
                state is not None and not np.array_equal(state[0], part)
                for state, part in zip(known, parts, strict=True)
            )
        else:
            wrong = [name_of(part.tobytes()) for part in parts] != adoption.record.results
        if wrong:
            self.fail(
                f"the anchor taken for record {short(adoption.record_hash)} is not its results",
                machine.number,
            )

    def _input(
        self, pieces: Pieces, parent: bytes, contribution: SignedContribution, piece: int
    ) -> Values | None:
        """What one contributor put into one fragment; None when it is a stranger's and nobody honest holds it."""
        if (pledge := self._pledges.find(parent, contribution)) is not None:
            return cut(pieces, pledge.values)[piece]
        ref = contribution.inputs[contribution.moved.index(piece)]
        data = self._bytes_of(ref)
        return None if data is None else np.frombuffer(data, np.float32)

    def _bytes_of(self, ref: ShardRef) -> bytes | None:
        """A shard, if somebody has it at hand."""
        found = (at_hand(node, ref) for _, node in self.running())
        return next((data for data in found if data is not None), None)


class EqualBits(Watcher):
    """S2: whoever takes, holds or reports the anchor of one record has the same bits, in every life."""

    name = "equal-bits"
    every_s = 5.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._hashes: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()
        """Record hash -> hash of the anchor, and the machine that was first to hold it."""
        self._held: dict[int, Adoption] = {}
        self._reported: dict[int, object] = {}

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See each anchor that is taken, and found again after a restart."""
        self._held.pop(machine.number, None)

        def adopted(_: None, adoption: Adoption) -> None:
            self._held[machine.number] = adoption
            self._compare(machine, adoption.record_hash, hash_of(adoption.anchor), "took")

        self.after(node.merge_host, "_adopted", adopted)

    def look(self, now_s: float) -> None:
        """What nodes report of their last merge."""
        for machine, node in self.running():
            report = node.merges.last
            if report is not None and self._reported.get(machine.number) is not report:
                self._reported[machine.number] = report
                self._compare(
                    machine, bytes.fromhex(report.record), bytes.fromhex(report.weights_hash), "reports"
                )

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """Whether the anchor was left alone since it was taken."""
        self._check_held(machine, node)

    def finished(self, now_s: float) -> None:
        """The same of all that still run."""
        self.look(now_s)
        for machine, node in self.running():
            self._check_held(machine, node)

    def _check_held(self, machine: Machine, node: GossipNode) -> None:
        adoption = self._held.get(machine.number)
        if adoption is not None and node.merge_host.anchor is adoption.anchor:
            self._compare(machine, adoption.record_hash, hash_of(adoption.anchor), "holds")

    def _compare(self, machine: Machine, record: bytes, weights: bytes, what: str) -> None:
        first, by = self._hashes.setdefault(record, (weights, machine.number))
        if first != weights:
            self.fail(
                f"{what} {short(weights)} for record {short(record)}, machine {by} {short(first)}",
                machine.number,
            )
        while len(self._hashes) > RECORDS_KEPT:
            self._hashes.popitem(last=False)


class Rebase(Watcher):
    """No step is lost or counted twice: ``live <- anchor + (live - own contribution)``, and it is the one pledged.

    Of a contribution that a codec has thinned out, what others can read in its bytes. Who is not in the average keeps
    what it has learned since the anchor before, if it stood on that, and else starts from the anchor itself.
    """

    name = "rebase"

    def __init__(self, world: World, report: Report, pledges: Pledges) -> None:
        super().__init__(world, report)
        self._pledges = pledges
        self._updates = updates_of(world.spec.outer)

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See what is put under the live weights, and what they are before and after."""
        host, trainer, pieces = node.merge_host, node.trainer, pieces_of(node)
        pledged: dict[bytes, list[ShardRef]] = {}
        """What this life has pledged to each link since its weights were last put on an anchor."""
        moved: list[torch.Tensor] = []
        """The anchor that they were put on during the present call."""
        owns: list[torch.Tensor] = []
        """Its own part in it, as far as that can be told."""

        def take(
            record: MergeRecord,
            record_hash: bytes,
            kept: OwnPledge | None,
            *,
            rebase: bool,
            duration_s: float,
        ) -> Callable[[None], None]:
            own = [c for c in record.contributors if c.peer == machine.identity.peer]
            pledge = self._pledges.find(record.parent, own[0]) if own else None
            if kept is None:
                # A pledge of an earlier life says nothing of weights that were resumed from a checkpoint.
                if rebase and pledge is not None and pledged.get(record.parent) == own[0].inputs:
                    self.fail(f"forgot its own part in record {short(record_hash)}", machine.number)
            elif pledge is None or kept.values.numpy().tobytes() != pledge.values.tobytes():
                self.fail(
                    f"took something else for its own part in record {short(record_hash)}", machine.number
                )
            if rebase:
                pledged.clear()
            moved.clear()
            owns.clear()
            if pledge is not None and kept is not None:
                if kept.last and trainer.step < trainer.spec.train.steps:
                    self.fail("drops what it has not told yet, before its end", machine.number)
                owns.append(self._readable(node, pieces, record, pledge, last=kept.last))

            def done(_: None) -> None:
                if rebase and not moved:
                    self.fail("took an anchor and left its live weights behind", machine.number)

            return done

        def rebase(
            anchor: torch.Tensor, stood: torch.Tensor | None, of: Sequence[int]
        ) -> Callable[[None], None]:
            known = None if host._state is None else host._state.anchor
            if not owns and stood is not None and stood is not known:
                self.fail("reckons its progress from something else than its anchor", machine.number)
            before = trainer.read()
            expected = before.clone()
            for piece in of:
                at = slice(*pieces.bounds[piece : piece + 2])
                if owns and (stood is None or not torch.equal(stood[at], owns[0][at])):
                    self.fail("reckons its progress from something else than what it told", machine.number)
                expected[at] = anchor[at] if stood is None else anchor[at] + (before[at] - stood[at])

            def done(_: None) -> None:
                moved.append(anchor)
                if not torch.equal(trainer.read(), expected):
                    self.fail("live weights that are not the anchor and the steps since", machine.number)

            return done

        def contributed(contribution: Contribution | None, parent: bytes, _: Sequence[int]) -> None:
            if contribution is not None:
                pledged[parent] = contribution.inputs

        self.after(host, "contribute", contributed)
        self.watch(host, "_take", take)
        self.watch(host, "_rebase", rebase)

    def _readable(
        self, node: GossipNode, pieces: Pieces, record: MergeRecord, pledge: Pledge, *, last: bool
    ) -> torch.Tensor:
        """The weights that others read in the bytes of a pledge, from the anchor before and these bytes alone."""
        told, state = torch.from_numpy(pledge.values.copy()), node.merge_host._state
        if self._updates is None or not record.updates or state is None or last:
            return told
        contribution = pledge.contribution
        for piece, ref in zip(contribution.moved, contribution.inputs, strict=True):
            at = slice(*pieces.bounds[piece : piece + 2])
            if not self._updates.codec.lossless and (data := at_hand(node, ref)) is not None:
                told[at] = state.anchor[at] - self._updates.codec.decode(data, pieces.size(piece))
        return told


def at_hand(node: GossipNode, ref: ShardRef) -> bytes | None:
    """A shard that this node has in memory; looking does not count as use."""
    return node.store._volatile.get(ref) or node.store._cache.get(ref)


def average(inputs: Sequence[Values], weights: Sequence[int]) -> Values:
    """sum(w * values) / sum(w) in fp64, in the order given, no weight above twice the median; rounded once to fp32."""
    cap = 2 * float(np.median(weights))
    total = np.zeros(inputs[0].shape, np.float64)
    capped = [min(float(weight), cap) for weight in weights]
    for values, weight in zip(inputs, capped, strict=True):
        total += values.astype(np.float64) * weight
    return (total / sum(capped)).astype(np.float32)


def pieces_of(node: GossipNode) -> Pieces:
    """Where merges cut the model."""
    return Pieces.of(node.trainer.layout, streaming=streams(node.spec.outer))


def halves(state: bytes) -> tuple[Values, Values]:
    """Anchor and momentum."""
    values = np.frombuffer(state, np.float32)
    return values[: len(values) // 2], values[len(values) // 2 :]


def stepped(
    anchor: Values, momentum: Values, delta: Values, *, rate: float, memory: float
) -> tuple[Values, Values]:
    """Nesterov's step in fp32: where an anchor goes, and its momentum, after an average pseudo-gradient.

    The difference is first made a mean of weights, which rounds it, as whoever averages weights would.
    """
    mean = anchor - delta
    moved = anchor - mean
    momentum = momentum * np.float32(memory) + moved
    return mean + (moved * np.float32(1.0 - rate) - momentum * np.float32(rate * memory)), momentum


def cut(pieces: Pieces, values: Values) -> list[Values]:
    """The pieces of a flat vector."""
    return [values[pieces.bounds[piece] : pieces.bounds[piece + 1]] for piece in range(len(pieces))]


def name_of(data: bytes) -> ShardRef:
    """The name of a shard with these bytes."""
    chunks = [
        blake3(data[start : start + CHUNK_BYTES]).digest() for start in range(0, len(data), CHUNK_BYTES)
    ]
    return ref_of(Outline(size=len(data), chunks=chunks))


def hash_of(weights: torch.Tensor) -> bytes:
    """The hash by which nodes report weights: BLAKE3 of the little-endian fp32 values."""
    return blake3(weights.numpy().tobytes()).digest()
