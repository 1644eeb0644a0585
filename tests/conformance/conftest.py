"""Two worlds for one suite: real hosts on loopback, and simulated ones in virtual time.

Every test takes ``world`` and runs twice. In the simulated half time is a MockClock that jumps, so waits cost
nothing; in the real half the clock is real and ``world.limits`` are short.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Collection
from typing import Any

import pytest
import trio
import trio.testing

from netsim.determinism import SimClock
from netsim.network import SimNetwork, open_sim_network
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, Transport

SHORT_LIMITS = Limits(
    dial_timeout_s=1.0,
    stream_timeout_s=1.0,
    peer_silence_s=2.0,
    call_timeout_s=0.5,
    streams_per_peer_max=8,
    receive_window_bytes=256 << 10,
)


class World:
    """Makes hosts that can reach each other; they live until the test ends."""

    def __init__(self, nursery: trio.Nursery, network: SimNetwork | None) -> None:
        self.limits = SHORT_LIMITS
        self.network = network
        self._nursery = nursery
        self._names = itertools.count()

    async def host(
        self,
        *,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        allowed: Collection[PeerId] = (),
    ) -> Transport:
        """A new host with an identity of its own unless one is given, until the test ends."""
        opened = self.open_host(identity or Identity.generate(), swarm_key, allowed)

        async def keep(task_status: Any) -> None:
            async with opened as transport:
                task_status.started(transport)
                await trio.sleep_forever()

        transport: Transport = await self._nursery.start(keep)
        return transport

    def open_host(
        self,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        allowed: Collection[PeerId] = (),
    ) -> contextlib.AbstractAsyncContextManager[Transport]:
        """A new host with an identity of its own unless one is given, for the length of a block."""
        if self.network is not None:
            peer = PeerId(f"peer-{next(self._names)}") if identity is None else identity.peer
            self.network.allowed[peer] = allowed
            if swarm_key is not None:
                self.network.swarm_keys[peer] = swarm_key
            return self.network.open_host(peer)
        return open_libp2p(
            identity or Identity.generate(),
            listen=["/ip4/127.0.0.1/tcp/0"],
            limits=self.limits,
            swarm_key=swarm_key,
            allowed=allowed,
        )

    def nobody(self) -> PeerRecord:
        """A record of a peer that is not there."""
        address = "/sim/nobody" if self.network is not None else "/ip4/127.0.0.1/tcp/1"
        return PeerRecord(Identity.generate().peer, (address,))


@pytest.fixture(params=["simulated", "libp2p"])
def world_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock(world_kind: str) -> trio.abc.Clock | None:
    """The world's time. Every test takes it, because pytest-trio looks for a clock in a test's own arguments."""
    return SimClock() if world_kind == "simulated" else None


@pytest.fixture
async def world(world_kind: str) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        network = None
        if world_kind == "simulated":
            network = await stack.enter_async_context(open_sim_network(random.Random(0), limits=SHORT_LIMITS))
        nursery = await stack.enter_async_context(open_service_nursery())
        yield World(nursery, network)


@pytest.fixture
async def pair(world: World) -> tuple[Transport, Transport]:
    """Two connected hosts; the first has dialled the second."""
    near, far = await world.host(), await world.host()
    await near.connect(far.local)
    return near, far
