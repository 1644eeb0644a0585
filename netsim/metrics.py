"""What a simulation measures: the swarm at intervals, its merges as they are due and commit, and the final figures.

Owns the samples, the commits and the summary of a seed. Looks at nodes from outside and changes nothing about them.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trio

from gossip.messages import CommittedRecord
from netsim.learning import Learning
from netsim.results import Sample
from netsim.world import Machine, World
from node.gossip_node import GossipNode

MEMBER_AFTER_S = 10.0
"""A machine counts as a member once it has been up for this long: it must have been heard of."""
COMMIT_SHARE_OF_MEMBERS = 0.9
"""A commit counts if this share of the members that lived through it are in it."""

Tell = Callable[[str, Sequence[int], str, float | None], None]


@dataclass(slots=True)
class _Merge:
    """One scheduled merge, from the moment the first node found it due."""

    due_s: float
    members: dict[int, int]
    """Machines that were members then, and the life each was in."""
    committed_s: float = math.inf
    share: float = 0.0
    """Of the members that lived through it, how many are in it."""


@dataclass(slots=True)
class _Newcomer:
    """A machine that was not there at the beginning, until it contributes."""

    began_s: float
    commits_before: int
    rounds: int | None = None
    """Commits from its start to the first that it is in."""


@dataclass(slots=True)
class Metrics:
    """Observes one world. Implements netsim.world.Observer."""

    world: World
    tell: Tell
    exact_loss: bool
    """Whether a learner's ``evaluate`` costs next to nothing."""
    founders: int
    """Machines there at the beginning."""
    commits: dict[bytes, float] = field(default_factory=dict)
    """Record hash -> when the first node held its anchor."""
    _merges: dict[int, _Merge] = field(default_factory=dict)
    _newcomers: dict[int, _Newcomer] = field(default_factory=dict)
    _mixes: int = 0
    _mixes_failed: int = 0
    _up_s: float = 0.0
    _last_sample_s: float = 0.0
    _bytes_last: int = 0
    _bytes_per_s_peak: float = 0.0
    _learning: Learning = field(init=False)

    def __post_init__(self) -> None:
        self._learning = Learning(self.world, self.exact_loss)

    # --- what the world tells ---------------------------------------------------------------------------------

    def started(self, machine: Machine) -> None:
        """Listen to a new process."""
        node = machine.gossip_node
        assert node is not None
        if machine.number >= self.founders and machine.honest and machine.number not in self._newcomers:
            self._newcomers[machine.number] = _Newcomer(trio.current_time(), len(self.commits))
        self._learning.started(machine)
        due, adopt = node.merger.due, node.merge_host.adopt

        @functools.wraps(due)
        def watched_due(point: int) -> None:
            if point not in self._merges:
                self._merges[point] = _Merge(trio.current_time(), self._members())
                self._learning.merge_due()
            due(point)

        @functools.wraps(adopt)
        async def watched_adopt(
            committed: CommittedRecord, record_hash: bytes, *args: Any, **named: Any
        ) -> None:
            await adopt(committed, record_hash, *args, **named)
            self._adopted(committed, record_hash)

        node.merger.due = watched_due  # type: ignore[method-assign]
        node.merge_host.adopt = watched_adopt  # type: ignore[method-assign]

    def stopped(self, machine: Machine, how: str) -> None:
        """Keep what a process counted."""
        assert machine.gossip_node is not None
        self._mixes += machine.gossip_node.exchanger.mixes
        self._mixes_failed += machine.gossip_node.exchanger.mixes_failed
        self.tell("stop", [machine.number], how, None)

    def _members(self) -> dict[int, int]:
        now_s = trio.current_time()
        return {
            machine.number: len(machine.starts_s)
            for machine in self.world.up()
            if machine.honest and now_s - machine.starts_s[-1] >= MEMBER_AFTER_S
        }

    def _adopted(self, committed: CommittedRecord, record_hash: bytes) -> None:
        if record_hash in self.commits:
            return
        now_s = trio.current_time()
        self.commits[record_hash] = now_s
        record = committed.record
        names = {contribution.peer for contribution in record.contributors}
        inside = [machine.number for machine in self.world.machines if machine.peer in names]
        self.tell("commit", inside, f"height {record.height}, point {record.point}", None)
        merge = self._merges.get(record.point)
        if merge is not None and merge.committed_s == math.inf:
            alive = {machine.number: len(machine.starts_s) for machine in self.world.up()}
            lived = [number for number, life in merge.members.items() if alive.get(number) == life]
            merge.committed_s = now_s
            merge.share = len(set(lived) & set(inside)) / len(lived) if lived else 1.0
        for number in inside:
            newcomer = self._newcomers.get(number)
            if newcomer is not None and newcomer.rounds is None:
                newcomer.rounds = len(self.commits) - newcomer.commits_before

    # --- samples ----------------------------------------------------------------------------------------------

    def sample(self, seed: int, variant: str) -> Sample:
        """The swarm now."""
        now_s = trio.current_time()
        nodes = [machine.gossip_node for machine in self.world.machines]
        up = [node for node in nodes if node is not None]
        bytes_sent = [machine.bytes_sent for machine in self.world.machines]
        elapsed_s = now_s - self._last_sample_s
        if elapsed_s > 0:
            rate = (sum(bytes_sent) - self._bytes_last) / elapsed_s / max(1, len(up))
            self._bytes_per_s_peak = max(self._bytes_per_s_peak, rate)
            self._up_s += elapsed_s * len(up)
        self._last_sample_s, self._bytes_last = now_s, sum(bytes_sent)
        lesson, losses = self._learning.sample(), self._learning.losses()
        return Sample(
            seed=seed,
            variant=variant,
            at_s=now_s,
            up=len(up),
            seen=[1 + len(node.members.alive(now_s)) if node else None for node in nodes],
            step=[node.trainer.step if node else None for node in nodes],
            loss=[self._loss(node) if node else None for node in nodes],
            merged_loss=_finite(losses.merged) if losses else None,
            dispersion=dispersion([node.trainer.read() for node in up]),
            height=[node.merger.head_height if node else None for node in nodes],
            bytes_sent=bytes_sent,
            accuracy=lesson.accuracy if lesson else [],
            merged_accuracy=lesson.merged_accuracy if lesson else None,
            variance_ratio=lesson.variance_ratio if lesson else None,
        )

    def _loss(self, node: GossipNode) -> float | None:
        return _finite(node.trainer.evaluate() if self.exact_loss else node.loss)

    # --- the end ----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """Figures by name (netsim/scenarios bounds some of them)."""
        now_s = trio.current_time()
        up = self.world.up()
        nodes = [machine.gossip_node for machine in up if machine.gossip_node is not None]
        losses = [node.trainer.evaluate() for node in nodes]
        mixes = self._mixes + sum(node.exchanger.mixes for node in nodes)
        failed = self._mixes_failed + sum(node.exchanger.mixes_failed for node in nodes)
        merges = list(self._merges.values())
        counted = [merge for merge in merges if merge.share >= COMMIT_SHARE_OF_MEMBERS]
        took_s = [merge.committed_s - merge.due_s for merge in merges if merge.committed_s < math.inf]
        node_s = max(self._up_s, 1e-9)
        machines = self.world.machines
        return {
            "final_loss": statistics.fmean(losses) if losses else math.nan,
            "loss_spread": max(losses) - min(losses) if losses else math.nan,
            "dispersion": dispersion([node.trainer.read() for node in nodes]),
            "commits": float(len(self.commits)),
            "merges_due": float(len(merges)),
            "commit_share": len(counted) / len(merges) if merges else math.nan,
            "commit_s": statistics.median(took_s) if took_s else math.nan,
            "join_rounds_max": float(max(self._join_rounds(), default=0)),
            "bytes_per_node": sum(machine.bytes_sent for machine in machines) / len(machines),
            "bytes_per_s_peak": self._bytes_per_s_peak,
            "mixes_per_node": mixes * now_s / node_s,
            "mix_failure_share": failed / max(1, mixes + failed),
            "up_share": node_s / (len(machines) * max(now_s, 1e-9)),
            "messages": float(self.world.network.messages),
            "deliveries_per_node_s": self.world.network.deliveries / node_s,
            "deliveries_per_node_round": self.world.network.deliveries / max(1, mixes + failed),
        } | self._learning.summary()

    def _join_rounds(self) -> list[int]:
        """Of each newcomer that is up or has contributed; who has not yet counts with the commits it has seen."""
        alive = {machine.number for machine in self.world.up()}
        rounds = []
        for number, newcomer in self._newcomers.items():
            if newcomer.rounds is not None:
                rounds.append(newcomer.rounds)
            elif number in alive:
                rounds.append(len(self.commits) - newcomer.commits_before)
        return rounds


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def dispersion(models: Sequence[torch.Tensor]) -> float:
    """Root mean square distance of flat models from their mean, over the norm of the mean; 0 for fewer than two."""
    if len(models) < 2:
        return 0.0
    stacked = torch.stack(list(models)).double()
    mean = stacked.mean(dim=0)
    distance = float((stacked - mean).square().sum(dim=1).mean().sqrt())
    return distance / max(float(mean.norm()), 1e-12)
