"""What a machine has on its disk when its process stops, and whether the next one goes on from there.

Owns the checker ``checkpoints`` (S5).
"""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3

from netsim.checkers.base import Machine, Report, Watcher, World
from node.checkpoints import FOLDER, NAME, Checkpoint
from node.gossip_node import GossipNode

REMEMBERED = 4
"""Checkpoints of each machine that are remembered: more than are kept."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One checkpoint: the step it was taken at and the hash of its bytes."""

    step: int
    digest: str


class CheckpointsHold(Watcher):
    """S5: what was reported durable can be loaded after any stop, and the next life goes on from it or a later one.

    Where a fault of the disk damaged it, the one before does.
    """

    name = "checkpoints"

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._durable: dict[int, list[Generation]] = {}
        """By machine, the newest last."""

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See what is reported durable, and what is loaded."""
        durable = self._durable.setdefault(machine.number, [])

        def saved(_: None, step: int, state: bytes) -> None:
            durable.append(Generation(step, blake3(state).hexdigest()))
            del durable[:-REMEMBERED]

        def loaded(checkpoint: Checkpoint | None) -> None:
            found = self._check_disk(machine)
            at = checkpoint.step if checkpoint is not None else None
            if at != (found.step if found is not None else None):
                self.fail(f"went on from {at}, a checkpoint of {found} is on the disk", machine.number)

        self.after(node.checkpoints, "save", saved)
        self.after(node.checkpoints, "load", loaded)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """The disk, right after the process."""
        self._check_disk(machine)

    def finished(self, now_s: float) -> None:
        """The disks of all."""
        for machine in self.honest():
            self._check_disk(machine)

    def _check_disk(self, machine: Machine) -> Generation | None:
        """The newest generation that can be loaded, after checking that it is new enough."""
        found = self._loadable(machine)
        newest = found[0] if found else None
        for promised in reversed(self._durable.get(machine.number, [])):
            if promised in found or (newest is not None and newest.step > promised.step):
                break
            if not self._damaged(machine, promised):
                self.fail(
                    f"the checkpoint of step {promised.step} is lost, the newest on the disk is {newest}",
                    machine.number,
                )
                break
        return newest

    def _loadable(self, machine: Machine) -> list[Generation]:
        """All generations on the disk whose bytes are whole, newest first."""
        found = []
        for path, data in sorted(machine.disk.files_in(FOLDER).items(), reverse=True):
            name = NAME.fullmatch(path.rpartition("/")[2])
            if name is not None and blake3(data).hexdigest() == name[3]:
                found.append(Generation(int(name[2]), name[3]))
        return found

    def _damaged(self, machine: Machine, generation: Generation) -> bool:
        return any(path.startswith(FOLDER) and generation.digest in path for path in machine.disk.damaged)
