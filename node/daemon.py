"""The real world around a node: what ``gossamer run`` calls.

Owns the composition for life on a machine; netsim composes the same node from simulated parts. What every daemon needs
is had in ``node.surroundings``; then comes the learner, and with it the node's life.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog
import trio

from gossip.store import ShardStore
from node.base import BaseSource, files_ref, weights_ref
from node.commands import Commands
from node.compute import ThreadCompute
from node.config import NodeConfig, format_bytes
from node.control import serve_control
from node.costs import Costs
from node.gossip_node import GossipNode
from node.home import Home
from node.life import begin_life
from node.node import Node
from node.one_byte_node import OneByteNode
from node.runtime import NodeOptions, Runtime
from node.service_manager import ServiceManager
from node.surroundings import (
    AGENT,
    Surroundings,
    follow_lan,
    keep_budget,
    obey_signals,
    open_surroundings,
    serve_status,
    wall_time_s,
)
from training.base_weights import shapes_of
from training.one_byte import OneByteLearner, build_one_byte_task
from training.run_spec import RunSpec, run_id
from training.spec_sections import OneByteSpec
from training.tasks import Task, load_data
from training.trainer import Trainer

T = TypeVar("T")

log = structlog.get_logger()

PROGRESS_EVERY_S = 30.0
ARRIVAL_EVERY_S = 3.0


def run_node(
    home: Home,
    config: NodeConfig,
    *,
    spec: RunSpec | None = None,
    run: bytes | None = None,
    bootstrap: Sequence[str] = (),
    linger: bool = True,
) -> bool:
    """Run a node until it is told to stop; with ``linger`` False also until its run is finished.

    The run is given by its ``spec``, or by its id ``run``, whose spec is then taken from disk or from the ``bootstrap``
    peers (multiaddrs that end in ``/p2p/<peer id>``). Returns whether the node handed over to a process that is to go
    on in this home. Raises GossamerError for whatever the user can mend.
    """
    return trio.run(
        partial(_live, home, config, spec=spec, run=run, bootstrap=tuple(bootstrap), linger=linger),
        strict_exception_groups=True,
    )


async def _live(
    home: Home,
    config: NodeConfig,
    *,
    spec: RunSpec | None,
    run: bytes | None,
    bootstrap: Sequence[str],
    linger: bool,
) -> bool:
    async with open_surroundings(home, config, spec=spec, run=run, bootstrap=bootstrap) as around:
        state = await begin_life(around.disk, wall_time_s=wall_time_s())
        learner = await _build_learner(around)
        runtime = Runtime(
            transport=around.transport,
            disk=around.disk,
            compute=ThreadCompute(),
            signer=around.identity,
            rng=random.Random(),
            wall_time_s=wall_time_s,
            costs=Costs(),
        )
        options = NodeOptions(
            agent=AGENT,
            bootstrap=around.bootstrap,
            store_bytes_max=config.disk_bytes_max,
            upload_bytes_per_s_max=config.upload_bytes_per_s_max,
            download_bytes_per_s_max=config.download_bytes_per_s_max,
            limits=around.limits,
            allowed=around.allowed,
            swarm_key=around.swarm_key,
            dht=config.dht and around.swarm_key is None,
            advertise=config.advertise,
        )
        node: Node
        if isinstance(learner, OneByteLearner):
            node = OneByteNode(runtime, options, spec=around.spec, state=state, learner=learner)
        else:
            node = GossipNode(runtime, options, spec=around.spec, state=state, trainer=learner)
        # What is there by now stays. A search for garbage that looks through all of torch takes 130 ms, otherwise one.
        gc.collect()
        gc.freeze()
        return await _run_with_controls(node, around, task=learner.task, linger=linger)


async def _run_with_controls(node: Node, around: Surroundings, *, task: Task, linger: bool) -> bool:
    keeper = await keep_budget(node, around)
    async with trio.open_nursery() as nursery:
        commands = Commands(node, task=task, name=around.config.name, stop_now=nursery.cancel_scope.cancel)
        nursery.start_soon(obey_signals, node.stop, nursery.cancel_scope)
        await nursery.start(serve_control, around.home.control_socket, commands.handlers())
        if around.metrics is not None:
            nursery.start_soon(serve_status, around.metrics, commands.snapshot)
        if not linger:
            nursery.start_soon(_stop_when_finished, node)
        if around.found is not None:
            nursery.start_soon(follow_lan, around.found, node.links)
        if around.port_mapping is not None:
            around.port_mapping.on_change(node.reachability.mapped_at)
        await nursery.start(keeper.run)
        log.info(
            "node up", peer=node.local, run=node.spec.name, addresses=node.runtime.transport.local.addresses
        )
        nursery.start_soon(_log_progress, node)
        if isinstance(node, GossipNode):
            nursery.start_soon(_log_arrivals, node)
        nursery.start_soon(ServiceManager(os.environ, pid=os.getpid()).keep_told, partial(_in_words, node))
        await node.run()
        nursery.cancel_scope.cancel()
    await keeper.finish()
    log.info("node down", step=node.step, checkpoint=node.checkpoints.step)
    return commands.handed_over


async def _build_learner(around: Surroundings) -> Trainer | OneByteLearner:
    spec, config = around.spec, around.config

    def build(make: Callable[..., T]) -> T:
        return make(
            spec,
            load_data(spec, config.data_path),
            run=run_id(spec),
            peer=around.identity.peer,
            part=config.part,
            device=config.device,
            threads=config.threads or None,
        )

    if not isinstance(spec.one_byte, OneByteSpec):
        return await trio.to_thread.run_sync(partial(build, Trainer))
    store = ShardStore(around.disk, quota_bytes=config.disk_bytes_max)
    await store.load()
    source = BaseSource(
        path=config.base_path,
        store=store,
        transport=around.transport,
        bootstrap=around.bootstrap,
        limits=around.limits,
    )
    files, ref = files_ref(spec), weights_ref(spec)
    pretrained = None if files is None else await source.pretrained(files)
    make_task = partial(build_one_byte_task, pretrained=pretrained)
    task = await trio.to_thread.run_sync(partial(build, make_task))
    if ref is None:
        base = {name: parameter.detach().cpu().clone() for name, parameter in task.model.named_parameters()}
    else:
        base = await source.weights(ref, shapes_of(task.model), pretrained)
    return await trio.to_thread.run_sync(partial(OneByteLearner, spec, task, run=run_id(spec), base=base))


async def _log_progress(node: Node) -> None:
    """A line now and then; each single mix is told at debug level."""
    while True:
        await trio.sleep(PROGRESS_EVERY_S)
        if node.phase == "training":
            log.info(
                "training",
                step=node.step,
                of=node.spec.train.steps,
                loss=node.loss and round(node.loss, 4),
                tokens_per_s=round(node.tokens_per_s),
                **node.facts(),
                peers=len(node.members.alive(trio.current_time())),
            )


async def _log_arrivals(node: GossipNode) -> None:
    """A line now and then while the weights of a merge take their time to come."""
    waited = False
    while True:
        await trio.sleep(ARRIVAL_EVERY_S)
        arrival = node.merges.arrival
        if arrival is not None and waited:
            log.info(
                "fetching the merged weights",
                received=format_bytes(arrival.received),
                of=format_bytes(arrival.total),
                holders=len(arrival.holders),
            )
        waited = arrival is not None


def _in_words(node: Node) -> str:
    """What ``systemctl status`` shows."""
    return node.current_problem() or f"{node.phase}, step {node.step} of {node.spec.train.steps}"


async def _stop_when_finished(node: Node) -> None:
    await node.wait_finished()
    node.stop()
