"""The real world around a node: home, lock, key, sockets, signals. What ``gossamer run`` calls.

Owns the composition for life on a machine; netsim composes the same node from simulated parts. The order matters: lock
the home, load the key, open the transport and the metrics' socket (which claims the ports), learn the spec (from peers
when only its hash is known), build the trainer, then live.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog
import trio

from gossip.address_book import check_address, parse_peer_address
from gossip.links import fetch_spec
from gossip.store import ShardStore
from node.base import BaseSource, files_ref, weights_ref
from node.commands import Commands
from node.compute import ThreadCompute
from node.config import NodeConfig
from node.control import serve_control
from node.costs import Costs
from node.describe import VERSION
from node.disk import LocalDisk
from node.gossip_node import GossipNode
from node.home import Home
from node.life import begin_life
from node.metrics import MetricsPage
from node.metrics_server import listen_for_metrics, serve_metrics
from node.node import Node
from node.one_byte_node import OneByteNode
from node.runtime import NodeOptions, Runtime
from p2p.errors import GossamerError, PeerUnreachable
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.transport import PeerRecord, Transport
from training.base_weights import shapes_of
from training.one_byte import OneByteLearner, build_one_byte_task
from training.run_spec import RunSpec, canonical_bytes, check_startable, run_id, spec_from_bytes
from training.spec_sections import OneByteSpec
from training.tasks import Task, load_data
from training.trainer import Trainer

T = TypeVar("T")

log = structlog.get_logger()

SPEC_FILE = "spec.cbor"
AGENT = f"gossamer/{VERSION}"
PROGRESS_EVERY_S = 30.0


def run_node(
    home: Home,
    config: NodeConfig,
    *,
    spec: RunSpec | None = None,
    run: bytes | None = None,
    bootstrap: Sequence[str] = (),
    linger: bool = True,
) -> None:
    """Run a node until it is told to stop; with ``linger`` False also until its run is finished.

    The run is given by its ``spec``, or by its id ``run``, whose spec is then taken from disk or from the ``bootstrap``
    peers (multiaddrs that end in ``/p2p/<peer id>``). Raises GossamerError for whatever the user can mend.
    """
    trio.run(
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
) -> None:
    limits = Limits()
    with home.lock():
        identity = Identity.load(home.identity_file)
        for address in config.announce:
            check_address(address, chars_max=limits.address_chars_max)
        async with contextlib.AsyncExitStack() as sockets:
            transport = await sockets.enter_async_context(
                open_libp2p(identity, listen=config.listen, announce=config.announce, limits=limits)
            )
            metrics = None
            if config.metrics_listen is not None:
                metrics = await sockets.enter_async_context(await listen_for_metrics(config.metrics_listen))
            spec = spec or await _learn_spec(home, transport, run, bootstrap, limits)
            check_startable(spec)
            disk = LocalDisk(home.run_folder(run_id(spec)))
            await disk.write_atomic(SPEC_FILE, canonical_bytes(spec))
            home.remember_run(run_id(spec))
            state = await begin_life(disk, wall_time_s=_wall_time_s())
            learner = await _build_learner(spec, config, transport, disk, bootstrap, limits)
            runtime = Runtime(
                transport=transport,
                disk=disk,
                compute=ThreadCompute(),
                signer=identity,
                rng=random.Random(),
                wall_time_s=_wall_time_s,
                costs=Costs(),
            )
            options = NodeOptions(
                agent=AGENT,
                bootstrap=bootstrap,
                store_bytes_max=config.disk_bytes_max,
                upload_bytes_per_s_max=config.upload_bytes_per_s_max,
                download_bytes_per_s_max=config.download_bytes_per_s_max,
                limits=limits,
            )
            node: Node
            if isinstance(learner, OneByteLearner):
                node = OneByteNode(runtime, options, spec=spec, state=state, learner=learner)
            else:
                node = GossipNode(runtime, options, spec=spec, state=state, trainer=learner)
            await _run_with_controls(
                node, home, task=learner.task, name=config.name, linger=linger, metrics=metrics
            )


async def _run_with_controls(
    node: Node, home: Home, *, task: Task, name: str, linger: bool, metrics: trio.SocketListener | None
) -> None:
    async with trio.open_nursery() as nursery:
        commands = Commands(node, task=task, name=name, stop_now=nursery.cancel_scope.cancel)
        nursery.start_soon(_obey_signals, node, nursery.cancel_scope)
        await nursery.start(serve_control, home.control_socket, commands.handlers())
        if metrics is not None:
            log.info("metrics served", address=metrics.socket.getsockname()[:2])
            page = MetricsPage(commands.snapshot)
            nursery.start_soon(page.watch_lag)
            nursery.start_soon(serve_metrics, metrics, page.text)
        if not linger:
            nursery.start_soon(_stop_when_finished, node)
        log.info(
            "node up", peer=node.local, run=node.spec.name, addresses=node.runtime.transport.local.addresses
        )
        nursery.start_soon(_log_progress, node)
        await node.run()
        nursery.cancel_scope.cancel()
    log.info("node down", step=node.step, checkpoint=node.checkpoints.step)


async def _learn_spec(
    home: Home, transport: Transport, run: bytes | None, bootstrap: Sequence[str], limits: Limits
) -> RunSpec:
    run = run or home.remembered_run()
    if run is None:
        raise GossamerError(
            "no run to take part in",
            why="this home has not joined one yet",
            fix="join one: gossamer join 'INVITE'    or start one: gossamer run --run SPEC.toml",
        )
    stored = home.run_folder(run) / SPEC_FILE
    if stored.exists():
        spec = spec_from_bytes(await trio.Path(stored).read_bytes())
        if run_id(spec) == run:
            return spec
    return spec_from_bytes(await _fetch_spec(transport, bootstrap, run, limits))


async def _fetch_spec(transport: Transport, bootstrap: Sequence[str], run: bytes, limits: Limits) -> bytes:
    """The spec named ``run`` from the first of ``bootstrap`` that answers; they are all asked at once."""
    found: list[bytes] = []
    failures: list[str] = []

    async def ask(text: str) -> None:
        peer, address = parse_peer_address(text, chars_max=limits.address_chars_max)
        try:
            await transport.connect(PeerRecord(peer, (address,)))
            found.append(await fetch_spec(transport, peer, run, timeout_s=limits.call_timeout_s))
            nursery.cancel_scope.cancel()
        except GossamerError as error:
            failures.append(f"{text}: {error.what}")

    async with trio.open_nursery() as nursery:
        for text in bootstrap:
            nursery.start_soon(ask, text)
    if not found:
        raise PeerUnreachable(
            "nobody could be reached who knows this run",
            why="; ".join(failures) or "no bootstrap address was given",
            fix="check the addresses and the firewall, or ask for a fresh invite",
        )
    return found[0]


async def _build_learner(
    spec: RunSpec,
    config: NodeConfig,
    transport: Transport,
    disk: LocalDisk,
    bootstrap: Sequence[str],
    limits: Limits,
) -> Trainer | OneByteLearner:
    def build(make: Callable[..., T]) -> T:
        return make(
            spec,
            load_data(spec, config.data_path),
            run=run_id(spec),
            peer=transport.local.peer,
            part=config.part,
            device=config.device,
            threads=config.threads or None,
        )

    if not isinstance(spec.one_byte, OneByteSpec):
        return await trio.to_thread.run_sync(partial(build, Trainer))
    store = ShardStore(disk, quota_bytes=config.disk_bytes_max)
    await store.load()
    source = BaseSource(
        path=config.base_path, store=store, transport=transport, bootstrap=bootstrap, limits=limits
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


async def _obey_signals(node: Node, scope: trio.CancelScope) -> None:
    """First SIGINT or SIGTERM: stop cleanly. Second: stop now. SIGHUP is the log file's."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        asked = False
        async for _ in signals:
            if asked:
                scope.cancel()
            asked = True
            log.info("stopping: checkpoint, goodbye; once more to stop at once")
            node.stop()


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


async def _stop_when_finished(node: Node) -> None:
    await node.wait_finished()
    node.stop()


def _wall_time_s() -> float:
    return time.time()  # noqa: TID251 - the one place that reads the wall clock
