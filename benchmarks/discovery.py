"""A swarm found by its run id alone: twenty real hosts on loopback, one address known, and three in ten killed.

The hosts are rendezvous of four runs. They publish no heartbeat, so peer exchange has nothing to pass on; all that
they were told is the first one's address. A newcomer knows that address and the id of one of the other runs. It has
found the swarm once it has the spec and is linked to a member that is up. For each try of the second kind other hosts
are killed, just before it, and started again after it.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from benchmarks.harness import Figure
from cli.node_process import free_ports
from node.config import NodeConfig
from node.disk import LocalDisk
from node.home import Home
from node.rendezvous import Rendezvous
from node.runtime import ContactOptions
from node.surroundings import open_surroundings, wall_time_s
from p2p.errors import GossamerError
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import DEFAULT_LIMITS
from p2p.service import open_service_nursery
from p2p.transport import Transport
from training.run_spec import RunSpec, parse_run_spec, run_id

HOSTS, RUNS, KILLED = 20, 4, 6
TRIES = 20
FOUND_S_MAX = 30.0
WARM_S = 150.0
"""From the start of the hosts to the first newcomer."""
REVIVED_S = 15.0
"""From the start of those that were killed to the next newcomer."""
BARS = {0: 20, KILLED: 18}
"""By hosts killed: tries of TRIES that must find the swarm in time."""


class Hosts:
    """The machines: keys, ports and disks, and a process on each that is up."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.runs = [
            parse_run_spec(f'name = "discovery-{number}"\n[train]\nsteps = 1\n') for number in range(RUNS)
        ]
        self._folder = folder
        self._nursery = nursery
        self._identities = [Identity.generate() for _ in range(HOSTS)]
        self._ports = free_ports(HOSTS)
        self._up: dict[int, trio.CancelScope] = {}

    @property
    def gate(self) -> str:
        """The one address that anybody is told."""
        return f"/ip4/127.0.0.1/tcp/{self._ports[0]}/p2p/{self._identities[0].peer}"

    def members_up(self, run: RunSpec) -> set[str]:
        """The peers of one run that can be found."""
        return {self._identities[number].peer for number in self._up if self.runs[number % RUNS] == run}

    def start(self, numbers: Sequence[int]) -> None:
        """Have processes on these."""
        for number in numbers:
            self._up[number] = trio.CancelScope()
            self._nursery.start_soon(self._live, number, self._up[number])

    def kill(self, numbers: Sequence[int]) -> None:
        """End those on these."""
        for number in numbers:
            self._up.pop(number).cancel()

    async def _live(self, number: int, scope: trio.CancelScope) -> None:
        identity, run = self._identities[number], self.runs[number % RUNS]
        with scope:
            async with open_libp2p(
                identity, listen=[f"/ip4/127.0.0.1/tcp/{self._ports[number]}"]
            ) as transport:
                disk = LocalDisk(self._folder / str(number))
                await rendezvous(transport, identity, disk, run, [self.gate] if number else []).run()


def rendezvous(
    transport: Transport, identity: Identity, disk: LocalDisk, run: RunSpec, bootstrap: Sequence[str]
) -> Rendezvous:
    """The smallest node there is."""
    return Rendezvous(
        transport=transport,
        disk=disk,
        signer=identity,
        rng=random.Random(),
        options=ContactOptions(agent="benchmark", bootstrap=bootstrap, limits=DEFAULT_LIMITS, dht=True),
        spec=run,
        wall_time_s=wall_time_s,
    )


async def found_in_s(hosts: Hosts, run: RunSpec) -> float:
    """How long a newcomer takes, from its key to its first link; FOUND_S_MAX if it does not find the run."""
    began_s = trio.current_time()
    with tempfile.TemporaryDirectory() as folder, trio.move_on_after(FOUND_S_MAX):
        home = Home.at(Path(folder))
        home.create()
        Identity.create(home.identity_file)
        config = NodeConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        try:
            async with (
                open_surroundings(home, config, spec=None, run=run_id(run), bootstrap=[hosts.gate]) as around,
                open_service_nursery() as nursery,
            ):
                node = rendezvous(
                    around.transport, around.identity, around.disk, around.spec, around.bootstrap
                )
                nursery.start_soon(node.run)
                members = hosts.members_up(run)
                async for event in node.links.peer_events():
                    if event.peer in members:
                        break
                took_s = trio.current_time() - began_s
                nursery.cancel_scope.cancel()
            return took_s
        except GossamerError as error:
            print(f"not found: {error.what} ({error.why})", file=sys.stderr)
    return FOUND_S_MAX


@asynccontextmanager
async def open_hosts() -> AsyncIterator[Hosts]:
    """All of them, up and warm."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_service_nursery() as nursery:
            hosts = Hosts(Path(folder), nursery)
            hosts.start(range(HOSTS))
            await trio.sleep(WARM_S)
            yield hosts
            nursery.cancel_scope.cancel()


async def measure() -> list[Figure]:
    """The share of newcomers that find their swarm in time, and how long they take."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    rng = random.Random(1)
    figures = []
    async with open_hosts() as hosts:
        for killed, bar in BARS.items():
            times_s = []
            for _ in range(TRIES):
                run = rng.choice(hosts.runs[1:])
                dead = rng.sample(range(1, HOSTS), killed)
                hosts.kill(dead)
                times_s.append(await found_in_s(hosts, run))
                print(f"{killed} killed, try {len(times_s)}: {times_s[-1]:.2f} s", file=sys.stderr)
                hosts.start(dead)
                await trio.sleep(REVIVED_S if dead else 0)
            in_time = sum(each < FOUND_S_MAX for each in times_s)
            what = f"{killed} of {HOSTS} hosts killed"
            figures += [
                Figure(f"swarm found by its id, {what}", f"of {TRIES}", (float(in_time),), at_least=bar),
                Figure(f"time to find it, {what}", "s", tuple(times_s), at_most=FOUND_S_MAX),
            ]
    return figures


if __name__ == "__main__":
    for figure in trio.run(measure):
        print(figure.line())
