"""What learning and mixing come to, beyond a loss: accuracies, the average nobody holds yet, and the spread of weights.

Owns these figures of one simulation; ``netsim.metrics`` asks for them at every sample and at the end. Looks at learners
from outside and changes nothing about them. Accuracies exist where labelled examples are learned from, the contraction
where no merge is scheduled, so that only mixing draws nodes together, and the loss of the average wherever measuring
costs next to nothing: of a language model it would cost more than training does.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from netsim.world import Machine, World
from node.gossip_node import GossipNode
from training.schedules import Schedule
from training.trainer import Trainer

GOAL = 0.8
"""The accuracy whose first time is told (``steps_to_80``)."""

DEVIATION_MIN = 1e-5
"""A deviation below this share of the first one has met the rounding of fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a swarm that learns from labelled examples knows at one moment."""

    accuracy: list[float | None]
    """Of each machine, on what all of them hold out; None where it is off."""
    merged_accuracy: float
    """Of the plain average of all live weights, which nobody need hold."""
    variance_ratio: float
    """Variance of a layer's weights over that at the beginning: the smallest of all layers, mean over the nodes."""

    @property
    def local_accuracy(self) -> float:
        """Mean over the machines that are up."""
        return statistics.fmean(value for value in self.accuracy if value is not None)


@dataclass(frozen=True, slots=True)
class Losses:
    """Of all nodes that are up, measured at one moment."""

    merged: float
    """Of the plain average of their live weights, which nobody need hold."""
    local: float
    """Mean of their own."""


@dataclass(slots=True)
class Learning:
    """Watches one world."""

    world: World
    exact_loss: bool
    """Whether a learner's ``evaluate`` costs next to nothing; that of labelled examples does in any case."""
    _beginnings: dict[int, list[float]] = field(default_factory=dict)
    """By machine: the variance of each weight tensor when its first process was built."""
    _steps_to_goal: float = math.nan
    _at_merge: Lesson | None = None
    """As it was when the last merge came due."""
    _losses_at_merge: Losses | None = None
    """Likewise."""
    _first: tuple[Tensor, float] | None = None
    """Mean weights and deviation at the last sample before the first mix."""
    _last: tuple[Tensor, float, float] | None = None
    """Mean weights, deviation and mixes per node at the last sample above rounding."""

    def started(self, machine: Machine) -> None:
        """A process was built."""
        assert machine.gossip_node is not None
        if machine.number not in self._beginnings and _labelled(machine.gossip_node):
            self._beginnings[machine.number] = _variances(machine.gossip_node)

    def merge_due(self) -> None:
        """A scheduled merge has come due and changed nothing yet."""
        self._at_merge, self._losses_at_merge = self._look(), self.losses()

    def sample(self) -> Lesson | None:
        """The swarm now; None where accuracy means nothing, or nobody is up."""
        lesson = self._look()
        if lesson is not None and math.isnan(self._steps_to_goal) and lesson.local_accuracy >= GOAL:
            self._steps_to_goal = statistics.fmean(node.trainer.step for node in self._up())
        if not Schedule.of(self.world.spec).merge_points:
            self._follow_mixing()
        return lesson

    def losses(self) -> Losses | None:
        """What averaging would come to now; None where measuring it costs too much, or nobody is up."""
        up = self._up()
        if not up or not (self.exact_loss or all(map(_labelled, up))):
            return None
        mean, _ = self._mean_model()
        return Losses(
            merged=up[0].trainer.evaluate(mean.float()),
            local=statistics.fmean(node.trainer.evaluate() for node in up),
        )

    def summary(self) -> dict[str, float]:
        """Figures by name; those that make no sense here are missing."""
        figures: dict[str, float] = {}
        if (end := self._look()) is not None:
            before_merge = self._at_merge or end
            figures |= {
                "local_accuracy": before_merge.local_accuracy,
                "merged_accuracy": before_merge.merged_accuracy,
                "final_accuracy": end.local_accuracy,
                "steps_to_80": self._steps_to_goal,
                "variance_ratio_min": before_merge.variance_ratio,
            }
        if (losses := self._losses_at_merge or self.losses()) is not None:
            figures["merged_minus_local"] = losses.merged - losses.local
        if self._first is not None and self._last is not None:
            (mean_first, first), (mean, last, mixes) = self._first, self._last
            unit = first / math.sqrt(len(self._up()))
            figures |= {
                "contraction": (last / first) ** (1 / mixes),
                "mean_drift": float((mean - mean_first).norm()) / unit,
            }
        return figures

    def _up(self) -> list[GossipNode]:
        return [machine.gossip_node for machine in self.world.up() if machine.gossip_node is not None]

    def _mean_model(self) -> tuple[Tensor, float]:
        """The mean of all live weights, in fp64, and the root mean square distance from it."""
        models = torch.stack([node.trainer.read() for node in self._up()]).double()
        mean = models.mean(dim=0)
        return mean, float((models - mean).square().sum(dim=1).mean().sqrt())

    def _look(self) -> Lesson | None:
        nodes = [machine.gossip_node for machine in self.world.machines]
        up = self._up()
        if not up or not all(map(_labelled, up)):
            return None
        mean, _ = self._mean_model()
        ratios = [
            min(now / first for now, first in zip(_variances(node), self._beginnings[number], strict=True))
            for number, node in enumerate(nodes)
            if node is not None
        ]
        return Lesson(
            accuracy=[None if node is None else _trainer(node).accuracy() for node in nodes],
            merged_accuracy=_trainer(up[0]).accuracy(mean.float()),
            variance_ratio=statistics.fmean(ratios),
        )

    def _follow_mixing(self) -> None:
        """Keep where mixing began, and the last moment before rounding is all there is to see."""
        up = self._up()
        if len(up) < 2:
            return
        mixes = statistics.fmean(node.exchanger.mixes for node in up)
        mean, deviation = self._mean_model()
        if not mixes:
            self._first = mean, deviation
        elif self._first is not None and deviation > DEVIATION_MIN * self._first[1]:
            self._last = mean, deviation, mixes


def _labelled(node: GossipNode) -> bool:
    return isinstance(node.trainer, Trainer) and node.trainer.unit == "example"


def _trainer(node: GossipNode) -> Trainer:
    assert isinstance(node.trainer, Trainer)
    return node.trainer


def _variances(node: GossipNode) -> list[float]:
    """Of each weight tensor, in layout order."""
    weights = node.trainer.read()
    return [
        float(weights[span.start : span.stop].double().var(correction=0))
        for span in node.trainer.layout.spans
        if span.kind == "weight"
    ]
