"""The background exchange: ask peers for a snapshot of one fragment, pull it, mix it with one's own of the same moment.

Owns the order of an exchange. Never stops training: weights are changed only by a short call in the ``train`` lane, and
the result is blended with the progress made meanwhile, ``live <- live + (mixed - own snapshot)``. Nothing of a failed
exchange is applied.

Relies on: ``node.snapshot_pulls`` for values that may be mixed, ``training.outliers`` for which of them are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog
import torch
import trio

from node.compute import Compute
from node.costs import Costs
from node.partners import Partners
from node.rounds import Exchange
from node.snapshot_pulls import SnapshotPuller
from node.status import MixReport
from p2p.transport import PeerId
from training.learner import Learner
from training.mixing import MixResult, mix
from training.outliers import NO_OBJECTION, Distances, Judgement
from training.schedules import Schedule
from training.spec_sections import ExchangeSpec, Outliers

T = TypeVar("T")
log = structlog.get_logger()


BEGINNER_MIXES = 10
"""After so many mixes our own weights are a measure for everybody's, whatever they say of themselves."""


class Exchanger:
    """Carries out one exchange at a time for ``node.node``."""

    def __init__(
        self,
        *,
        spec: ExchangeSpec,
        schedule: Schedule,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        puller: SnapshotPuller,
        rng: random.Random,
        partners: Partners,
        outliers: Outliers,
        note: Callable[[PeerId, str, str], None],
        is_elder: Callable[[PeerId], bool],
    ) -> None:
        """``note(peer, reason, detail)`` hears of whose fragments no honest member would serve."""
        self._spec = spec
        self._schedule = schedule
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._puller = puller
        self._rng = rng
        self._partners = partners
        self._is_elder = is_elder
        self._note = note
        self._outliers = outliers
        self._distances: dict[int, Distances] = {}
        """By fragment."""
        self._weights_epoch = 0
        self.mixes = 0
        self.mixes_failed = 0
        self.one_sided = 0
        """Pulls have one side."""
        self.last_mix: MixReport | None = None

    def void_mixes(self) -> None:
        """Have a mix under way come to nothing: the weights it began with were contributed to a merge, or re-based.

        To be called in the ``train`` lane.
        """
        self._weights_epoch += 1

    async def exchange(self, due: Exchange) -> None:
        """Pull the fragment from some random members and mix; failures are counted, logged, never raised.

        How many, and with what chance anything happens at all, is the schedule's.
        """
        rule, epoch = self._spec.rule, self._weights_epoch
        phase = self._schedule.at(due.step / self._trainer.spec.train.steps)
        if self._rng.random() >= phase.probability:
            return
        chosen = self._partners.choose(phase.peers)
        if not chosen:
            return
        own = await self._compute.run(
            partial(self._trainer.read, due.fragment), lane="side", cost_s=self._costs.copy_s
        )
        pulled = await self._pull(chosen, due.fragment, own)
        if not pulled:
            self.mixes_failed += 1
            return
        spans = self._trainer.layout.fragment_spans(due.fragment)
        beginner = any(self._is_beginner(peer) for peer, _ in pulled)

        def mixed() -> tuple[Judgement, MixResult | None]:
            judgement = (
                NO_OBJECTION if beginner else self._judge(due.fragment, own, [values for _, values in pulled])
            )
            near = [values for number, (_, values) in enumerate(pulled) if number not in judgement.left_out]
            return judgement, mix(rule, own, near, spans) if near else None

        judgement, result = await self._compute.run(mixed, lane="side", cost_s=self._costs.mix_s)
        for number, refused in judgement.opposed.items():
            self._note(pulled[number][0], refused.code, refused.text)
        if result is None:
            self.mixes_failed += 1
            return
        applied = await self._compute.run(
            lambda: self._apply(epoch, due.fragment, result.values - own),
            lane="train",
            cost_s=self._costs.copy_s,
        )
        if not applied:
            return
        self.mixes += 1
        self.last_mix = MixReport(
            rule=rule,
            fragment=due.fragment,
            peers=[peer for number, (peer, _) in enumerate(pulled) if number not in judgement.left_out],
            step=due.step,
            variance_ratio_before=result.variance_ratio_before,
            variance_ratio_after=result.variance_ratio_after,
        )
        log.debug(
            "mixed",
            step=due.step,
            fragment=due.fragment,
            peers=self.last_mix.peers,
            steps_late=self._trainer.step - due.step,
            variance_ratio=round(result.variance_ratio_before, 4),
        )

    def _is_beginner(self, peer: PeerId) -> bool:
        """Whether our weights are no measure for those of ``peer``."""
        return self._is_elder(peer) and self.mixes < BEGINNER_MIXES

    def _judge(self, fragment: int, own: torch.Tensor, values: Sequence[torch.Tensor]) -> Judgement:
        if self._outliers == "keep":
            return NO_OBJECTION
        return self._distances.setdefault(fragment, Distances()).judge(own, values)

    def _apply(self, epoch: int, fragment: int, delta: torch.Tensor) -> bool:
        # Runs in the train lane, where merges re-base the weights too: the epoch cannot change underneath.
        if epoch != self._weights_epoch:
            return False
        self._trainer.add(fragment, delta)
        return True

    async def _pull(
        self, partners: list[PeerId], fragment: int, own: torch.Tensor
    ) -> list[tuple[PeerId, torch.Tensor]]:
        """The fragment from each of ``partners`` that serves it and passes the checks; by ascending peer."""
        pulled: list[tuple[PeerId, torch.Tensor]] = []
        async with trio.open_nursery() as nursery:
            for peer in partners:
                nursery.start_soon(self._pull_one, peer, fragment, own, pulled)
        return sorted(pulled, key=lambda item: item[0])

    async def _pull_one(
        self, peer: PeerId, fragment: int, own: torch.Tensor, pulled: list[tuple[PeerId, torch.Tensor]]
    ) -> None:
        began_s = trio.current_time()
        values = await self._puller.pull(peer, fragment, own, beginner=self._is_beginner(peer))
        self._partners.pulled(peer, trio.current_time() - began_s)
        if values is not None:
            pulled.append((peer, values))
