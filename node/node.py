"""Node: one peer of one run, in whatever mode it learns. Opens the root nursery; everything happens inside it.

Owns what every mode needs: being a member, the parts that serve others, and the order of starting and stopping; the
parts that find and hear others are ``node.contact``'s. Contains no protocol and no mathematics. The modes are
``node.gossip_node`` and ``node.one_byte_node``.

Promises: training is never stopped by the network; weights are written only in the ``train`` lane; a request to
stop ends with a checkpoint and a goodbye within ``STOP_TIMEOUT_S``.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal

import structlog
import trio
from torch import Tensor

from gossip.members import HEARTBEAT_S_MIN, heartbeat_interval_s
from gossip.messages import Heartbeat
from gossip.progress import Progress
from gossip.shard_transfer import ShardFetcher, ShardServer
from gossip.store import ShardStore
from node.checkpoints import Checkpoints
from node.contact import Contact
from node.life import NodeState
from node.runtime import NodeOptions, Runtime
from p2p.pacer import Pacer
from p2p.transport import PeerId
from training.run_spec import RunSpec

log = structlog.get_logger()

HEARTBEAT_GROWTH = 4.0
"""The first heartbeats come fast and ever less so, whatever the size of the swarm: the second one that is heard proves
that we are there, near by at once, and where news takes longer by a later one."""
STOP_TIMEOUT_S = 8.0
GOODBYE_S = 1.0
SMOOTHING_STEPS = 20
"""Advertised loss and speed are exponential means over about this many steps."""
LOSS_TOLD_MAX = 1e9
"""What a heartbeat can carry; a peer that sent more would be taken for hostile."""


Which = Literal["live", "anchor"]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A model's fp32 tensors by name, copied, and a hash by which people tell whether two nodes hold the same."""

    tensors: dict[str, Tensor]
    hash: bytes


