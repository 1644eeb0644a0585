"""The data side of a merge: owners sum pieces, everybody gets hold of the results.

Owns which inputs are pulled from whom, how many at once and until when, and the sums made for the present link.
Decides nothing about the chain. What weights are and how they are averaged is the host's business: here they are
shards with names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from gossip.merge_record import RecordRefused, capped_weights, owners
from gossip.messages import (
    CommittedRecord,
    Contribution,
    MergePlan,
    MergeRecord,
    MergeResults,
    PieceResult,
    ShardRef,
    SignedContribution,
)
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.transport import PeerId


class InputRefused(GossamerError):
    """A contributor's values must not enter an average: not finite, of another shape, out of all proportion."""

    def __init__(self, peer: PeerId, what: str) -> None:
        super().__init__(what)
        self.peer = peer


class ResultRefused(GossamerError):
    """A result must not be adopted, whoever vouches for it: not finite, of another shape, out of all proportion."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


class MergeHost(Protocol):
    """What a merge asks of the node whose weights it averages."""

    async def contribute(self, parent: bytes, moved: Sequence[int]) -> Contribution | None:
        """A snapshot of those pieces of the live weights, stored and pinned; None when there is nothing to contribute.

        Raises GossamerError or OSError when it cannot be stored.
        """

    async def sum_piece(
        self, parent: bytes, piece: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]
    ) -> PieceResult:
        """Store what the weighted average of (peer, shard, weight) inputs, all in the store, in that order, comes to.

        Raises InputRefused naming the peer whose values must be left out, GossamerError or OSError otherwise.
        """

    def holds_anchor(self, record: bytes) -> bool:
        """Whether updates can be applied here to the results of ``record``."""

    async def apply_update(self, parent: bytes, piece: int, update: ShardRef) -> ShardRef:
        """Store the result that ``update``, which is in the store, makes of ``piece`` of the results of ``parent``.

        Raises ResultRefused for an update of no form, GossamerError or OSError otherwise.
        """

    async def check_result(self, parent: bytes, piece: int, ref: ShardRef) -> None:
        """Raise ResultRefused unless this result of the link after ``parent``, in the store, may be adopted."""

    async def fetch(
        self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float, *, volatile: bool
    ) -> None:
        """Bring a shard into the store, from any of ``holders``. Raises GossamerError or OSError.

        ``volatile``: it is of no use to a later life of this node.
        """

    def hold(self, record: MergeRecord) -> None:
        """Let go of no result of ``record``, as far as they are in the store, before its link is decided."""

    async def secure(self, record: MergeRecord) -> None:
        """Hold all results, which are in the store, and have them survive power loss.

        Raises GossamerError or OSError when they would not.
        """

    async def adopt(
        self, committed: CommittedRecord, record_hash: bytes, contributed: bool, *, duration_s: float
    ) -> None:
        """Take the results, which are in the store, as the anchor.

        Raises GossamerError or OSError to be asked again.

        ``contributed``: this node's own snapshot for the record's parent is in the average.
        """

    def alive(self) -> Sequence[PeerId]:
        """Members believed alive, this node included."""

    def unheard_s(self, peer: PeerId) -> float:
        """Seconds since anything new was heard from ``peer``."""


class MergeWork:
    """Pulls and sums for one node."""

    def __init__(
        self,
        *,
        local: PeerId,
        host: MergeHost,
        replicas: int,
        limits: Limits,
    ) -> None:
        self._local = local
        self._host = host
        self._replicas = replicas
        self._fetches = trio.CapacityLimiter(limits.fetches_max)
        self._sums: dict[tuple[int, tuple[bytes, ...]], PieceResult] = {}
        """Sums made for the present link, by piece and the signatures of what went in."""
        self._summing = trio.CancelScope()
        self._foreseeing = trio.CancelScope()
        self._arrivals: WeakValueDictionary[ShardRef, trio.Lock] = WeakValueDictionary()
        """Held while a result is brought here, so that nobody brings it a second time."""

    def forget(self) -> None:
        """The link is decided: its sums are of no more use."""
        self._sums.clear()

    async def sum_owned(self, plan: MergePlan) -> MergeResults:
        """Sum the pieces that are ours under ``plan``, which was checked."""
        self._summing.cancel()  # A proposer that plans anew does not wait for the old plan any more.
        chosen = self._owners(plan.parent, plan.contributors)
        owned = [piece for piece, peers in chosen.items() if self._local in peers]
        results: list[PieceResult] = []
        missing: set[PeerId] = set()

        async def sum_one(piece: int) -> None:
            result = await self._sum(plan.parent, piece, plan.contributors, plan.timeout_s, missing)
            if result is not None:
                results.append(result)

        with trio.CancelScope() as self._summing:
            async with trio.open_nursery() as nursery:
                for piece in owned:
                    nursery.start_soon(sum_one, piece)
        return MergeResults(results=sorted(results, key=lambda result: result.piece), missing=sorted(missing))

    async def recompute(
        self, parent: bytes, piece: int, contributors: Sequence[SignedContribution], timeout_s: float
    ) -> PieceResult | None:
        """The sum of ``piece`` made here, whoever owns it; None when an input cannot be had."""
        return await self._sum(parent, piece, contributors, timeout_s, set())

    async def obtain(self, record: MergeRecord, holders: Sequence[PeerId], timeout_s: float) -> None:
        """Have every result of ``record`` in the store, from its owners or ``holders``. Raises GossamerError."""
        summed_by = self._owners(record.parent, record.contributors)
        failures: list[GossamerError] = []

        async def obtain_one(piece: int) -> None:
            candidates = [
                peer for peer in dict.fromkeys([*summed_by.get(piece, []), *holders]) if peer != self._local
            ]
            try:
                await self._obtain(record, piece, candidates, timeout_s)
            except GossamerError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for piece in range(len(record.results)):
                nursery.start_soon(obtain_one, piece)
        if failures:
            raise failures[0]

    def to_obtain(self, record: MergeRecord) -> list[ShardRef]:
        """The shards that ``obtain`` brings for ``record``: updates where they can be applied, or else results."""
        by_update = self._host.holds_anchor(record.parent)
        updates = [_update(record, piece) if by_update else None for piece in range(len(record.results))]
        return [update or result for update, result in zip(updates, record.results, strict=True)]

    async def foresee(self, record: MergeRecord, timeout_s: float) -> None:
        """Bring what their owners have of the results, in case ``record`` is proposed; the last foreseen one alone."""
        self._foreseeing.cancel()
        with trio.CancelScope() as self._foreseeing, contextlib.suppress(GossamerError):
            await self.obtain(record, (), timeout_s)

    async def verify_and_obtain(
        self, record: MergeRecord, disputed: Collection[int], holders: Sequence[PeerId], timeout_s: float
    ) -> None:
        """Have every result in the store, and refuse the record if a sum made here says otherwise.

        Raises RecordRefused for a wrong result, GossamerError for one that cannot be had.
        """
        for piece in disputed:
            await self._sum(record.parent, piece, record.contributors, timeout_s, set())
        for piece in record.moved:
            own = self._sums.get(_key(piece, record.contributors))
            if piece in disputed and own is None:
                raise GossamerError(f"the inputs of disputed piece {piece} cannot be had")
            if own is not None and (own.shard, own.update) != (record.results[piece], _update(record, piece)):
                raise RecordRefused(
                    "equivocation", f"the record's piece {piece} is not the sum of its inputs"
                )
        await self.obtain(record, holders, timeout_s)
        for piece in record.moved:
            await self._host.check_result(record.parent, piece, record.results[piece])

    async def inspect(self, record: MergeRecord, timeout_s: float) -> dict[int, GossamerError]:
        """What keeps each piece of ``record`` from being proposed, where something does; results come to the store.

        A ResultRefused is the owner's fault; any other error says that the result cannot be had.
        """
        summed_by = self._owners(record.parent, record.contributors)
        faults: dict[int, GossamerError] = {}

        async def inspect_one(piece: int) -> None:
            result = record.results[piece]
            try:
                owned_by = [peer for peer in summed_by[piece] if peer != self._local]
                await self._obtain(record, piece, owned_by, timeout_s)
                await self._host.check_result(record.parent, piece, result)
            except GossamerError as error:
                faults[piece] = error

        async with trio.open_nursery() as nursery:
            for piece in record.moved:
                nursery.start_soon(inspect_one, piece)
        return faults

    def _owners(self, parent: bytes, contributors: Sequence[SignedContribution]) -> dict[int, list[PeerId]]:
        """Who sums each of the pieces that these contributions are to move."""
        moved, names = contributors[0].moved, [contribution.peer for contribution in contributors]
        return dict(zip(moved, owners(parent, names, len(moved), self._replicas), strict=True))

    async def _obtain(
        self, record: MergeRecord, piece: int, holders: Sequence[PeerId], timeout_s: float
    ) -> None:
        """Have one result in the store: made of its update where that can be had and applied, or else as it is.

        Raises ResultRefused where the update leads to something else, GossamerError when neither can be had.
        """
        arrival = self._arrivals.setdefault(record.results[piece], trio.Lock())
        async with arrival:
            await self._bring(record, piece, holders, timeout_s)

    async def _bring(
        self, record: MergeRecord, piece: int, holders: Sequence[PeerId], timeout_s: float
    ) -> None:
        result, update = record.results[piece], _update(record, piece)
        if update is not None and self._host.holds_anchor(record.parent):
            try:
                await self._fetch(update, holders, timeout_s, volatile=True)
                made = await self._host.apply_update(record.parent, piece, update)
            except ResultRefused:
                raise
            except (GossamerError, OSError):
                made = None
            if made is not None:
                if made != result:
                    raise ResultRefused(
                        "equivocation", f"the update of piece {piece} leads to something else"
                    )
                return
        await self._fetch(result, holders, timeout_s, volatile=False)

    async def _sum(
        self,
        parent: bytes,
        piece: int,
        contributors: Sequence[SignedContribution],
        timeout_s: float,
        missing: set[PeerId],
    ) -> PieceResult | None:
        """The sum of ``piece``; None, and the culprits added to ``missing``, when there is none."""
        key = _key(piece, contributors)
        if key in self._sums:
            return self._sums[key]
        lacking: set[PeerId] = set()
        place = contributors[0].moved.index(piece)

        async def pull(contribution: SignedContribution) -> None:
            peer = PeerId(contribution.peer)
            try:
                await self._fetch(contribution.inputs[place], [peer], timeout_s, volatile=True)
            except GossamerError:
                lacking.add(peer)

        async with trio.open_nursery() as nursery:
            for contribution in contributors:
                if contribution.peer != self._local:
                    nursery.start_soon(pull, contribution)
        if not lacking:
            weights = capped_weights([contribution.weight for contribution in contributors])
            inputs = [
                (PeerId(contribution.peer), contribution.inputs[place], weight)
                for contribution, weight in zip(contributors, weights, strict=True)
            ]
            try:
                self._sums[key] = await self._host.sum_piece(parent, piece, inputs)
            except InputRefused as refused:
                lacking.add(refused.peer)
            except (GossamerError, OSError):
                return None  # This node's own trouble, a full disk perhaps: nobody else is to blame.
        missing |= lacking
        return self._sums.get(key)

    async def _fetch(
        self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float, *, volatile: bool
    ) -> None:
        """Raises GossamerError when ``ref`` is not here within ``timeout_s``, waiting for a slot included."""
        with trio.move_on_after(timeout_s) as deadline:
            async with self._fetches:
                try:
                    await self._host.fetch(ref, holders, timeout_s, volatile=volatile)
                except OSError as error:
                    raise GossamerError(f"shard {ref.root.hex()[:8]} could not be kept: {error}") from error
        if deadline.cancelled_caught:
            raise GossamerError(f"shard {ref.root.hex()[:8]} did not arrive within {timeout_s:.1f} s")


def _update(record: MergeRecord, piece: int) -> ShardRef | None:
    return record.updates[record.moved.index(piece)] if record.updates and piece in record.moved else None


def _key(piece: int, contributors: Sequence[SignedContribution]) -> tuple[int, tuple[bytes, ...]]:
    return piece, tuple(contribution.signature for contribution in contributors)
