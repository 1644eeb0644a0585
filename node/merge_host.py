"""What a global merge asks of this node's weights: contribute a snapshot, sum a piece, adopt the anchor.

Owns the anchor (what the last committed merge came to) and the rule that takes it into the live weights,
``live <- anchor + (live - own contribution)``; who stood on the anchor before and is not in the average takes that for
its contribution, so that what it has learned goes into the next one. For the same reason a contribution that a codec
has thinned out counts as what others can read in it: the rest stays, until there is no merge left to tell of it.

The agreement itself is ``gossip.merging``; what shards hold is ``node.merge_values``. Inputs stay pinned until a
commit, results for two more merges. The results of a record are durable before its acceptance is said: others may have
to fetch them from here alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
import torch
import trio

from gossip.merge_shape import MergeShape
from gossip.messages import CommittedRecord, Contribution, MergeRecord, PieceResult, ShardRef
from gossip.shard_transfer import ShardFetcher
from gossip.store import ShardStore
from node.compute import Compute
from node.costs import Costs
from node.merge_values import Inputs, MergeValues, Pledge
from node.status import Arrival
from p2p.errors import GossamerError
from p2p.transport import PeerId
from training.learner import Learner
from training.mixing import BEGINNER_TOKENS_SHARE, Refused
from training.outer_state import OuterState

log = structlog.get_logger()

MERGES_KEPT = 3
"""Merges whose results stay pinned: the newest and two before it, for members that catch up."""
ACCEPTED_KEPT = 2
"""Records accepted on one link whose results stay pinned: the one that stands, and one on its way to replace it."""
RESULT_TIMEOUT_S = 60.0


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
        genesis: bytes,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        store: ShardStore,
        fetcher: ShardFetcher,
        values: MergeValues,
        alive: Callable[[], Sequence[PeerId]],
        unheard_s: Callable[[PeerId], float],
        void_mixes: Callable[[], None],
        is_elder: Callable[[PeerId], bool],
        adopted: Callable[[Adoption], None],
        tokens_at_anchor: int,
        initial: torch.Tensor | None,
    ) -> None:
        """``genesis``: what the first record of the run names as the one before it. ``initial``: the weights that all
        members begin with, where updates of them can travel; None: they begin differently.
        """
        self._local = local
        self._genesis = genesis
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._store = store
        self._fetcher = fetcher
        self._values = values
        self._alive = alive
        self._unheard_s = unheard_s
        self._void_mixes = void_mixes
        self._is_elder = is_elder
        self._adopted = adopted
        self._pledges: dict[bytes, Pledge] = {}
        """By the record that they are to follow."""
        self._pinned_results: deque[str] = deque()
        self._accepted: deque[str] = deque()
        """Under what the results of records are pinned that were accepted here and may be decided."""
        self._accepted_serial = 0
        self._taking = trio.Lock()
        """Held while an anchor is taken, so that of two the later one stays."""
        self._superseded = False
        """Whether a merge of this life is or was taken over: the last one of the life before is of no use then."""
        self.tokens_at_anchor = tokens_at_anchor
        self._head = genesis
        """The record whose results are held as ``_state``."""
        self._state = None if initial is None else OuterState(initial, torch.zeros_like(initial))
        """What the next merge starts from, if that is known to be the same for all."""

    @property
    def anchor(self) -> torch.Tensor | None:
        """Flat fp32 weights of the last committed merge, or None before the first."""
        return None if self._state is None or self._head == self._genesis else self._state.anchor

    @property
    def head(self) -> bytes:
        """The record whose anchor the live weights stand on; the genesis before the first."""
        return self._head

    @property
    def shape(self) -> MergeShape:
        """How long the shards of this run's merges are."""
        return self._values.shape

    def alive(self) -> Sequence[PeerId]:
        """Members believed alive, this node included."""
        return self._alive()

    def unheard_s(self, peer: PeerId) -> float:
        """Seconds since anything new was heard from ``peer``."""
        return self._unheard_s(peer)

    async def contribute(self, parent: bytes, moved: Sequence[int]) -> Contribution | None:
        """This node's input to the merge after ``parent``: the live weights as of now, the same for every attempt.

        None while the results of ``parent`` are not held here, when what is to be told is how far we came from them.
        """
        if self.shape.by_update(first=parent == self._genesis) and parent != self._head:
            return None
        state = self._state
        if parent not in self._pledges:
            values = await self._compute.run(self._pledge, lane="train", cost_s=self._costs.copy_s)
            weight = max(1, self._trainer.tokens - self.tokens_at_anchor)
            last = self._trainer.step >= self._trainer.spec.train.steps
            self._pledges[parent] = Pledge(values, weight, last)
        pledge = self._pledges[parent]
        inputs = await self._values.offer(state, pledge, moved, owner=_inputs(parent))
        return Contribution(peer=self._local, weight=pledge.weight, moved=list(moved), inputs=inputs)

    async def fetch(
        self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float, *, volatile: bool
    ) -> None:
        """Bring a shard into the store. Raises FetchFailed."""
        if not self._store.holds(ref):
            data = await self._fetcher.fetch(ref, holders, timeout_s=timeout_s)
            await self._store.put(data, volatile=volatile)

    def arrival_of(self, refs: Sequence[ShardRef]) -> Arrival | None:
        """How much of ``refs`` is here; None when all is, or nothing is wanted."""
        if all(map(self._store.holds, refs)):
            return None
        received, givers = 0, set[PeerId]()
        for ref in refs:
            here, by = self._fetcher.progress_of(ref)
            received += ref.size if self._store.holds(ref) else here
            givers |= by
        return Arrival(received=received, total=sum(ref.size for ref in refs), holders=sorted(givers))

    def hold(self, record: MergeRecord) -> None:
        """Pin the results, as far as they are in the store, until the link is decided."""
        self._accepted_serial += 1
        owner = f"accepted/{self._accepted_serial}"
        for ref in (*record.results, *record.updates):
            self._store.pin(ref, owner)
        self._accepted.append(owner)
        while len(self._accepted) > ACCEPTED_KEPT:
            self._store.unpin(self._accepted.popleft())

    async def secure(self, record: MergeRecord) -> None:
        """Pin the results and have them survive power loss. Raises ShardMissing, StoreFull or OSError."""
        self.hold(record)
        for ref in record.results:
            await self._store.sync(ref)

    async def sum_piece(
        self, parent: bytes, piece: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]
    ) -> PieceResult:
        """The weighted average of one piece's inputs, in the order given, and what it leads to; stored.

        Raises InputRefused naming the contributor whose values are not finite or out of all proportion.
        """
        state, own = self._base_of(parent), await self._measure(parent)
        beginner = self._is_beginner()
        return await self._values.sum(
            state,
            Inputs(
                piece=piece,
                shards=inputs,
                own=self._values.pieces.cut(own, piece),
                local=self._local,
                beginner=beginner,
                elders=frozenset(peer for peer, _, _ in inputs if beginner and self._is_elder(peer)),
            ),
        )

    def holds_anchor(self, record: bytes) -> bool:
        """Whether updates can be applied here to the results of ``record``."""
        return self._state is not None and self._head == record

    async def apply_update(self, parent: bytes, piece: int, update: ShardRef) -> ShardRef:
        """Store the result that ``update`` makes of a piece of the results of ``parent``. Raises ResultRefused."""
        state = self._base_of(parent)
        if state is None:
            raise GossamerError("nothing that an update could be applied to")
        own = self._values.pieces.cut(await self._measure(parent), piece)
        return await self._values.apply(state, piece, update, own, beginner=self._is_beginner())

    async def check_result(self, parent: bytes, piece: int, ref: ShardRef) -> None:
        """Raise ResultRefused unless this result, which is in the store, is finite and in proportion to our weights."""
        own = self._values.pieces.cut(await self._measure(parent), piece)
        await self._values.check(piece, ref, own, beginner=self._is_beginner())

    async def adopt(
        self, committed: CommittedRecord, record_hash: bytes, contributed: bool, *, duration_s: float
    ) -> None:
        """Take the committed average, whose results are in the store, as the anchor, and re-base the live weights."""
        self._superseded = True
        pledge = self._pledges.get(committed.record.parent) if contributed else None
        async with self._taking:
            await self._take(committed.record, record_hash, pledge, rebase=True, duration_s=duration_s)
        self._values.settle(committed.record)
        await self._forget_inputs(committed.record)
        while self._accepted:
            await self._store.release(self._accepted.popleft())

    async def _forget_inputs(self, record: MergeRecord) -> None:
        """A decided link needs no inputs: not its own, and not those offered to links of a branch left behind."""
        owner = _inputs(record.parent)
        for contributor in record.contributors:
            for ref in contributor.inputs:
                self._store.pin(ref, owner)
        for parent in {record.parent, *self._pledges}:
            await self._store.release(_inputs(parent))
        self._pledges.clear()

    async def recover(self, committed: CommittedRecord, record_hash: bytes, *, rebase: bool) -> None:
        """After a restart: find the anchor of the last commit again, fetching what the store has lost.

        ``rebase``: the checkpoint was taken before this merge, so the live weights must still be put onto it.
        Nothing happens when a later merge was taken over meanwhile. Raises GossamerError when a result is nowhere to be
        had.
        """
        record = committed.record
        holders = [PeerId(c.peer) for c in record.contributors if c.peer != self._local]
        for ref in record.results:
            await self.fetch(ref, holders, RESULT_TIMEOUT_S, volatile=False)
        async with self._taking:
            if not self._superseded:
                await self._take(record, record_hash, None, rebase=rebase, duration_s=0.0)

    async def _take(
        self,
        record: MergeRecord,
        record_hash: bytes,
        pledge: Pledge | None,
        *,
        rebase: bool,
        duration_s: float,
    ) -> None:
        state = await self._values.assemble(record)
        if isinstance(state, Refused):
            raise GossamerError(f"a merge of which {state.text}", why="it would ruin the model")
        if rebase:
            # Who stood on the parent keeps what it has learned in the pieces that this merge left alone.
            stood = self._state.anchor if self._state is not None and self._head == record.parent else None
            moved = range(len(record.results)) if stood is None else record.moved
            if pledge is not None:
                stood = await self._compute.run(
                    partial(self._values.accounted_for, pledge), lane="side", cost_s=self._costs.copy_s
                )
            await self._compute.run(
                partial(self._rebase, state.anchor, stood, moved),
                lane="train",
                cost_s=self._costs.copy_s,
            )
            if pledge is None:
                log.info("caught up", height=record.height)
        self._head, self._state = record_hash, state
        await self._pin_results(record_hash, record)
        contribution = None if pledge is None else pledge.values
        self._adopted(Adoption(record_hash, record, state.anchor, contribution, duration_s))

    def _rebase(self, anchor: torch.Tensor, stood: torch.Tensor | None, moved: Sequence[int]) -> None:
        """``stood``: what the progress is reckoned from that is not in the anchor yet; None: there is none."""
        self.tokens_at_anchor = self._trainer.tokens
        live = self._trainer.read()
        for piece in moved:
            to, part = self._values.pieces.cut(anchor, piece), self._values.pieces.cut(live, piece)
            part.copy_(to if stood is None else to + (part - self._values.pieces.cut(stood, piece)))
        self._trainer.write(live)
        self._void_mixes()

    def _base_of(self, parent: bytes) -> OuterState | None:
        """What updates of the link after ``parent`` start from; None where weights travel. Raises GossamerError."""
        if not self.shape.by_update(first=parent == self._genesis):
            return None
        if parent != self._head or self._state is None:
            raise GossamerError("the anchor that this merge builds on is not held here")
        return self._state

    async def _measure(self, parent: bytes) -> torch.Tensor:
        """Weights of ours to judge others' by, in the link after ``parent``."""
        if (pledge := self._pledges.get(parent)) is not None:
            return pledge.values
        # As a measure only, so that it need not wait for the end of a slice of inner steps.
        return await self._compute.run(self._trainer.read, lane="side", cost_s=self._costs.copy_s)

    def _is_beginner(self) -> bool:
        """Whether this node's weights may be no measure for others': early in its run, and based on no merge."""
        early = self._trainer.step < BEGINNER_TOKENS_SHARE * self._trainer.spec.train.steps
        return early and self.tokens_at_anchor == 0

    def _pledge(self) -> torch.Tensor:
        # A mix under way would come on top of the merge, which averages the same weights.
        self._void_mixes()
        return self._trainer.read()

    async def _pin_results(self, record_hash: bytes, record: MergeRecord) -> None:
        owner = f"anchor/{record_hash.hex()}"
        for ref in (*record.results, *record.updates):
            self._store.pin(ref, owner)
        self._pinned_results.append(owner)
        while len(self._pinned_results) > MERGES_KEPT:
            await self._store.release(self._pinned_results.popleft())


def _inputs(parent: bytes) -> str:
    return f"merge-inputs/{parent.hex()}"