class Node(Contact, abc.ABC):
    """What both modes have in common. Built by ``node.daemon`` in life and by netsim's world in simulations."""

    def __init__(
        self,
        runtime: Runtime,
        options: NodeOptions,
        *,
        spec: RunSpec,
        state: NodeState,
    ) -> None:
        transport, disk, rng = runtime.transport, runtime.disk, runtime.rng
        super().__init__(
            transport=transport,
            disk=disk,
            signer=runtime.signer,
            rng=rng,
            options=options,
            spec=spec,
            incarnation=state.incarnation,
            wall_time_s=runtime.wall_time_s,
        )
        self.runtime = runtime
        self._agent = options.agent
        self._stopping = trio.Event()
        self._progress = Progress()
        self.checkpoints = Checkpoints(disk)
        self._pull_pacer = _pacer(options.download_bytes_per_s_max)
        self.store = ShardStore(disk, quota_bytes=options.store_bytes_max)
        self.shard_server = ShardServer(
            transport=transport,
            store=self.store,
            ledger=self.ledger,
            pacer=_pacer(options.upload_bytes_per_s_max),
        )
        self.fetcher = ShardFetcher(
            transport=transport, ledger=self.ledger, limits=self.limits, rng=rng, reach=self.links.reach
        )

        self.phase = "starting"
        self.loss: float | None = None
        self.tokens_per_s = 0.0
        self.steps_per_s = 0.0
        self._problem = ""

    # --- what a mode says, does and remembers -------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Steps taken since the run began."""

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """What they learned from."""

    @abc.abstractmethod
    def facts(self) -> dict[str, int]:
        """Counters worth a line of the log."""

    @abc.abstractmethod
    async def weights(self, which: Which) -> Weights:
        """The model as it is now (``live``), or as the last merge left it (``anchor``). Raises GossamerError."""

    @abc.abstractmethod
    async def wait_finished(self) -> None:
        """Return once everything that the spec asks for is done and remembered."""

    @abc.abstractmethod
    def current_problem(self) -> str:
        """What stands in the way now, for people; empty when nothing does."""

    @abc.abstractmethod
    def _heartbeat(self) -> Heartbeat:
        """What to tell everybody about this node."""

    @abc.abstractmethod
    def _heard(self, author: PeerId, beat: Heartbeat) -> None:
        """A member's newest heartbeat has arrived."""

    @abc.abstractmethod
    async def _remember(self) -> None:
        """Take up what the disk holds of earlier lives. The parts that both modes have are loaded already."""

    @abc.abstractmethod
    def _begin(self, nursery: trio.Nursery) -> None:
        """Start the tasks of the mode."""

    @abc.abstractmethod
    async def wait_settled(self) -> None:
        """Return at a moment at which stopping costs nothing but time."""

    @abc.abstractmethod
    async def _make_durable(self) -> None:
        """Write what must outlast the process."""

    # --- starting and stopping --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the node to checkpoint, say goodbye and end; ``run`` then returns."""
        self._stopping.set()

    async def run(self) -> None:
        """Live until ``stop`` is called. Cancelling instead skips the checkpoint and the goodbye."""
        await self.store.load()
        await self.book.load()
        await self._remember()
        self._publish_heartbeat()
        self.shard_server.serve()
        self.reachability.on_change(self._publish_heartbeat)
        async with trio.open_nursery() as nursery:
            self._keep_contact(nursery)
            nursery.start_soon(self._beat)
            self._begin(nursery)
            await self._stopping.wait()
            self.phase = "stopping"
            with trio.move_on_after(STOP_TIMEOUT_S):
                await self._say_goodbye()
                await self._make_durable()
            nursery.cancel_scope.cancel()

    async def _say_goodbye(self) -> None:
        """A goodbye stands until a heartbeat that takes it back."""
        self._publish_heartbeat()
        with trio.move_on_after(GOODBYE_S):
            await self.anti_entropy.reconcile_with_all()

    def resume(self) -> None:
        """Come back, and take the goodbye back."""
        super().resume()
        self._publish_heartbeat()

    def _report_problem(self, text: str) -> None:
        self._problem = text
        log.warning("problem", text=text)

    # --- members ------------------------------------------------------------------------------------------------------

    @property
    def _leaving(self) -> bool:
        """Whether others are not to count on this node: it stops, or rests."""
        return self._stopping.is_set() or bool(self.ledger.resting)

    def _alive(self) -> list[PeerId]:
        return sorted({self.local, *self.members.alive(trio.current_time())})

    def _unheard_s(self, peer: PeerId) -> float:
        return self.members.unheard_s(peer, trio.current_time())

    def _heartbeat_of(self, peer: PeerId) -> Heartbeat | None:
        return self.notices.body_of(peer, "heartbeat", Heartbeat)

    def _publish_heartbeat(self) -> None:
        self.notices.publish("heartbeat", self._heartbeat())

    async def _beat(self) -> None:
        pause_s = HEARTBEAT_S_MIN
        while True:
            await trio.sleep(pause_s)
            self._publish_heartbeat()
            pause_s = min(HEARTBEAT_GROWTH * pause_s, heartbeat_interval_s(1 + len(self.members), self.pace))

    # --- how fast and how well it learns --------------------------------------------------------------------------

    def _took(self, steps: int, tokens: int, loss: float, elapsed_s: float) -> None:
        """Fold in what ``steps`` steps came to. Waiting for others in the lane is part of what a step takes, and so of
        the advertised speed."""
        keep = math.exp(-steps / SMOOTHING_STEPS)
        if math.isfinite(loss):
            # One that overflowed has left the weights as they were; in the mean it would stay for ever.
            self.loss = loss if self.loss is None else keep * self.loss + (1 - keep) * loss
        speed = steps / elapsed_s
        self.steps_per_s = speed if self.steps_per_s == 0.0 else keep * self.steps_per_s + (1 - keep) * speed
        self.tokens_per_s = self.steps_per_s * tokens / steps


def _pacer(bytes_per_s_max: int) -> Pacer | None:
    return Pacer(bytes_per_s_max) if bytes_per_s_max else None
