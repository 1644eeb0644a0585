"""The round machine: when to train, exchange, merge, checkpoint and finish. IO-free.

Owns the schedule of one node's life in a run and no bytes. ``plan`` says what to do next from the events it has
been told; the shell in ``node.node`` does it. Training never waits for an exchange: at most one is in flight,
and one that would start while another runs is skipped and counted. Training stops only at the last step, where the
node idles until the final merge is committed.

Progress is the fraction of inner steps taken. Merge points are numbered by how many scheduled points have been
passed once they are done: the first point is 1, "none yet" is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Train:
    """Take up to ``steps_max`` inner steps, then come back."""

    steps_max: int


@dataclass(frozen=True, slots=True)
class AwaitFinalMerge:
    """All inner steps are taken; wait until the final merge is committed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Trained and merged: nothing is left to do but serve others."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Publish ``fragment`` as of ``step`` and mix it with what peers published."""

    fragment: int
    step: int


class Rounds:
    """One node's schedule. ``every_steps`` is H, ``fragments`` is S (docs/ARCHITECTURE.md, exchange)."""

    def __init__(
        self,
        *,
        steps_total: int,
        every_steps: int,
        fragments: int,
        merge_points: Sequence[float],
        exchanging: bool,
    ) -> None:
        self.steps_total = steps_total
        self.merge_points = tuple(merge_points)
        self.step = 0
        self.points_passed = 0
        self.exchanges_skipped = 0
        self._every_steps = every_steps
        self._fragments = fragments
        self._exchanging = exchanging
        self._exchange_in_flight = False

    def resume(self, step: int) -> None:
        """Continue from a checkpoint taken at ``step``."""
        self.step = step

    def plan(self) -> Train | AwaitFinalMerge | Finished:
        """What the training task does next."""
        if self.step < self.steps_total:
            to_boundary = self._every_steps - self.step % self._every_steps
            return Train(min(to_boundary, self.steps_total - self.step))
        if self.points_passed < len(self.merge_points):
            return AwaitFinalMerge()
        return Finished()

    def trained(self, step: int) -> Exchange | None:
        """Inner steps were taken up to ``step``; returns the exchange that is due now, if any."""
        self.step = step
        if not self._exchanging or step % self._every_steps or step >= self.steps_total:
            return None
        if self._exchange_in_flight:
            self.exchanges_skipped += 1
            return None
        self._exchange_in_flight = True
        return Exchange(fragment=step // self._every_steps % self._fragments, step=step)

    def exchange_ended(self) -> None:
        """The exchange in flight is over, whether it was applied or not."""
        self._exchange_in_flight = False

    def merge_committed(self, points_passed: int) -> None:
        """A merge was committed whose record says how many scheduled points are now passed."""
        self.points_passed = max(self.points_passed, points_passed)


@dataclass(frozen=True, slots=True)
class MemberProgress:
    """How far one alive member is, as it advertises."""

    step: float
    steps_total: int
    steps_per_s: float

    def reached(self, point: float) -> bool:
        """Whether the member's progress is at or beyond ``point``."""
        return self.step >= point * self.steps_total

    def eta_s(self, point: float) -> float | None:
        """Seconds until the member reaches ``point`` at its present speed; None while its speed is unknown."""
        missing = point * self.steps_total - self.step
        if missing <= 0:
            return 0.0
        return missing / self.steps_per_s if self.steps_per_s > 0 else None


class MergeWatch:
    """Decides when a scheduled global merge is due, from what members advertise. IO-free; one per node.

    A point is due once every alive member has reached it. Before that, once half have, the rest are waited for as
    long as their own advertised speed says they need (with half as much again and a floor), never longer than
    ``wait_s_max``; and ``wait_s_max`` after the first member reached it, whoever is there merges. A node that knows of
    others but sees none alive waits as long: it may only just have started, or be cut off.
    """

    FLOOR_S = 2.0
    SLACK = 1.5
    LOOK_SHARE = 0.75
    LOOK_S_MIN = 0.25
    LOOK_S_MAX = 10.0
    LOOK_S_WAITING = 1.0

    def __init__(self, points: Sequence[float], *, wait_s_max: float) -> None:
        self._points = tuple(points)
        self._wait_s_max = wait_s_max
        self._point = 0
        self._first_reached_s: float | None = None
        self._deadline_s: float | None = None

    def due(
        self, points_passed: int, members: Sequence[MemberProgress], now_s: float, *, others_known: bool
    ) -> bool:
        """Whether the point after ``points_passed`` is due at ``now_s``, given the alive members, own included."""
        if points_passed >= len(self._points):
            return False
        if points_passed != self._point:
            self._point, self._first_reached_s, self._deadline_s = points_passed, None, None
        point = self._points[points_passed]
        missing = [member for member in members if not member.reached(point)]
        if len(missing) == len(members):
            return False
        waits_for_others = others_known and len(members) == 1
        if not missing and not waits_for_others:
            return True
        if self._first_reached_s is None:
            self._first_reached_s = now_s
        if self._deadline_s is None and 0 < 2 * len(missing) <= len(members):
            self._deadline_s = now_s + self._patience_s(missing, point)
        cap_s = self._first_reached_s + self._wait_s_max
        return now_s >= min(cap_s, self._deadline_s if self._deadline_s is not None else cap_s)

    def passed(self, points_passed: int, members: Sequence[MemberProgress]) -> int:
        """How many points a merge passes that is due now: on a slow network, several at once.

        Those that most members have reached, but for the last one, which is waited for by itself.
        """
        passed = points_passed + 1
        while passed < len(self._points):
            there = sum(member.reached(self._points[passed]) for member in members)
            last = passed + 1 == len(self._points)
            if there < len(members) if last else 2 * there <= len(members):
                break
            passed += 1
        return passed

    def pause_s(self, points_passed: int, members: Sequence[MemberProgress]) -> float:
        """How long nothing can fall due, within bounds: until the fastest member may have reached the next point.

        Once a member has reached it the others are what it waits for, and who is alive may change at any time.
        """
        if points_passed >= len(self._points):
            return self.LOOK_S_MAX
        etas = [member.eta_s(self._points[points_passed]) for member in members]
        if 0.0 not in etas:
            earliest_s = min((eta for eta in etas if eta is not None), default=0.0)
            return min(max(self.LOOK_SHARE * earliest_s, self.LOOK_S_MIN), self.LOOK_S_MAX)
        missing_s = [eta for eta in etas if eta]
        if not missing_s:
            return self.LOOK_S_WAITING
        return min(max(self.LOOK_SHARE * max(missing_s), self.LOOK_S_MIN), self.LOOK_S_WAITING)

    def _patience_s(self, missing: Sequence[MemberProgress], point: float) -> float:
        etas = [member.eta_s(point) for member in missing]
        if any(eta is None for eta in etas):
            return self._wait_s_max
        return self.FLOOR_S + self.SLACK * max(eta for eta in etas if eta is not None)
