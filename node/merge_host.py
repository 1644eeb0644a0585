"""What a global merge asks of this node's weights: contribute a snapshot, sum a fragment, adopt the anchor.

Owns the anchor (the weights of the last committed merge) and the rule that takes it into the live weights,
``live <- anchor + (live - own contribution)``. The agreement itself is ``gossip.merging``; the arithmetic is
``training.merge_math``. Inputs stay pinned until a commit, results for two more merges. The results of a record are
durable before its acceptance is said: others may have to fetch them from here alone.

Bits: everything that must be equal on all members is computed on the CPU from shard bytes, in the order of the record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
import torch
import trio

from gossip.ledger import PeerLedger
from gossip.merge_work import InputRefused, ResultRefused
from gossip.messages import CommittedRecord, Contribution, MergeRecord, ShardRef
from gossip.shard_transfer import ShardFetcher
from gossip.store import ShardStore
from node.compute import Compute
from node.costs import Costs
from p2p.errors import GossamerError
from p2p.transport import PeerId
from training.codecs.plain import FP32
from training.layout import ParameterLayout
from training.learner import Learner
from training.merge_math import weighted_average
from training.mixing import BEGINNER_TOKENS_SHARE, Refused, check_peer_values, decoded

log = structlog.get_logger()

MERGES_KEPT = 3
"""Merges whose results stay pinned: the newest and two before it, for members that catch up."""
ACCEPTED_KEPT = 2
"""Records accepted on one link whose results stay pinned: the one that stands, and one on its way to replace it."""
RESULT_TIMEOUT_S = 60.0
CODEC = FP32
"""Merges are exact: contributions and results travel unrounded."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """A committed merge whose anchor this node has taken; flat fp32 CPU vectors in layout order."""

    record_hash: bytes
    record: MergeRecord
    anchor: torch.Tensor
    contribution: torch.Tensor | None
    """What this node put into the average; None when it is not in it."""
    duration_s: float
    """From the moment the merge was due here to the anchor's arrival."""


