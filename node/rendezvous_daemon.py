"""The real world around a rendezvous: what ``gossamer run --bootstrap-only`` calls.

Owns its composition, and what a person may ask of it. Never imports torch, so that the smallest machine will do.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog
import trio

from node.answers import describe_member, make_advert, make_invite, show_spec, tell_adverts
from node.config import NodeConfig
from node.control import (
    METHODS,
    GetAdverts,
    GetSpec,
    GetStatus,
    Handler,
    HandOver,
    MakeAdvert,
    MakeInvite,
    Params,
    Stop,
    serve_control,
)
from node.home import Home
from node.rendezvous import Rendezvous
from node.runtime import ContactOptions
from node.service_manager import ServiceManager
from node.status import NodeStatus
from node.surroundings import (
    AGENT,
    follow_lan,
    keep_budget,
    obey_signals,
    open_surroundings,
    serve_status,
    wall_time_s,
)
from node.version import VERSION
from p2p.errors import GossamerError
from training.run_spec import RunSpec

log = structlog.get_logger()


def run_rendezvous(
    home: Home,
    config: NodeConfig,
    *,
    spec: RunSpec | None = None,
    run: bytes | None = None,
    bootstrap: Sequence[str] = (),
) -> bool:
    """Run a rendezvous until it is told to stop. The run is named as for ``node.daemon.run_node``.

    Returns whether it handed over to a process that is to go on in this home. Raises GossamerError for whatever the
    user can mend.
    """
    return trio.run(
        partial(_live, home, config, spec=spec, run=run, bootstrap=tuple(bootstrap)),
        strict_exception_groups=True,
    )


async def _live(
    home: Home, config: NodeConfig, *, spec: RunSpec | None, run: bytes | None, bootstrap: Sequence[str]
) -> bool:
    async with open_surroundings(home, config, spec=spec, run=run, bootstrap=bootstrap) as around:
        rendezvous = Rendezvous(
            transport=around.transport,
            disk=around.disk,
            signer=around.identity,
            rng=random.Random(),
            options=ContactOptions(
                agent=AGENT,
                bootstrap=around.bootstrap,
                limits=around.limits,
                allowed=around.allowed,
                swarm_key=around.swarm_key,
                dht=config.dht and around.swarm_key is None,
                advertise=config.advertise,
            ),
            spec=around.spec,
            wall_time_s=wall_time_s,
        )
        keeper = await keep_budget(rendezvous, around)
        async with trio.open_nursery() as nursery:
            commands = RendezvousCommands(rendezvous, name=config.name, stop_now=nursery.cancel_scope.cancel)
            nursery.start_soon(obey_signals, rendezvous.stop, nursery.cancel_scope)
            await nursery.start(serve_control, home.control_socket, commands.handlers())
            if around.metrics is not None:
                nursery.start_soon(serve_status, around.metrics, commands.snapshot)
            if around.found is not None:
                nursery.start_soon(follow_lan, around.found, rendezvous.links)
            if around.port_mapping is not None:
                around.port_mapping.on_change(rendezvous.reachability.mapped_at)
            await nursery.start(keeper.run)
            log.info(
                "rendezvous up",
                peer=rendezvous.local,
                run=around.spec.name,
                addresses=around.transport.local.addresses,
            )
            manager = ServiceManager(os.environ, pid=os.getpid())
            nursery.start_soon(manager.keep_told, lambda: rendezvous.links.problem or "rendezvous")
            await rendezvous.run()
            nursery.cancel_scope.cancel()
        await keeper.finish()
        log.info("rendezvous down")
        return commands.handed_over


class RendezvousCommands:
    """The handlers of one rendezvous. ``name`` is what people call it; ``stop_now`` ends it at once."""

    def __init__(self, rendezvous: Rendezvous, *, name: str, stop_now: Callable[[], None]) -> None:
        self._rendezvous = rendezvous
        self._name = name
        self._stop_now = stop_now
        self.handed_over = False
        """Whether somebody asked for it to be stopped so that another process goes on."""

    def handlers(self) -> dict[str, Handler]:
        """By method name, for ``serve_control``; what needs a model is declined."""
        return {
            **dict.fromkeys(METHODS, self.decline),
            "status": self.status,
            "stop": self.stop,
            "hand_over": self.hand_over,
            "invite": self.invite,
            "advert": self.advert,
            "adverts": self.adverts,
            "spec": self.spec,
        }

    async def decline(self, _: Params) -> None:
        """Raises GossamerError."""
        raise GossamerError(
            "this is a rendezvous: it holds no model",
            why="gossamer run --bootstrap-only introduces the members of a run to each other, and no more",
            fix="ask a node that trains; which there are: gossamer peers",
        )

    async def status(self, _: GetStatus) -> NodeStatus:
        """One snapshot."""
        return self.snapshot()

    def snapshot(self) -> NodeStatus:
        """The same, for who asks from inside. Everything about a model is nothing."""
        rendezvous, now_s = self._rendezvous, trio.current_time()
        transport = rendezvous.transport
        traffic = transport.traffic()
        return NodeStatus(
            peer=rendezvous.local,
            name=self._name,
            version=VERSION,
            pid=os.getpid(),
            uptime_s=now_s - rendezvous.began_s,
            addresses=[f"{address}/p2p/{rendezvous.local}" for address in transport.local.addresses],
            reach=rendezvous.reachability.reach,
            relays=[*rendezvous.reachability.relays],
            mapped=[*rendezvous.reachability.mapped],
            run_id=rendezvous.run_id.hex(),
            run_name=rendezvous.spec.name,
            private=rendezvous.swarm_key is not None,
            phase="rendezvous",
            problem=rendezvous.links.problem,
            device="",
            parameters=0,
            step=0,
            steps_total=rendezvous.spec.train.steps,
            loss=None,
            tokens_per_s=0.0,
            tokens=0,
            mixes=0,
            mixes_failed=0,
            mixes_one_sided=0,
            last_mix=None,
            last_merge=None,
            merges=0,
            bytes_sent=traffic.bytes_sent,
            bytes_received=traffic.bytes_received,
            bytes_sent_today=rendezvous.bytes_sent_today,
            bytes_received_today=rendezvous.bytes_received_today,
            peers=[describe_member(rendezvous, member) for member in rendezvous.members.members(now_s)],
            refusals=rendezvous.refusals(),
            checkpoint_step=0,
            disk_bytes=0,
        )

    async def stop(self, request: Stop) -> dict[str, Any]:
        """Begin to stop; the answer comes before the end."""
        if request.now:
            self._stop_now()
        else:
            self._rendezvous.stop()
        return {}

    async def hand_over(self, _: HandOver) -> dict[str, Any]:
        """Stop, for another process to go on; every moment is good."""
        self.handed_over = True
        self._rendezvous.stop()
        return {"settled": True}

    async def invite(self, request: MakeInvite) -> dict[str, Any]:
        """One line that lets others join."""
        return make_invite(self._rendezvous, request, wall_time_s)

    async def advert(self, request: MakeAdvert) -> dict[str, Any]:
        """A signed line for a list of swarms."""
        return make_advert(self._rendezvous, request, wall_time_s)

    async def adverts(self, _: GetAdverts) -> dict[str, Any]:
        """Which swarms it knows of."""
        return tell_adverts(self._rendezvous)

    async def spec(self, _: GetSpec) -> dict[str, Any]:
        """The run spec."""
        return show_spec(self._rendezvous)
