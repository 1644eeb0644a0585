"""A world of nodes in virtual time: the daemon's own node on simulated machines.

Owns the machines (key, disk, speed), which outlive the processes on them, and starts, stops, kills and restarts those
processes. What happens in the network between them is ``netsim.network``'s to say, what they learn is handed in.
Everything follows from the spec, the learners and one seed, inside ``netsim.determinism``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import trio
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from netsim.compute import SimCompute
from netsim.disk import SimDisk
from netsim.network import HOME_LINK, LinkModel, SimNetwork, address_of, open_sim_network
from netsim.signer import StubSigner, machine_peer, world_key
from node.costs import Costs
from node.gossip_node import GossipNode
from node.life import NodeState, begin_life
from node.node import Node
from node.one_byte_node import OneByteNode
from node.runtime import NodeOptions, Runtime
from p2p.identity import Identity, Signer
from p2p.limits import DEFAULT_LIMITS, Limits
from p2p.transport import PeerId
from training.data import Corpus
from training.learner import Learner
from training.one_byte import RecordLearner
from training.run_spec import RunSpec, run_id
from training.spec_sections import OneByteSpec
from training.trainer import Trainer

BOOTSTRAP_ADDRESSES = 3
"""As many as an invite names."""
RESTART_S = 5.0
"""Between two attempts to start a process that ended by itself, as a service manager would wait."""


@dataclass(slots=True, eq=False)
class Machine:
    """What survives a killed process: the key, the disk and the hardware."""

    number: int
    identity: Signer
    disk: SimDisk
    compute: SimCompute
    costs: Costs
    spoil: Callable[[Any], None] | None = None
    """Makes each node on it tell a lie (``netsim.attackers``)."""
    bootstrap: tuple[int, ...] = ()
    """The machines whose addresses each of its processes is given."""
    wanted: bool = False
    """Whether a process shall run here."""
    node: Node | None = None
    """The process running now."""
    process: trio.CancelScope | None = None
    """Around the process, or around the wait for the next attempt to start it."""
    kept: bool = False
    """Whether a task of the world starts processes here as long as they are wanted."""
    started: trio.Event = field(default_factory=trio.Event)
    """Set once the node is there that was asked for last."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set once no task of the last process is left."""
    starts_s: list[float] = field(default_factory=list)
    """When each life began."""
    bytes_sent_before: int = 0
    """By the processes before the one running now."""

    @property
    def gossip_node(self) -> GossipNode | None:
        """The process running now, where the run is in gossip mode."""
        return self.node if isinstance(self.node, GossipNode) else None

    @property
    def honest(self) -> bool:
        """Whether it runs the product as it is."""
        return self.spoil is None

    @property
    def peer(self) -> PeerId:
        """Its name in the swarm."""
        return self.identity.peer

    @property
    def bytes_sent(self) -> int:
        """Payload bytes over all its lives."""
        now = self.node.runtime.transport.traffic().bytes_sent if self.node is not None else 0
        return self.bytes_sent_before + now


LearnerFactory = Callable[[Machine], Learner]
RecordLearnerFactory = Callable[[Machine], RecordLearner]
Eligible = Callable[[PeerId, PeerId], bool]
"""Whether the first may mix with the second."""


class Observer(Protocol):
    """Told of every process: ``netsim.checkers`` look, ``netsim.metrics`` counts."""

    def started(self, machine: Machine) -> None:
        """A node was built on ``machine`` and has not run yet."""

    def stopped(self, machine: Machine, how: str) -> None:
        """Its process is gone (killed, power-cut, left or failed); ``machine.node`` is still the old one."""


