"""What trials of one-byte mode and of MeZO in fp32 come to: who is compared with whom, and two criteria.

* As good: the mean over seeds of what floats gain over bytes is within two standard errors of it, or within a tenth of
  the drop of the loss with floats. Each is taken at the step size with the lowest loss at the end.
* As fast: a swarm comes to a loss in at most 0.3 of the steps of one node, means over seeds. The loss is nine tenths
  down the drop of one node, and both take the step size that gets there first. A node that never does has taken all its
  steps, which is in the disfavour of the swarm; a swarm that never does has taken for ever.

Owns the judgement, the table and the picture. Never runs a trial.

Relies on: trials of one seed saw the same minibatches in the same order, so that they can be compared pair by pair.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.one_byte_runs import Course, Method, Trial
from netsim.plots import COLOURS

STANDARD_ERRORS = 2.0
SHARE_OF_DROP = 0.1
GOAL = 0.9
STEPS_RATIO_MAX = 0.3


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to fine-tune, with one step size: its courses, seed by seed."""

    method: Method
    nodes: int
    step_size: float
    courses: tuple[Course, ...]

    @property
    def name(self) -> str:
        """For people."""
        who = "one node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{'one byte' if self.method == 'bytes' else 'fp32 MeZO'}, {who}"

    @property
    def ends(self) -> list[float]:
        """Held-out losses at the end."""
        return [course.losses[-1] for course in self.courses]

    @property
    def drops(self) -> list[float]:
        """By how much the loss fell."""
        return [course.losses[0] - course.losses[-1] for course in self.courses]

    def steps_to(self, goal: float) -> list[float]:
        """Steps of each node until the loss was ``goal``; where it never was, infinity, or all steps of one node."""
        never = math.inf if self.nodes > 1 else float(self.courses[0].steps[-1])
        return [_steps_to(course, goal, never) for course in self.courses]


def _steps_to(course: Course, goal: float, never: float) -> float:
    """Along the straight line between the evaluations before and after."""
    for after, loss in enumerate(course.losses):
        if loss <= goal:
            if not after:
                return 0.0
            before = after - 1
            part = (course.losses[before] - goal) / (course.losses[before] - loss)
            return course.steps[before] + part * (course.steps[after] - course.steps[before])
    return never


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all trials come to."""

    arms: tuple[Arm, ...]
    of_bytes: Arm
    """One node at the step size with the lowest loss at the end, as is ``of_floats``."""
    of_floats: Arm
    goal: float
    """A held-out loss."""
    one: Arm
    """One node at the step size that comes to ``goal`` first, as is ``swarm``."""
    swarm: Arm

    @classmethod
    def of(cls, results: Iterable[tuple[Trial, Course]]) -> Outcome:
        """Of all trials of a plan, which has the same seeds in the same order for each arm."""
        courses: dict[tuple[Method, int, float], list[Course]] = {}
        for trial, course in results:
            courses.setdefault((trial.method, trial.nodes, trial.step_size), []).append(course)
        arms = tuple(Arm(*key, tuple(found)) for key, found in courses.items())
        one_node = [arm for arm in arms if arm.method == "bytes" and arm.nodes == 1]
        of_bytes = _lowest(one_node)
        goal = statistics.fmean(course.losses[0] for course in of_bytes.courses)
        goal -= GOAL * statistics.fmean(of_bytes.drops)
        return cls(
            arms=arms,
            of_bytes=of_bytes,
            of_floats=_lowest([arm for arm in arms if arm.method == "floats"]),
            goal=goal,
            one=_first(one_node, goal),
            swarm=_first([arm for arm in arms if arm.nodes > 1], goal),
        )

    @property
    def behind(self) -> list[float]:
        """By how much the loss with bytes is above that with floats at the end, seed by seed."""
        return [a - b for a, b in zip(self.of_bytes.ends, self.of_floats.ends, strict=True)]

    @property
    def behind_max(self) -> float:
        """As far behind as the criterion allows."""
        return max(
            STANDARD_ERRORS * standard_error(self.behind),
            SHARE_OF_DROP * statistics.fmean(self.of_floats.drops),
        )

    @property
    def as_good(self) -> bool:
        """The first criterion."""
        return statistics.fmean(self.behind) <= self.behind_max

    @property
    def ratios(self) -> list[float]:
        """Steps of the swarm over steps of one node, seed by seed."""
        return [
            a / b for a, b in zip(self.swarm.steps_to(self.goal), self.one.steps_to(self.goal), strict=True)
        ]

    @property
    def ratio(self) -> float:
        """The same of the means over seeds."""
        return statistics.fmean(self.swarm.steps_to(self.goal)) / statistics.fmean(
            self.one.steps_to(self.goal)
        )

    @property
    def as_fast(self) -> bool:
        """The second criterion."""
        return self.ratio <= STEPS_RATIO_MAX

    def sentences(self) -> list[str]:
        """Both criteria in words, with what was measured."""
        start = self.of_bytes.courses[0].losses[0]
        swarm, one = (statistics.fmean(arm.steps_to(self.goal)) for arm in (self.swarm, self.one))
        return [
            f"{_shown(self.as_good)} from {start:.4f} nats per byte the held-out loss falls by"
            f" {spread(self.of_bytes.drops)} with one byte per record and by {spread(self.of_floats.drops)} with fp32"
            f" MeZO; bytes are behind by {spread(self.behind, sign='+')}, at most {self.behind_max:.4f} allowed",
            f"{_shown(self.as_fast)} {self.swarm.nodes} nodes come to {self.goal:.4f} in {swarm:.0f} steps, one in"
            f" {one:.0f}: a ratio of {self.ratio:.3f}, at most {STEPS_RATIO_MAX} allowed; seed by seed"
            f" {spread(self.ratios, digits=3)} ({min(self.ratios):.3f} .. {max(self.ratios):.3f})",
        ]

    def table(self) -> list[list[str]]:
        """A row for each arm, under a header."""
        header = [
            "records",
            "step size",
            "loss falls by",
            f"steps to {self.goal:.4f}",
            "zero",
            "clipped",
            "best at",
        ]
        return [header, *(self._line(arm) for arm in self.arms)]

    def _line(self, arm: Arm) -> list[str]:
        steps = arm.steps_to(self.goal)
        never = sum(min(course.losses) > self.goal for course in arm.courses)
        reached = (
            "never"
            if never == len(steps)
            else f"{statistics.fmean(steps):.0f} ({min(steps):.0f} .. {max(steps):.0f})"
        )
        if 0 < never < len(steps):
            reached = f"{len(steps) - never} of {len(steps)} seeds"
        best = {"loss": (self.of_bytes, self.of_floats), "steps": (self.one, self.swarm)}
        return [
            arm.name,
            f"{arm.step_size:g}",
            spread(arm.drops),
            reached,
            *(
                f"{statistics.fmean(shares):.1%}" if arm.method == "bytes" else ""
                for shares in ([c.zero for c in arm.courses], [c.clipped for c in arm.courses])
            ),
            ", ".join(word for word, arms in best.items() if arm in arms),
        ]


def _lowest(arms: Sequence[Arm]) -> Arm:
    return min(arms, key=lambda arm: statistics.fmean(arm.ends))


def _first(arms: Sequence[Arm], goal: float) -> Arm:
    return min(arms, key=lambda arm: statistics.fmean(arm.steps_to(goal)))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of ``values``."""
    return statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], *, digits: int = 4, sign: str = "") -> str:
    """Mean and standard error; infinite where one value is."""
    mean = statistics.fmean(values)
    error = standard_error(values) if math.isfinite(mean) else math.inf
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def _shown(met: bool) -> str:
    return "**Shown:**" if met else "**Not shown:**"


