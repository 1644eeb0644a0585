"""The data side of a merge: owners sum fragments, everybody gets hold of the results.

Owns which inputs are pulled from whom, how many at once and until when, and the sums made for the present link.
Decides nothing about the chain. What weights are and how they are averaged is the host's business: here they are
shards with names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import trio

from gossip.merge_record import RecordRefused, capped_weights, owners
from gossip.messages import (
    CommittedRecord,
    Contribution,
    FragmentResult,
    MergePlan,
    MergeRecord,
    MergeResults,
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

    async def contribute(self, parent: bytes, point: int) -> Contribution | None:
        """A snapshot of the live weights, stored and pinned; None when this node has nothing to contribute.

        Raises GossamerError or OSError when it cannot be stored.
        """

    async def sum_fragment(self, fragment: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]) -> ShardRef:
        """Store the weighted average of (peer, shard, weight) inputs, which are all in the store, in that order.

        Raises InputRefused naming the peer whose values must be left out, GossamerError or OSError otherwise.
        """

    async def check_result(self, fragment: int, ref: ShardRef) -> None:
        """Raise ResultRefused unless this result, which is in the store, may be adopted."""

    async def fetch(self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float) -> None:
        """Bring a shard into the store, from any of ``holders``. Raises GossamerError or OSError."""

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
        fragments: int,
        replicas: int,
        limits: Limits,
    ) -> None:
        self._local = local
        self._host = host
        self._fragments = fragments
        self._replicas = replicas
        self._fetches = trio.CapacityLimiter(limits.fetches_max)
        self._sums: dict[tuple[int, tuple[bytes, ...]], ShardRef] = {}
        """Sums made for the present link, by fragment and the signatures of what went in."""
        self._summing = trio.CancelScope()

    def forget(self) -> None:
        """The link is decided: its sums are of no more use."""
        self._sums.clear()

    async def sum_owned(self, plan: MergePlan) -> MergeResults:
        """Sum the fragments that are ours under ``plan``, which was checked."""
        self._summing.cancel()  # A proposer that plans anew does not wait for the old plan any more.
        names = [contribution.peer for contribution in plan.contributors]
        owned = [
            fragment
            for fragment, chosen in enumerate(owners(plan.parent, names, self._fragments, self._replicas))
            if self._local in chosen
        ]
        results: list[FragmentResult] = []
        missing: set[PeerId] = set()

        async def sum_one(fragment: int) -> None:
            result = await self._sum(fragment, plan.contributors, plan.timeout_s, missing)
            if result is not None:
                results.append(FragmentResult(fragment=fragment, shard=result))

        with trio.CancelScope() as self._summing:
            async with trio.open_nursery() as nursery:
                for fragment in owned:
                    nursery.start_soon(sum_one, fragment)
        return MergeResults(
            results=sorted(results, key=lambda result: result.fragment), missing=sorted(missing)
        )

    async def recompute(
        self, fragment: int, contributors: Sequence[SignedContribution], timeout_s: float
    ) -> ShardRef | None:
        """The sum of ``fragment`` made here, whoever owns it; None when an input cannot be had."""
        return await self._sum(fragment, contributors, timeout_s, set())

    async def obtain(self, record: MergeRecord, holders: Sequence[PeerId], timeout_s: float) -> None:
        """Have every result of ``record`` in the store, from its owners or ``holders``. Raises GossamerError."""
        names = [contribution.peer for contribution in record.contributors]
        summed_by = owners(record.parent, names, self._fragments, self._replicas)
        failures: list[GossamerError] = []

        async def obtain_one(fragment: int) -> None:
            candidates = [
                peer for peer in dict.fromkeys([*summed_by[fragment], *holders]) if peer != self._local
            ]
            try:
                await self._fetch(record.results[fragment], candidates, timeout_s)
            except GossamerError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for fragment in range(self._fragments):
                nursery.start_soon(obtain_one, fragment)
        if failures:
            raise failures[0]

    async def verify_and_obtain(
        self, record: MergeRecord, disputed: Collection[int], holders: Sequence[PeerId], timeout_s: float
    ) -> None:
        """Have every result in the store, and refuse the record if a sum made here says otherwise.

        Raises RecordRefused for a wrong result, GossamerError for one that cannot be had.
        """
        for fragment in disputed:
            await self._sum(fragment, record.contributors, timeout_s, set())
        for fragment, result in enumerate(record.results):
            own = self._sums.get(_key(fragment, record.contributors))
            if fragment in disputed and own is None:
                raise GossamerError(f"the inputs of disputed fragment {fragment} cannot be had")
            if own is not None and own != result:
                raise RecordRefused(
                    "equivocation", f"the record's fragment {fragment} is not the sum of its inputs"
                )
        await self.obtain(record, holders, timeout_s)
        for fragment, result in enumerate(record.results):
            await self._host.check_result(fragment, result)

    async def inspect(self, record: MergeRecord, timeout_s: float) -> dict[int, GossamerError]:
        """What keeps each fragment of ``record`` from being proposed, where something does; results come to the store.

        A ResultRefused is the owner's fault; any other error says that the result cannot be had.
        """
        names = [contribution.peer for contribution in record.contributors]
        summed_by = owners(record.parent, names, self._fragments, self._replicas)
        faults: dict[int, GossamerError] = {}

        async def inspect_one(fragment: int) -> None:
            result = record.results[fragment]
            try:
                await self._fetch(
                    result, [peer for peer in summed_by[fragment] if peer != self._local], timeout_s
                )
                await self._host.check_result(fragment, result)
            except GossamerError as error:
                faults[fragment] = error

        async with trio.open_nursery() as nursery:
            for fragment in range(self._fragments):
                nursery.start_soon(inspect_one, fragment)
        return faults

    async def _sum(
        self,
        fragment: int,
        contributors: Sequence[SignedContribution],
        timeout_s: float,
        missing: set[PeerId],
    ) -> ShardRef | None:
        """The sum of ``fragment``; None, and the culprits added to ``missing``, when there is none."""
        key = _key(fragment, contributors)
        if key in self._sums:
            return self._sums[key]
        lacking: set[PeerId] = set()

        async def pull(contribution: SignedContribution) -> None:
            peer = PeerId(contribution.peer)
            try:
                await self._fetch(contribution.inputs[fragment], [peer], timeout_s)
            except GossamerError:
                lacking.add(peer)

        async with trio.open_nursery() as nursery:
            for contribution in contributors:
                if contribution.peer != self._local:
                    nursery.start_soon(pull, contribution)
        if not lacking:
            weights = capped_weights([contribution.weight for contribution in contributors])
            inputs = [
                (PeerId(contribution.peer), contribution.inputs[fragment], weight)
                for contribution, weight in zip(contributors, weights, strict=True)
            ]
            try:
                self._sums[key] = await self._host.sum_fragment(fragment, inputs)
            except InputRefused as refused:
                lacking.add(refused.peer)
            except (GossamerError, OSError):
                return None  # This node's own trouble, a full disk perhaps: nobody else is to blame.
        missing |= lacking
        return self._sums.get(key)

    async def _fetch(self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float) -> None:
        """Raises GossamerError when ``ref`` is not here within ``timeout_s``, waiting for a slot included."""
        with trio.move_on_after(timeout_s) as deadline:
            async with self._fetches:
                try:
                    await self._host.fetch(ref, holders, timeout_s)
                except OSError as error:
                    raise GossamerError(f"shard {ref.root.hex()[:8]} could not be kept: {error}") from error
        if deadline.cancelled_caught:
            raise GossamerError(f"shard {ref.root.hex()[:8]} did not arrive within {timeout_s:.1f} s")


def _key(fragment: int, contributors: Sequence[SignedContribution]) -> tuple[int, tuple[bytes, ...]]:
    return fragment, tuple(contribution.signature for contribution in contributors)