class World:
    """Machines on one network, all for one run."""

    def __init__(
        self,
        network: SimNetwork,
        nursery: trio.Nursery,
        *,
        spec: RunSpec,
        seed: int,
        learners: LearnerFactory | RecordLearnerFactory,
        signer: Callable[[int, int], Signer] = lambda seed, number: StubSigner(
            machine_peer(seed, number), world_key(seed)
        ),
        eligible: Eligible | None = None,
        failed: Callable[[Machine, BaseException], None] | None = None,
    ) -> None:
        """``signer(seed, machine)`` names a machine; ``failed`` hears of exceptions that ended a node, which are raised
        without it."""
        self.network = network
        self.spec = spec
        self.seed = seed
        self.machines: list[Machine] = []
        self.observers: list[Observer] = []
        self.core: tuple[int, ...] = ()
        """Machines that must agree in the end; set for the liveness phase."""
        self.calm_since_s: float | None = 0.0
        """Since when nothing has been going wrong; None while something does."""
        self._nursery = nursery
        self._learners = learners
        self._signer = signer
        self._eligible = eligible
        self._failed = failed

    def add_machine(
        self, *, disk: SimDisk | None = None, compute: SimCompute | None = None, costs: Costs | None = None
    ) -> Machine:
        """One more machine, off."""
        number = len(self.machines)
        machine = Machine(
            number=number,
            identity=self._signer(self.seed, number),
            disk=disk or SimDisk(),
            compute=compute or SimCompute(),
            costs=costs or Costs(),
        )
        machine.ended.set()
        self.machines.append(machine)
        return machine

    def up(self) -> list[Machine]:
        """The machines whose process runs."""
        return [machine for machine in self.machines if machine.node is not None]

    # --- processes --------------------------------------------------------------------------------------------

    def switch_on(self, number: int, *, bootstrap: Sequence[int] | None = None) -> trio.Event:
        """Have a process run on one machine; ``bootstrap`` names the machines it is told of, now and later.

        Returns the event of its node being there.
        """
        machine = self.machines[number]
        assert not machine.wanted, f"machine {number} is on already"
        machine.wanted = True
        if bootstrap is not None:
            machine.bootstrap = tuple(bootstrap[:BOOTSTRAP_ADDRESSES])
        machine.started = trio.Event()
        if not machine.kept:
            machine.kept = True
            self._nursery.start_soon(self._keep_running, machine, name=task_name(number))
        return machine.started

    async def start(self, number: int, *, bootstrap: int | None = None) -> Node:
        """Start the process of one machine and return its node; ``bootstrap`` is the machine it is told of."""
        await self.switch_on(number, bootstrap=None if bootstrap is None else (bootstrap,)).wait()
        node = self.machines[number].node
        assert node is not None
        return node

    async def start_all(self) -> list[Node]:
        """Start every machine, the first one being everybody's bootstrap."""
        return [
            await self.start(machine.number, bootstrap=0 if machine.number else None)
            for machine in self.machines
        ]

    def kill(self, number: int) -> None:
        """``kill -9``: the process is gone between two instants; its disk stays as it is. Nothing where none runs."""
        machine = self.machines[number]
        if machine.peer in self.network.hosts:
            self.network.crash(machine.peer)
        self._end(machine, "killed")

    def power_cut(self, number: int) -> None:
        """The machine goes dark: peers notice by its silence, and its disk keeps what was synced."""
        machine = self.machines[number]
        if machine.peer in self.network.hosts:
            self.network.vanish(machine.peer)
        machine.disk.power_cut()
        self._end(machine, "power-cut")

    def interrupt(self, number: int) -> None:
        """Cancel the process as a second Ctrl-C would: connections are closed properly, nothing is written."""
        self._end(self.machines[number], "interrupted")

    async def leave(self, number: int) -> None:
        """Stop the process as a person would; returns once it is gone."""
        self.stop(number)
        await self.machines[number].ended.wait()

    def stop(self, number: int) -> None:
        """The same without waiting for it."""
        machine = self.machines[number]
        machine.wanted = False
        if machine.node is not None:
            machine.node.stop()
        elif machine.process is not None:
            machine.process.cancel()  # Before its node is there nothing listens.

    def _end(self, machine: Machine, how: str) -> None:
        machine.wanted = False
        if machine.process is not None:
            machine.process.cancel()
        self._gone(machine, how)

    def _gone(self, machine: Machine, how: str) -> None:
        """Once for each process: what it leaves behind is looked at before it is let go."""
        if machine.node is None:
            return
        machine.bytes_sent_before = machine.bytes_sent
        for observer in self.observers:
            observer.stopped(machine, how)
        machine.node = None

    async def _keep_running(self, machine: Machine) -> None:
        """Run the process, and again if it could not even begin: a full disk may have kept it from starting."""
        while machine.wanted:
            machine.ended = trio.Event()
            with trio.CancelScope() as machine.process:
                try:
                    state = await begin_life(machine.disk, wall_time_s=trio.current_time())
                except OSError:
                    pass
                else:
                    await self._live(machine, state)
                if machine.wanted:
                    await trio.sleep(RESTART_S)
            machine.process = None
            machine.ended.set()
        machine.kept = False

    async def _live(self, machine: Machine, state: NodeState) -> None:
        try:
            await self._run(machine, state)
        except Exception as error:
            if self._failed is None:
                raise
            self._failed(machine, error)
            self._gone(machine, "failed")
        else:
            self._gone(machine, "left")

    async def _run(self, machine: Machine, state: NodeState) -> None:
        peers = [self.machines[number].peer for number in machine.bootstrap]
        async with self.network.open_host(machine.peer) as transport:
            runtime = Runtime(
                transport=transport,
                disk=machine.disk,
                compute=machine.compute,
                signer=machine.identity,
                rng=random.Random(f"{self.seed}/{machine.number}/{len(machine.starts_s)}"),
                wall_time_s=trio.current_time,
                costs=machine.costs,
            )
            machine.starts_s.append(trio.current_time())
            options = NodeOptions(
                agent="netsim",
                bootstrap=[f"{address_of(peer)}/p2p/{peer}" for peer in peers],
                store_bytes_max=machine.disk.capacity_bytes // 2,
                limits=self.network.limits,
                allowed=frozenset(self.network.allowed.get(machine.peer, ())),
                swarm_key=self.network.swarm_keys.get(machine.peer),
            )
            machine.node = self._build(machine, runtime, options, state)
            if machine.spoil is not None:
                machine.spoil(machine.node)
            for observer in self.observers:
                observer.started(machine)
            machine.started.set()
            await machine.node.run()

    def _build(self, machine: Machine, runtime: Runtime, options: NodeOptions, state: NodeState) -> Node:
        learner = self._learners(machine)
        if isinstance(self.spec.one_byte, OneByteSpec):
            return OneByteNode(
                runtime, options, spec=self.spec, state=state, learner=cast(RecordLearner, learner)
            )
        eligible = self._eligible
        return GossipNode(
            runtime,
            options,
            spec=self.spec,
            state=state,
            trainer=cast(Learner, learner),
            eligible=(lambda peer: eligible(machine.peer, peer)) if eligible else None,
        )


