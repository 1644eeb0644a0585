"""When members mix and when all of them merge: one table for a whole run.

Owns what the presets stand for, and how a table is read at a point of a run. A row holds until a progress, the fraction
of inner steps taken, and says with what chance an exchange that is due takes place, from how many members it pulls, and
how many global merges there are in it, evenly spaced, the last one at its end.

Presets, H the steps between exchanges (``exchange.every_steps``):

* ``constant``: every exchange, one merge at the end.
* ``early-dense``: a merge every H steps for the first half, while models move most, then every 5 H; no exchanges.
* ``late-heavy``: a fifth of the exchanges until nine tenths, then all, and one merge at the end (arXiv 2507.06542: what
  is sent late counts most for the models that members hold).
* ``window``: the same with the dense tenth in the middle.
* ``final-only``: nothing before one merge at the end.
* ``every``: a merge every H steps and no exchanges: federated averaging, or with an outer step DiLoCo.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.run_spec import RunSpec, SpecError
from training.spec_sections import PHASE_MERGES_MAX, PhaseSpec, SchedulePreset

SPARSE = 0.2
"""The chance of an exchange where they are rare (arXiv 2507.06542, R = 0.2)."""
DENSE_UNTIL = 0.5
THINNING = 5
"""How many times rarer merges are after that."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run's table; ``merge_points`` are the progresses at which merges are due, ascending."""

    phases: tuple[PhaseSpec, ...]
    merge_points: tuple[float, ...]

    @classmethod
    def of(cls, spec: RunSpec) -> Schedule:
        """What ``spec`` means."""
        steps, every_steps = spec.train.steps, spec.exchange.every_steps
        phases = spec.schedule.phases or _rows(spec.schedule.preset, steps, every_steps)
        points: list[float] = []
        begins = 0.0
        for phase in phases:
            length = phase.until - begins
            points += [round(begins + length * merge / phase.merges, 9) for merge in range(1, phase.merges)]
            points += [phase.until] * bool(phase.merges)
            begins = phase.until
        return cls(phases, tuple(points))

    def at(self, progress: float) -> PhaseSpec:
        """The row that holds at ``progress``."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    @property
    def exchanges(self) -> bool:
        """Whether anything is exchanged between merges."""
        return any(phase.probability for phase in self.phases)

    @property
    def peers_max(self) -> int:
        """The largest number of members that one pulls from at once."""
        return max(phase.peers for phase in self.phases)


def check_fan_out(spec: RunSpec, nodes: int) -> None:
    """Raise SpecError where nodes would pull from more members than a swarm of ``nodes`` has besides themselves."""
    peers, others = Schedule.of(spec).peers_max, max(nodes - 1, 1)
    if peers > others:
        raise SpecError(
            f"the run spec {spec.name} pulls from {peers} members at once, "
            f"and in a swarm of {nodes} there are {others}",
            why="an exchange with members that do not exist never becomes what the spec says",
            fix=f"set peers = {others} in the phases of [schedule], or start at least {peers + 1} nodes",
        )


def _rows(preset: SchedulePreset, steps: int, every_steps: int) -> tuple[PhaseSpec, ...]:
    def merges(length: float, apart: int = 1) -> int:
        return max(1, min(PHASE_MERGES_MAX, round(length * steps / (apart * every_steps))))

    match preset:
        case "early-dense":
            late = 1.0 - DENSE_UNTIL
            return (
                PhaseSpec(until=DENSE_UNTIL, probability=0.0, merges=merges(DENSE_UNTIL)),
                PhaseSpec(until=1.0, probability=0.0, merges=merges(late, THINNING)),
            )
        case "late-heavy":
            return PhaseSpec(until=0.9, probability=SPARSE), PhaseSpec(until=1.0, merges=1)
        case "window":
            return (
                PhaseSpec(until=0.45, probability=SPARSE),
                PhaseSpec(until=0.55),
                PhaseSpec(until=1.0, probability=SPARSE, merges=1),
            )
        case "final-only":
            return (PhaseSpec(until=1.0, probability=0.0, merges=1),)
        case "every":
            return (PhaseSpec(until=1.0, probability=0.0, merges=merges(1.0)),)
        case _:
            return (PhaseSpec(until=1.0, merges=1),)
