"""SimCompute: mathematics inline, paid for in virtual seconds.

Owns the two lanes of one machine and how fast it is. A worker thread would break virtual time: the clock does not see
it, so every deadline would pass while it works. Each lane does one thing at a time, in order of asking, as a lane of
``node.compute.ThreadCompute`` does; a call that is cancelled before its time has passed is never made.

Relies on ``netsim.determinism.SimClock``, whose timers cost a quarter of trio's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from netsim.determinism import SimClock, sim_clock
from node.compute import Lane

T = TypeVar("T")


@dataclass(slots=True)
class _Lane:
    busy: bool = False
    waiting: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)


@dataclass(slots=True)
class _Working:
    """The task whose time is passing, and the stalls its time already allows for."""

    task: trio.lowlevel.Task | None
    stalled_s: float


class SimCompute:
    """One machine's compute. Implements node.compute.Compute."""

    def __init__(self, *, slowness: float = 1.0) -> None:
        self.slowness = slowness
        """Multiplies every cost (10.0 is a machine ten times slower). May change; work under way keeps its pace."""
        self._lanes: dict[Lane, _Lane] = {"train": _Lane(), "side": _Lane()}
        self._stalled_until_s = 0.0
        self._stalled_s = 0.0

    async def run(self, function: Callable[[], T], *, lane: Lane, cost_s: float) -> T:
        """``function()``, after its cost has passed: what it reads is as of the moment it ends."""
        queue = self._lanes[lane]
        if queue.busy:
            await queue.waiting.park()  # and whoever is done hands the lane over
        queue.busy = True
        try:
            await self._work(cost_s * self.slowness)
            return function()
        finally:
            if queue.waiting:
                queue.waiting.unpark()
            else:
                queue.busy = False

    def stall(self, seconds: float) -> None:
        """Both lanes stop for ``seconds`` from now: a long garbage collection, a closed lid. Work under way waits."""
        now_s = trio.current_time()
        until_s = max(self._stalled_until_s, now_s + seconds)
        self._stalled_s += until_s - max(self._stalled_until_s, now_s)
        self._stalled_until_s = until_s

    async def _work(self, seconds: float) -> None:
        clock = sim_clock()
        working = _Working(trio.lowlevel.current_task(), self._stalled_s)

        def abandon(_: object) -> trio.lowlevel.Abort:
            working.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        clock.at(max(clock.current_time(), self._stalled_until_s) + seconds, self._worked, clock, working)
        await trio.lowlevel.wait_task_rescheduled(abandon)

    def _worked(self, clock: SimClock, working: _Working) -> None:
        if working.task is None:
            return
        late_s = self._stalled_s - working.stalled_s
        if late_s > 0:
            working.stalled_s = self._stalled_s
            clock.at(clock.current_time() + late_s, self._worked, clock, working)
        else:
            trio.lowlevel.reschedule(working.task)
