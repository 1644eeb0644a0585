"""Death at a counted moment: before the n-th step of the tasks of a process, or within its n-th disk operation.

Owns the counting. A scenario's faults come at times; these come at places in the program, so that a sweep over all
numbers visits every place at which a process can be cancelled or lose its power. What is done there is the caller's to
say, mostly a verb of the world.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import trio

from netsim.disk import SimDisk
from netsim.world import Machine, task_name

Moment = Literal["before", "after"]


class StepCounter(trio.abc.Instrument):
    """Counts the steps of all tasks of one machine's processes, from checkpoint to checkpoint, and acts before one.

    Added with ``trio.lowlevel.add_instrument`` before the machine is switched on. trio logs what ``action`` raises and
    takes the counter out of the run; ``acted`` is false then.
    """

    def __init__(self, machine: Machine, *, at: float = math.inf, action: Callable[[], None]) -> None:
        """``action()`` is called once, before the step with number ``at``; the first one is 0."""
        self.steps = 0
        self.acted = False
        self.living: set[trio.lowlevel.Task] = set()
        """The tasks of the process running now."""
        self._root = task_name(machine.number)
        self._at = at
        self._action = action

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """One more task somewhere."""
        nursery = task.parent_nursery
        if task.name == self._root or (nursery is not None and nursery.parent_task in self.living):
            self.living.add(task)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """One task less."""
        self.living.discard(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step of some task."""
        if task not in self.living:
            return
        self.steps += 1
        if self.steps == self._at + 1:
            self._action()
            self.acted = True


def at_operation(disk: SimDisk, number: int, moment: Moment, action: Callable[[], None]) -> None:
    """Call ``action()`` once, ``before`` or ``after`` the effect of operation ``number`` of ``disk``, or a later one.

    Takes the place of the disk's hooks until then.
    """

    def reached(at: int, verb: str, path: str) -> None:
        if at >= number:
            disk.on_operation = disk.on_effect = None
            action()

    if moment == "before":
        disk.on_operation = reached
    else:
        disk.on_effect = reached
