"""What must be true of numbers and bytes at all times: weights are finite, bytes are what their name says.

Owns the checkers ``finite`` (S3) and ``hashes`` (S1).
"""

from __future__ import annotations

import numpy as np
import torch

from gossip.messages import ShardRef
from gossip.store import FOLDER
from netsim.checkers.anchors import name_of
from netsim.checkers.base import Machine, Report, Watcher, World, short
from node.gossip_node import GossipNode
from node.merge_host import Adoption


class Finite(Watcher):
    """S3: no value that is not finite is in the live weights or in an anchor, at any time.

    Checked whenever somebody else than the inner steps writes, and now and then.
    """

    name = "finite"
    every_s = 5.0

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See every write."""
        trainer = node.trainer

        def added(_: None, fragment: int | None, delta: torch.Tensor) -> None:
            if not finite(delta) or not finite(trainer.read(fragment)):
                self.fail("a mix left weights that are not finite", machine.number)

        def written(_: None, values: torch.Tensor) -> None:
            if not finite(values):
                self.fail("weights that are not finite were written", machine.number)

        def adopted(_: None, adoption: Adoption) -> None:
            if not finite(adoption.anchor):
                self.fail("an anchor that is not finite", machine.number)

        self.after(trainer, "add", added)
        self.after(trainer, "write", written)
        self.after(node.merge_host, "_adopted", adopted)

    def look(self, now_s: float) -> None:
        """The live weights of everybody."""
        for machine, node in self.running():
            if not finite(node.trainer.read()):
                self.fail("live weights that are not finite", machine.number)


class Hashes(Watcher):
    """S1: bytes handed out under a name hash to it, and a file that does not was damaged by a fault of the disk."""

    name = "hashes"

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._sound: dict[tuple[int, str], bytes] = {}
        """The bytes of each file when it was last found whole; other bytes under its name are looked at anew."""

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See what fetches and the store return."""

        def fetched(data: bytes, ref: ShardRef, *_: object, **__: object) -> None:
            if name_of(data) != ref:
                self.fail(f"a fetch of shard {short(ref.root)} returned other bytes", machine.number)

        def got(data: bytes, ref: ShardRef) -> None:
            if name_of(data) != ref:
                self.fail(f"the store returned other bytes for shard {short(ref.root)}", machine.number)

        self.after(node.fetcher, "fetch", fetched)
        self.after(node.store, "get", got)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """What lies on the disk of a machine that stopped."""
        self._check_files(machine)

    def finished(self, now_s: float) -> None:
        """What lies on all disks."""
        for machine in self.honest():
            self._check_files(machine)

    def _check_files(self, machine: Machine) -> None:
        found = machine.disk.files_in(FOLDER)
        for path, data in found.items():
            if self._sound.get((machine.number, path)) is data:
                continue
            ref = name_of(data) if data else None
            if ref is not None and path == f"{FOLDER}/{ref.root.hex()}-{ref.size}":
                self._sound[machine.number, path] = data
            elif path not in machine.disk.damaged:
                self.fail(f"{path} does not hold what its name says", machine.number)
        for key in [key for key in self._sound if key[0] == machine.number and key[1] not in found]:
            del self._sound[key]


def finite(values: torch.Tensor) -> bool:
    """Whether every element is."""
    return bool(np.isfinite(values.numpy()).all())
