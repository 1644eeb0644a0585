"""Merges in the life of one node: when one is asked for, and what follows once it is committed.

Owns the last merge as people are told of it, and ``NodeState``, which remembers across restarts what was adopted. Never
decides what is merged, which is agreed on in ``gossip.merging``, and never touches the weights, which is
``node.merge_host``'s to do.

Relies on: adoptions arrive oldest first, each once the live weights are on its anchor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import structlog
import torch
import trio
from msgspec.structs import replace

from gossip.merging import Merger
from gossip.notices import NoticeTable
from gossip.progress import Progress
from node.life import NodeState, save_state
from node.merge_host import Adoption, NodeMergeHost
from node.rounds import MemberProgress, MergeWatch, Rounds, Train
from node.runtime import Runtime
from node.status import Arrival, MergeReport
from p2p.errors import GossamerError
from training.learner import Learner
from training.merge_math import weights_hash

log = structlog.get_logger()

WATCHED_AT_ONCE = 64
"""In larger swarms the members are looked at less often, as they are heard less often."""
RECOVERY_RETRY_S = 3.0


class Merges:
    """Asks for merges when they are due, and reports and remembers those that are committed.

    ``settled`` is awaited once a merge has been measured, to tell the others and to make it durable.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        trainer: Learner,
        rounds: Rounds,
        wait_s_max: float,
        merger: Merger,
        host: NodeMergeHost,
        notices: NoticeTable,
        state: NodeState,
        adoptions: trio.MemoryReceiveChannel[Adoption],
        members: Callable[[], list[MemberProgress]],
        others_known: Callable[[], bool],
        progress: Progress,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._trainer = trainer
        self._rounds = rounds
        self._merger = merger
        self._host = host
        self._notices = notices
        self._state = state
        self._adoptions = adoptions
        self._members = members
        self._others_known = others_known
        self._progress = progress
        self._settled = settled
        self._watch = MergeWatch(rounds.merge_points, wait_s_max=wait_s_max)
        self.last: MergeReport | None = None
        """The merge whose anchor this node holds; None before the first, and until found again after a restart."""
        self.last_s: float | None = None
        """When it was taken, on trio's clock; None for one that was found again after a restart, too."""
        self.count = 0
        """Anchors taken since the start, the one found again after a restart included."""
        self.problem = ""
        """What stands in the way, for people; empty when nothing does."""

    @property
    def arrival(self) -> Arrival | None:
        """How far the weights of a committed merge have come that is to be taken over; None while there is none."""
        return self._host.arrival_of(self._merger.obtaining)

    async def run(self) -> None:
        """Take care of merges until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_when_due)
            nursery.start_soon(self._recover_anchor)
            nursery.start_soon(self._report_adoptions)

    async def wait_settled(self) -> None:
        """Return once no merge is under way and the last one is in a checkpoint, remembered beside it."""
        while self._merger.under_way or not self._holds_head():
            await self._progress.wait()

    def _holds_head(self) -> bool:
        committed = self._merger.head_record
        return committed is None or (self.last is not None and self.last.record == self._merger.head.hex())

    async def merge_now(self, timeout_s: float) -> MergeReport:
        """Start a global merge at once and wait for its commit. Raises GossamerError when none comes in time."""
        height = self._merger.head_height + 1
        self._merger.merge_now()
        with trio.move_on_after(timeout_s):
            while self.last is None or self.last.height < height:
                await self._progress.wait()
            return self.last
        raise GossamerError(
            f"no merge was committed within {timeout_s:.0f} s",
            why=self._merger.problem or "too few members answered",
            fix="see who is alive: gossamer peers    training goes on meanwhile",
        )

    async def _ask_when_due(self) -> None:
        while True:
            point = self._rounds.points_passed
            members = self._members()
            if self._watch.due(point, members, trio.current_time(), others_known=self._others_known()):
                self._merger.due(self._watch.passed(point, members))
            await trio.sleep(self._watch.pause_s(point, members) * max(1.0, len(members) / WATCHED_AT_ONCE))

    async def _recover_anchor(self) -> None:
        """After a restart: hold the anchor of the last commit again, and be based on it if the checkpoint is not."""
        head, committed = self._merger.head, self._merger.head_record
        while committed is not None and self._merger.head == head:
            try:
                await self._host.recover(committed, head, rebase=not self._remembers(head))
                return
            except GossamerError as error:
                self._report_problem(f"the last merge's weights are out of reach ({error}); trying again")
                await trio.sleep(RECOVERY_RETRY_S)

    async def _report_adoptions(self) -> None:
        async for adoption in self._adoptions:
            self.problem = ""
            if self._remembers(adoption.record_hash):
                self.last = self._state.last_merge
            else:
                await self._report(adoption)
            self.count += 1
            # Last of all: a node whose run is finished may be stopped that moment.
            self._rounds.merge_committed(adoption.record.point)
            self._progress.made()

    async def _report(self, adoption: Adoption) -> None:
        self.last = await self._measure(adoption)
        self.last_s = trio.current_time()
        log.info(
            "merged",
            height=self.last.height,
            peers=len(self.last.contributors),
            record=self.last.record[:16],
            weights=self.last.weights_hash[:16],
        )
        await self._settled()

    async def remember(self, head: bytes) -> None:
        """A checkpoint stands on the merge ``head``, and is durable: a later life need not take its anchor once more.

        In this order: a crash in between makes it take the anchor once more, never forget it.
        """
        if self.last is not None and self.last.record == head.hex() and not self._remembers(head):
            await self._remember(self.last)

    def _remembers(self, record_hash: bytes) -> bool:
        """Whether an earlier life reported this merge, and the checkpoint that this one began with builds on it."""
        remembered = self._state.last_merge
        return remembered is not None and remembered.record == record_hash.hex()

    async def _remember(self, report: MergeReport) -> None:
        self._state = replace(
            self._state,
            incarnation=self._notices.incarnation,
            tokens_at_anchor=self._host.tokens_at_anchor,
            last_merge=report,
        )
        try:
            await save_state(self._runtime.disk, self._state)
        except OSError as error:
            self._report_problem(f"node state not saved: {error.strerror}; free disk space")

    async def _measure(self, adoption: Adoption) -> MergeReport:
        """The merge in words and figures. Losses are measured once training is over; mid-run they would hold it up."""
        contributors = [contribution.peer for contribution in adoption.record.contributors]
        weights = await self._runtime.compute.run(
            partial(weights_hash, adoption.anchor), lane="side", cost_s=self._runtime.costs.copy_s
        )
        return MergeReport(
            record=adoption.record_hash.hex(),
            height=adoption.record.height,
            contributors=contributors,
            weights_hash=weights.hex(),
            contributed=self._runtime.signer.peer in contributors,
            loss_before=await self._final_loss(adoption.contribution),
            loss_merged=await self._final_loss(adoption.anchor),
            duration_s=adoption.duration_s,
        )

    async def _final_loss(self, values: torch.Tensor | None) -> float | None:
        if values is None or isinstance(self._rounds.plan(), Train):
            return None
        return await self._runtime.compute.run(
            partial(self._trainer.evaluate, values), lane="train", cost_s=self._runtime.costs.evaluate_s
        )

    def _report_problem(self, text: str) -> None:
        self.problem = text
        log.warning("problem", text=text)