# --- showing ------------------------------------------------------------------------------------------------------


def draw(outcome: Outcome, file: Path) -> None:
    """Held-out loss by records with bytes and with floats, and by steps on one node and on several."""
    figure = Figure(figsize=(32 / 3, 4.6), dpi=150, layout="constrained")
    by_records, by_steps = figure.subplots(1, 2, sharey=True)
    for colour, best in zip(COLOURS, (outcome.of_bytes, outcome.of_floats), strict=False):
        for arm in outcome.arms:
            if (arm.method, arm.nodes) == (best.method, best.nodes) and arm is not best:
                _draw(by_records, arm, colour, label=None)
        _draw(by_records, best, colour, label=f"{best.name}, step size {best.step_size:g}")
    for colour, arm in zip((COLOURS[0], COLOURS[2]), (outcome.one, outcome.swarm), strict=True):
        _draw(by_steps, arm, colour, label=f"{arm.name}, step size {arm.step_size:g}")
    by_steps.axhline(outcome.goal, color="#555555", linewidth=0.8, linestyle="--")
    by_steps.text(
        0.99, outcome.goal, f"{GOAL:.0%} of the drop", transform=by_steps.get_yaxis_transform(),
        ha="right", va="bottom", fontsize=8, color="#555555",
    )  # fmt: skip
    by_records.set_ylabel("held-out loss, nats per byte", fontsize=9)
    by_records.set_xlabel(
        "records; line: mean of the seeds, band: all of them, thin: other step sizes", fontsize=8
    )
    by_steps.set_xlabel("steps of each node, a record each", fontsize=8)
    # Too large a step soon leaves the picture: what matters is where the best ones end.
    ends = [loss for arm in (outcome.of_bytes, outcome.of_floats, outcome.swarm) for loss in arm.ends]
    start = outcome.of_bytes.courses[0].losses[0]
    by_records.set_ylim(min(ends) - 0.1 * (start - min(ends)), start + 0.05 * (start - min(ends)))
    for axes in (by_records, by_steps):
        axes.set_xlim(left=0)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file)


def _draw(axes: Axes, arm: Arm, colour: str, *, label: str | None) -> None:
    """The mean over seeds; with a ``label`` also the band in which they lie."""
    steps = arm.courses[0].steps
    by_time = list(zip(*(course.losses for course in arm.courses), strict=True))
    means = [statistics.fmean(losses) for losses in by_time]
    axes.plot(steps, means, color=colour, label=label, linewidth=1.6 if label else 0.6)
    if label:
        low, high = ([pick(losses) for losses in by_time] for pick in (min, max))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