def task_name(machine: int) -> str:
    """What trio calls the task under which all processes of a machine run."""
    return f"machine {machine}"


def text_learners(spec: RunSpec, corpus: Corpus, *, machines: int) -> LearnerFactory:
    """The daemon's own trainer, each machine on its part of ``corpus``; newcomers share the parts."""

    def build(machine: Machine) -> Learner:
        return Trainer(
            spec,
            corpus,
            run=run_id(spec),
            peer=machine.peer,
            part=(machine.number % machines + 1, machines),
            device="cpu",
            threads=1,
        )

    return build


def ed25519_signer(seed: int, number: int) -> Identity:
    """A real key, for scenarios in which forging is the question."""
    return Identity(Ed25519PrivateKey.from_private_bytes(blake3(f"netsim/{seed}/{number}".encode()).digest()))


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
    """A world of equal machines with real keys and trainers, all off. Leaving the block kills what still runs."""
    async with (
        open_sim_network(random.Random(seed), link=link, limits=limits) as network,
        trio.open_nursery() as nursery,
    ):
        world = World(
            network,
            nursery,
            spec=spec,
            seed=seed,
            learners=text_learners(spec, corpus, machines=machines),
            signer=ed25519_signer,
        )
        for _ in range(machines):
            world.add_machine()
        yield world
        nursery.cancel_scope.cancel()
