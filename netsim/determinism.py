"""What makes trio repeat itself: two private switches and a clock that simulations turn, in one place.

trio shuffles each batch of runnable tasks with a module-level generator, and breaks ties between equal deadlines
by object identity. Both must be pinned before two runs from one seed are equal. ``SimClock`` relies on what
trio's own MockClock relies on: ``_autojump`` is called when every task is blocked. These names are private to trio:
``tests/netsim/test_determinism.py`` fails loudly when they change.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import trio
import trio._core._run as scheduler
from trio.testing import MockClock

FLAG, GENERATOR = "_ALLOW_DETERMINISTIC_SCHEDULING", "_r"

IDLE_SLEEP_S = 1e9
"""How long trio may sleep for real when nothing is due: for ever, but ``_autojump`` comes first."""


@contextlib.contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Within the block, ``trio.run`` schedules tasks as a pure function of ``seed`` and the program."""
    pinned = {FLAG: True, GENERATOR: random.Random(seed)}
    saved = {name: getattr(scheduler, name) for name in pinned}
    for name, value in pinned.items():
        setattr(scheduler, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(scheduler, name, value)


class SimClock(trio.abc.Clock):
    """Virtual time that jumps to whatever is due next: a deadline of trio's, or an action that was asked for.

    Actions cost no task and no cancel scope, which is why the network is fast: they run between two batches of tasks,
    must not raise, and may wake tasks and start them. At equal times they run before deadlines expire, in the order
    in which they were asked for.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._actions: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    @property
    def __class__(self) -> type[Any]:
        # trio asserts that whatever jumps is its own MockClock, which is final.
        return MockClock

    @__class__.setter
    def __class__(self, _: type[Any]) -> None:
        raise TypeError("a clock stays what it is")

    def start_clock(self) -> None:
        """Have the run call ``_autojump`` as soon as every task is blocked."""
        scheduler.GLOBAL_RUN_CONTEXT.runner.clock_autojump_threshold = 0

    def current_time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Nothing is slept away: time jumps."""
        return 0 if deadline <= self._now else IDLE_SLEEP_S

    def jump(self, seconds: float) -> None:
        """Move on by hand; what falls due meanwhile happens afterwards."""
        self._now += seconds

    def at(self, due_s: float, action: Callable[..., None], *args: Any) -> None:
        """Run ``action(*args)`` at virtual time ``due_s``, or at once when that has passed."""
        heapq.heappush(self._actions, (due_s, next(self._order), action, args))

    def _autojump(self) -> None:
        deadline_s = scheduler.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
        actions = self._actions
        if actions and actions[0][0] <= deadline_s:
            now_s = self._now = max(self._now, actions[0][0])
            while actions and actions[0][0] <= now_s:
                _, _, action, args = heapq.heappop(actions)
                action(*args)
        elif deadline_s < float("inf"):
            self._now = max(self._now, deadline_s)


def sim_clock() -> SimClock:
    """The clock of this run. Raises RuntimeError outside of a simulation."""
    clock: Any = scheduler.GLOBAL_RUN_CONTEXT.runner.clock
    if type(clock) is not SimClock:
        raise RuntimeError("netsim needs trio.run(..., clock=SimClock())")
    return clock
