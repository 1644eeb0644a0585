"""Checkpoints: the trainer's state on disk, in two generations, each named by its own hash, and when they are taken.

Owns the ``checkpoints/`` folder of a run. A generation is one file, ``<serial>-<step>-<BLAKE3 hex>.safetensors``: the
name says what the bytes must hash to, so no manifest can disagree with them. The serial number tells which is newer:
a step does not, because a merge changes the weights between two steps. A new generation is durable before the
oldest is deleted; loading takes the newest whose bytes match their name and falls back one.

Relies on: Disk.write_atomic (old bytes or new, never a mix). Never looks inside the state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import trio
from blake3 import blake3

from gossip.disk import Disk
from node.compute import Compute
from node.costs import Costs
from training.learner import Learner

FOLDER = "checkpoints"
GENERATIONS = 2
EVERY_S_MIN = 10.0
SHARE_MAX = 0.02
"""Checkpoints take at most this share of the time, so they come as often as the model's size allows."""

NAME = re.compile(r"([0-9]{12,})-([0-9]+)-([0-9a-f]{64})\.safetensors")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified generation: ``state`` is what ``Learner.save`` returned at ``step``."""

    step: int
    state: bytes


class Checkpoints:
    """Saves and finds the trainer's state of one run."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.step = 0
        """Step of the newest generation known to be on disk; 0 when there is none."""

    async def save(self, step: int, state: bytes) -> None:
        """Make ``state`` the newest generation; durable on return. Raises OSError, the older ones intact."""
        newest = next(iter(await self._generations()), None)
        serial = 1 + (_parse(newest)[0] if newest is not None else 0)
        path = f"{FOLDER}/{serial:012d}-{step}-{blake3(state).hexdigest()}.safetensors"
        await self._disk.write_atomic(path, state)
        self.step = step
        for old in (await self._generations())[GENERATIONS:]:
            await self._disk.delete(old)

    async def load(self) -> Checkpoint | None:
        """The newest generation whose bytes are whole, or None. Damaged ones are logged and left for inspection."""
        for path in await self._generations():
            _, step, named_hash = _parse(path)
            try:
                state = await self._disk.read(path)
            except OSError as error:
                log.warning("checkpoint unreadable", path=path, error=str(error))
                continue
            if blake3(state).hexdigest() == named_hash:
                self.step = step
                return Checkpoint(step, state)
            log.warning("checkpoint damaged, trying the one before", path=path)
        return None

    async def _generations(self) -> list[str]:
        """Paths, newest first; other files in the folder are not ours to touch."""
        paths = [path for path, _ in await self._disk.list(FOLDER) if _is_generation(path)]
        return sorted(paths, reverse=True)


class Checkpointer:
    """Takes a running trainer's checkpoints. Failing is a problem to show, not a reason to die.

    ``based_on``: asked in the ``train`` lane, which merge the weights stand on; an older one where that changes just
    now. ``taken`` is told of it once a checkpoint of these weights is durable.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        trainer: Learner,
        compute: Compute,
        costs: Costs,
        based_on: Callable[[], bytes],
        taken: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._compute = compute
        self._costs = costs
        self._based_on = based_on
        self._taken = taken
        self._taking = trio.Lock()
        """Two at once could leave the older state as the newer generation, and looking for generations removes what a
        write under way has not renamed yet."""
        self._begun_s = -math.inf
        """When the last one was."""
        self.problem = ""
        """Why the last attempt failed, for people; empty when it did not."""

    async def run(self) -> None:
        """Take one whenever there is something new, at intervals that its cost allows, until cancelled."""
        pause_s = EVERY_S_MIN
        while True:
            await trio.sleep(pause_s)
            if self._trainer.step != self._checkpoints.step:
                began_s = trio.current_time()
                await self.take()
                pause_s = max(EVERY_S_MIN, (trio.current_time() - began_s) / SHARE_MAX)

    async def take_unless_recent(self) -> None:
        """Write the trainer's state to disk unless that was done just now."""
        if trio.current_time() >= self._begun_s + EVERY_S_MIN:
            await self.take()

    async def take(self) -> None:
        """Write the trainer's state to disk now."""
        async with self._taking:
            self._begun_s = trio.current_time()
            await self._take()

    async def _take(self) -> None:
        based_on, step, state = await self._compute.run(
            lambda: (self._based_on(), self._trainer.step, self._trainer.save()),
            lane="train",
            cost_s=self._costs.copy_s,
        )
        try:
            await self._checkpoints.save(step, state)
        except OSError as error:
            self.problem = f"checkpoint failed: {error.strerror}; free disk space, training goes on"
            log.warning("problem", text=self.problem)
        else:
            self.problem = ""
            await self._taken(based_on)


def _is_generation(path: str) -> bool:
    return NAME.fullmatch(path.rsplit("/", 1)[-1]) is not None


def _parse(path: str) -> tuple[int, int, str]:
    """Serial number, step and hash."""
    name = NAME.fullmatch(path.rsplit("/", 1)[-1])
    assert name is not None, "only generations are parsed"
    return int(name[1]), int(name[2]), name[3]