class NodeMergeHost:
    """Implements gossip.merging.MergeHost over the trainer and the shard store."""

    def __init__(
        self,
        *,
        local: PeerId,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        alive: Callable[[], Sequence[PeerId]],
        unheard_s: Callable[[PeerId], float],
        void_mixes: Callable[[], None],
        is_elder: Callable[[PeerId], bool],
        adopted: Callable[[Adoption], None],
        tokens_at_anchor: int,
    ) -> None:
        self._local = local
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._store = store
        self._fetcher = fetcher
        self._ledger = ledger
        self._alive = alive
        self._unheard_s = unheard_s
        self._void_mixes = void_mixes
        self._is_elder = is_elder
        self._adopted = adopted
        self._contributions: dict[bytes, Contribution] = {}
        self._pinned_results: deque[str] = deque()
        self._accepted: deque[str] = deque()
        """Under what the results of records are pinned that were accepted here and may be decided."""
        self._accepted_serial = 0
        self._taking = trio.Lock()
        """Held while an anchor is taken, so that of two the later one stays."""
        self._superseded = False
        """Whether a merge of this life is or was taken over: the last one of the life before is of no use then."""
        self.tokens_at_anchor = tokens_at_anchor
        self.anchor: torch.Tensor | None = None
        """Flat fp32 weights of the last committed merge, or None before the first."""

    def alive(self) -> Sequence[PeerId]:
        """Members believed alive, this node included."""
        return self._alive()

    def unheard_s(self, peer: PeerId) -> float:
        """Seconds since anything new was heard from ``peer``."""
        return self._unheard_s(peer)

    async def contribute(self, parent: bytes, point: int) -> Contribution | None:
        """This node's input to the merge after ``parent``: the live weights as of now, the same for every attempt."""
        if parent in self._contributions:
            return self._contributions[parent]
        values = await self._compute.run(self._pledge, lane="train", cost_s=self._costs.copy_s)
        tokens = self._trainer.tokens
        inputs = [
            await self._store.put(
                await self._encode(self._trainer.layout.cut(values, fragment)), owner=_inputs(parent)
            )
            for fragment in range(self._trainer.layout.fragments)
        ]
        contribution = Contribution(
            peer=self._local, weight=max(1, tokens - self.tokens_at_anchor), inputs=inputs
        )
        self._contributions[parent] = contribution
        return contribution

    async def fetch(self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float) -> None:
        """Bring a shard into the store. Raises FetchFailed."""
        if not self._store.holds(ref):
            data = await self._fetcher.fetch(ref, holders, timeout_s=timeout_s)
            await self._store.put(data)

    def hold(self, record: MergeRecord) -> None:
        """Pin the results, as far as they are in the store, until the link is decided."""
        self._accepted_serial += 1
        owner = f"accepted/{self._accepted_serial}"
        for ref in record.results:
            self._store.pin(ref, owner)
        self._accepted.append(owner)
        while len(self._accepted) > ACCEPTED_KEPT:
            self._store.unpin(self._accepted.popleft())

    async def secure(self, record: MergeRecord) -> None:
        """Pin the results and have them survive power loss. Raises ShardMissing, StoreFull or OSError."""
        self.hold(record)
        for ref in record.results:
            await self._store.put(await self._store.get(ref), sync=True)

    async def sum_fragment(self, fragment: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]) -> ShardRef:
        """The weighted average of one fragment's inputs, in the order given, stored.

        Raises InputRefused naming the contributor whose values are not finite or out of all proportion.
        """
        layout = self._trainer.layout
        live = None
        if all(peer != self._local for peer, _, _ in inputs):
            live = await self._compute.run(
                partial(self._trainer.read, fragment), lane="train", cost_s=self._costs.copy_s
            )
        arrived = [(peer, await self._store.get(ref), weight) for peer, ref, weight in inputs]
        beginner = self._is_beginner()
        elders = {peer for peer, _, _ in inputs if beginner and self._is_elder(peer)}

        def average() -> torch.Tensor | tuple[PeerId, Refused]:
            inputs_of: dict[PeerId, torch.Tensor] = {}
            for peer, data, _ in arrived:
                values = decoded(CODEC, data, layout.fragment_size(fragment))
                if isinstance(values, Refused):
                    return peer, values
                inputs_of[peer] = values
            # One's own values are the measure for others': the contributed ones, or for a mere checker the live ones.
            # They are checked first, lest a broken node take everybody else for broken.
            own = inputs_of[self._local] if live is None else live
            for peer, values in sorted(inputs_of.items(), key=lambda item: item[0] != self._local):
                spans = layout.fragment_spans(fragment)
                if refused := check_peer_values(own, values, spans, beginner=peer in elders):
                    return peer, refused
            return weighted_average([(inputs_of[peer], weight) for peer, _, weight in arrived])

        result = await self._compute.run(average, lane="side", cost_s=self._costs.mix_s)
        if isinstance(result, tuple):
            peer, refused = result
            self._ledger.note(peer, refused.code, refused.text)
            raise InputRefused(peer, refused.text)
        return await self._store.put(await self._encode(result))

    async def check_result(self, fragment: int, ref: ShardRef) -> None:
        """Raise ResultRefused unless this result, which is in the store, is finite and in proportion to our weights."""
        data = await self._store.get(ref)
        own = await self._compute.run(
            partial(self._trainer.read, fragment), lane="train", cost_s=self._costs.copy_s
        )
        layout, beginner = self._trainer.layout, self._is_beginner()

        def check() -> Refused | None:
            values = decoded(CODEC, data, layout.fragment_size(fragment))
            if isinstance(values, Refused):
                return values
            return check_peer_values(own, values, layout.fragment_spans(fragment), beginner=beginner)

        if refused := await self._compute.run(check, lane="side", cost_s=self._costs.copy_s):
            raise ResultRefused(refused.code, refused.text)

    async def adopt(
        self, committed: CommittedRecord, record_hash: bytes, contributed: bool, *, duration_s: float
    ) -> None:
        """Take the committed average, whose results are in the store, as the anchor, and re-base the live weights."""
        self._superseded = True
        own = self._contributions.get(committed.record.parent) if contributed else None
        contribution = await self._assemble(own.inputs) if own is not None else None
        async with self._taking:
            await self._take(committed.record, record_hash, contribution, rebase=True, duration_s=duration_s)
        await self._forget_inputs(committed.record)
        while self._accepted:
            await self._store.release(self._accepted.popleft())

    async def _forget_inputs(self, record: MergeRecord) -> None:
        """A decided link needs no inputs: not its own, and not those offered to links of a branch left behind."""
        owner = _inputs(record.parent)
        for contributor in record.contributors:
            for ref in contributor.inputs:
                self._store.pin(ref, owner)
        for parent in {record.parent, *self._contributions}:
            await self._store.release(_inputs(parent))
        self._contributions.clear()

    async def recover(self, committed: CommittedRecord, record_hash: bytes, *, rebase: bool) -> None:
        """After a restart: find the anchor of the last commit again, fetching what the store has lost.

        ``rebase``: the checkpoint was taken before this merge, so the live weights must still be put onto it.
        Nothing happens when a later merge was taken over meanwhile. Raises GossamerError when a result is nowhere to be
        had.
        """
        record = committed.record
        holders = [PeerId(c.peer) for c in record.contributors if c.peer != self._local]
        for ref in record.results:
            await self.fetch(ref, holders, RESULT_TIMEOUT_S)
        async with self._taking:
            if not self._superseded:
                await self._take(record, record_hash, None, rebase=rebase, duration_s=0.0)

    async def _take(
        self,
        record: MergeRecord,
        record_hash: bytes,
        contribution: torch.Tensor | None,
        *,
        rebase: bool,
        duration_s: float,
    ) -> None:
        anchor = await self._assemble(record.results)
        if rebase:
            await self._compute.run(
                partial(self._rebase, anchor, contribution), lane="train", cost_s=self._costs.copy_s
            )
        self.anchor = anchor
        await self._pin_results(record_hash, record.results)
        self._adopted(Adoption(record_hash, record, anchor, contribution, duration_s))

    def _rebase(self, anchor: torch.Tensor, contribution: torch.Tensor | None) -> None:
        self.tokens_at_anchor = self._trainer.tokens
        # A node whose weights are not in the average has no progress relative to it: it starts from the anchor.
        live = self._trainer.read()
        self._trainer.write(anchor if contribution is None else anchor + (live - contribution))
        self._void_mixes()

    async def _assemble(self, refs: Sequence[ShardRef]) -> torch.Tensor:
        """The flat vector whose fragments are ``refs``. Raises GossamerError unless all are held, whole and finite."""
        stored = [await self._store.get(ref) for ref in refs]
        layout = self._trainer.layout

        def decode() -> torch.Tensor | Refused:
            parts: list[torch.Tensor] = []
            for fragment, data in enumerate(stored):
                part = decoded(CODEC, data, layout.fragment_size(fragment))
                if isinstance(part, Refused):
                    return part
                parts.append(part)
            return layout.join(parts)

        values = await self._compute.run(decode, lane="side", cost_s=self._costs.copy_s)
        if isinstance(values, Refused):
            raise GossamerError(f"a merge of which {values.text}", why="it would ruin the model")
        return values

    def _is_beginner(self) -> bool:
        """Whether this node's weights may be no measure for others': early in its run, and based on no merge."""
        early = self._trainer.step < BEGINNER_TOKENS_SHARE * self._trainer.spec.train.steps
        return early and self.tokens_at_anchor == 0

    def _pledge(self) -> torch.Tensor:
        # A mix under way would come on top of the merge, which averages the same weights.
        self._void_mixes()
        return self._trainer.read()

    async def _encode(self, values: torch.Tensor) -> bytes:
        return await self._compute.run(lambda: CODEC.encode(values), lane="side", cost_s=self._costs.copy_s)

    async def _pin_results(self, record_hash: bytes, results: Sequence[ShardRef]) -> None:
        owner = f"anchor/{record_hash.hex()}"
        for ref in results:
            self._store.pin(ref, owner)
        self._pinned_results.append(owner)
        while len(self._pinned_results) > MERGES_KEPT:
            await self._store.release(self._pinned_results.popleft())


def contribution_bytes(layout: ParameterLayout) -> list[int]:
    """How long each fragment of a contribution, and of a merge's result, is."""
    return [CODEC.size_bytes(layout.fragment_size(f)) for f in range(layout.fragments)]


def _inputs(parent: bytes) -> str:
    return f"merge-inputs/{parent.hex()}"
