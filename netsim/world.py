"""A world of nodes in virtual time: the daemon's own Node on simulated machines.

Owns the machines (key, disk, speed), which outlive the processes on them, and starts, kills and restarts those
processes. What happens in the network between them is ``netsim.network``'s to say. Everything follows from the
spec, the text and one seed, inside ``netsim.determinism``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from netsim.compute import SimCompute
from netsim.disk import SimDisk
from netsim.network import LinkModel, SimNetwork, open_sim_network
from node.costs import Costs
from node.life import begin_life
from node.node import Node
from node.runtime import Runtime
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS, Limits
from training.data import Corpus
from training.run_spec import RunSpec, run_id
from training.trainer import Trainer

HOME_LINK = LinkModel()
"""Between any two machines unless a scenario says otherwise."""


@dataclass(slots=True)
class Machine:
    """What survives a killed process: the key, the disk and the hardware."""

    identity: Identity
    disk: SimDisk
    compute: SimCompute
    costs: Costs
    part: tuple[int, int]
    node: Node | None = None
    """The process running now."""
    process: trio.CancelScope | None = None


class World:
    """``machines`` on one network, all for one run."""

    def __init__(
        self,
        network: SimNetwork,
        nursery: trio.Nursery,
        *,
        spec: RunSpec,
        corpus: Corpus,
        machines: int,
        seed: int,
    ) -> None:
        self.network = network
        self.spec = spec
        self._nursery = nursery
        self._corpus = corpus
        self._seed = seed
        self.machines = [
            Machine(
                identity=_identity(seed, number),
                disk=SimDisk(),
                compute=SimCompute(),
                costs=Costs(),
                part=(number + 1, machines),
            )
            for number in range(machines)
        ]

    async def start(self, number: int, *, bootstrap: int | None = None) -> Node:
        """Start the process of one machine; ``bootstrap`` is the machine whose address it is given."""
        started = trio.Event()
        self._nursery.start_soon(self._run, number, bootstrap, started)
        await started.wait()
        node = self.machines[number].node
        assert node is not None
        return node

    async def start_all(self) -> list[Node]:
        """Start every machine, the first one being everybody's bootstrap."""
        return [
            await self.start(number, bootstrap=0 if number else None) for number in range(len(self.machines))
        ]

    def kill(self, number: int) -> None:
        """``kill -9``: the process is gone between two instants; its disk stays as it is."""
        machine = self.machines[number]
        assert machine.process is not None
        self.network.crash(machine.identity.peer)
        machine.process.cancel()
        machine.node = machine.process = None

    async def _run(self, number: int, bootstrap: int | None, started: trio.Event) -> None:
        machine = self.machines[number]
        known = []
        if bootstrap is not None:
            peer = self.machines[bootstrap].identity.peer
            known = [f"{self.network.hosts[peer].local.addresses[0]}/p2p/{peer}"]
        with trio.CancelScope() as machine.process:
            async with self.network.open_host(machine.identity.peer) as transport:
                machine.node = Node(
                    Runtime(
                        transport=transport,
                        disk=machine.disk,
                        compute=machine.compute,
                        signer=machine.identity,
                        rng=random.Random(f"{self._seed}/{number}"),
                        wall_time_s=trio.current_time,
                        costs=machine.costs,
                    ),
                    spec=self.spec,
                    trainer=Trainer(
                        self.spec,
                        self._corpus,
                        run=run_id(self.spec),
                        peer=machine.identity.peer,
                        part=machine.part,
                        device="cpu",
                        threads=1,
                    ),
                    state=await begin_life(machine.disk, wall_time_s=trio.current_time()),
                    bootstrap=known,
                    agent="netsim",
                    store_bytes_max=machine.disk.capacity_bytes // 2,
                    upload_bytes_per_s_max=0,
                    download_bytes_per_s_max=0,
                    limits=self.network.limits,
                )
                started.set()
                await machine.node.run()


@contextlib.asynccontextmanager
async def open_world(
    spec: RunSpec,
    corpus: Corpus,
    *,
    machines: int,
    seed: int,
    link: LinkModel = HOME_LINK,
    limits: Limits = DEFAULT_LIMITS,
) -> AsyncIterator[World]:
    """A world on trio's current clock, all machines off. Leaving the block kills what still runs."""
    async with (
        open_sim_network(random.Random(seed), link=link, limits=limits) as network,
        trio.open_nursery() as nursery,
    ):
        yield World(network, nursery, spec=spec, corpus=corpus, machines=machines, seed=seed)
        nursery.cancel_scope.cancel()


def _identity(seed: int, number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(blake3(f"netsim/{seed}/{number}".encode()).digest()))
