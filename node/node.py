"""Node: the life of one peer in one run. Opens the root nursery; everything a node does happens inside it.

Owns the wiring: which part hears what from which other part, and the order of starting and stopping. Contains no
protocol and no mathematics. A reader who follows a shard goes ``node.exchange`` -> ``gossip.shard_transfer`` ->
``gossip.store``; who follows a merge goes ``gossip.merging`` -> ``node.merge_host`` -> ``node.merges``.

Promises: training is never stopped by the network; weights are written only in the ``train`` lane; a request to
stop ends with a checkpoint and a goodbye within ``STOP_TIMEOUT_S``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import structlog
import trio

from gossip.address_book import AddressBook
from gossip.anti_entropy import AntiEntropy
from gossip.ledger import PeerLedger
from gossip.links import Links
from gossip.members import HEARTBEAT_S_MIN, MemberTable, heartbeat_interval_s
from gossip.merging import Merger
from gossip.messages import Heartbeat, Message
from gossip.notices import NoticeTable
from gossip.progress import Progress
from gossip.shard_transfer import Pacer, ShardFetcher, ShardServer
from gossip.store import ShardStore
from node.checkpoints import Checkpointer, Checkpoints
from node.exchange import Exchanger
from node.life import NodeState
from node.merge_host import Adoption, NodeMergeHost, contribution_bytes
from node.merges import Merges
from node.rounds import AwaitFinalMerge, Exchange, Finished, MemberProgress, Rounds, Train
from node.runtime import Runtime
from node.snapshots import Snapshots
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.transport import PeerDown, PeerEvent, PeerId, PeerUp
from training.learner import Learner
from training.mixing import BEGINNER_TOKENS_SHARE
from training.run_spec import RunSpec, canonical_bytes, run_id

log = structlog.get_logger()

SLICE_S = 0.1
"""Inner steps run in slices of about this long, so that reads and writes of the weights wait no longer."""
HEARTBEAT_GROWTH = 4.0
"""The first heartbeats come fast and ever less so, whatever the size of the swarm: the second one that is heard proves
that we are there, near by at once, and where news takes longer by a later one."""
STOP_TIMEOUT_S = 8.0
GOODBYE_S = 1.0
SMOOTHING_STEPS = 20
"""The advertised loss is an exponential mean over about this many steps."""
LOSS_TOLD_MAX = 1e9
"""What a heartbeat can carry; a peer that sent more would be taken for hostile."""
EXCHANGE_TIMEOUT_S = 30.0


class Node:
    """One peer of one run. Built by ``node.daemon`` in life and by netsim's world in simulations."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        spec: RunSpec,
        trainer: Learner,
        state: NodeState,
        bootstrap: Sequence[str],
        agent: str,
        store_bytes_max: int,
        upload_bytes_per_s_max: int,
        download_bytes_per_s_max: int,
        limits: Limits,
        eligible: Callable[[PeerId], bool] | None = None,
    ) -> None:
        """``eligible``: whom of the members this node may mix with; None is everybody."""
        self.runtime = runtime
        self.spec = spec
        self.run_id = run_id(spec)
        self.trainer = trainer
        self.limits = limits
        self.local = runtime.signer.peer
        self._agent = agent
        self._eligible = eligible or (lambda peer: True)
        self._stopping = trio.Event()
        adoptions_in, adoptions_out = trio.open_memory_channel[Adoption](16)
        self._exchanges_in, self._exchanges_out = trio.open_memory_channel[Exchange](1)
        self._progress = Progress()

        transport, disk, rng = runtime.transport, runtime.disk, runtime.rng
        self.checkpoints = Checkpoints(disk)
        self.checkpointer = Checkpointer(
            self.checkpoints, trainer=trainer, compute=runtime.compute, costs=runtime.costs
        )
        self.ledger = PeerLedger()
        pull_pacer = Pacer(download_bytes_per_s_max) if download_bytes_per_s_max else None
        serve_pacer = Pacer(upload_bytes_per_s_max) if upload_bytes_per_s_max else None
        self.store = ShardStore(disk, quota_bytes=store_bytes_max)
        self.notices = NoticeTable(
            signer=runtime.signer, run=self.run_id, incarnation=state.incarnation, limits=limits
        )
        self.members = MemberTable(local=self.local)
        self.book = AddressBook(disk, local=self.local, limits=limits, rng=rng)
        self.links = Links(
            transport=transport,
            book=self.book,
            ledger=self.ledger,
            notices=self.notices,
            run=self.run_id,
            spec=canonical_bytes(spec),
            agent=agent,
            bootstrap=bootstrap,
            limits=limits,
            rng=rng,
        )
        self.anti_entropy = AntiEntropy(
            transport=transport, notices=self.notices, ledger=self.ledger, limits=limits, rng=rng
        )
        self.shard_server = ShardServer(
            transport=transport, store=self.store, ledger=self.ledger, pacer=serve_pacer
        )
        self.fetcher = ShardFetcher(
            transport=transport, ledger=self.ledger, limits=limits, rng=rng, reach=self.links.reach
        )
        self.merge_host = NodeMergeHost(
            local=self.local,
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            store=self.store,
            fetcher=self.fetcher,
            ledger=self.ledger,
            alive=self._alive,
            unheard_s=self._unheard_s,
            void_mixes=lambda: self.exchanger.void_mixes(),
            is_elder=self._is_elder,
            adopted=adoptions_in.send_nowait,
            tokens_at_anchor=state.tokens_at_anchor,
        )
        self.merger = Merger(
            transport=transport,
            signer=runtime.signer,
            run=self.run_id,
            disk=disk,
            host=self.merge_host,
            fragment_bytes=contribution_bytes(trainer.layout),
            replicas=spec.merge.replicas,
            merge_period_s=spec.merge.period_s,
            limits=limits,
            rng=rng,
            note=self.ledger.note,
            reach=self.links.reach,
        )
        self.snapshots = Snapshots(
            transport=transport,
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            store=self.store,
            ledger=self.ledger,
            limits=limits,
            spec=spec.exchange,
        )
        self.exchanger = Exchanger(
            spec=spec.exchange,
            transport=transport,
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            fetcher=self.fetcher,
            ledger=self.ledger,
            limits=limits,
            rng=rng,
            members=self.members.peers,
            may_mix_with=self._may_mix_with,
            is_elder=self._is_elder,
            fetch_timeout_s=EXCHANGE_TIMEOUT_S,
            pacer=pull_pacer,
        )
        self.rounds = Rounds(
            steps_total=spec.train.steps,
            every_steps=spec.exchange.every_steps,
            fragments=trainer.layout.fragments,
            merge_points=spec.merge.points,
            exchanging=spec.exchange.rule != "none",
        )
        self.merges = Merges(
            runtime=runtime,
            trainer=trainer,
            rounds=self.rounds,
            spec=spec.merge,
            merger=self.merger,
            host=self.merge_host,
            notices=self.notices,
            state=state,
            adoptions=adoptions_out,
            members=self._progress_of_alive,
            others_known=lambda: len(self.book) > 0,
            progress=self._progress,
            settled=self._merge_settled,
        )

        self.began_s = trio.current_time()
        self.phase = "starting"
        self.loss: float | None = None
        self.tokens_per_s = 0.0
        self.steps_per_s = 0.0
        self._problem = ""

    def stop(self) -> None:
        """Ask the node to checkpoint, say goodbye and end; ``run`` then returns."""
        self._stopping.set()

    async def wait_finished(self) -> None:
        """Return once all inner steps are taken and all scheduled merges are committed, measured and remembered."""
        while not isinstance(self.rounds.plan(), Finished):
            await self._progress.wait()

    def current_problem(self) -> str:
        """What stands in the way now, for people; empty when nothing does."""
        parts = (self.merger, self.links, self.merges, self.checkpointer)
        return next((part.problem for part in parts if part.problem), self._problem)

    def _report_problem(self, text: str) -> None:
        self._problem = text
        log.warning("problem", text=text)

    async def run(self) -> None:
        """Live until ``stop`` is called. Cancelling instead skips the checkpoint and the goodbye."""
        await self._wake_up()
        self.shard_server.serve()
        self.snapshots.serve()
        self.notices.on_change(self._heed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.links.run)
            nursery.start_soon(self.anti_entropy.run)
            nursery.start_soon(self.merger.run)
            nursery.start_soon(self._follow_connections, self.runtime.transport.peer_events())
            nursery.start_soon(self._beat)
            nursery.start_soon(self._train)
            nursery.start_soon(self._exchange)
            nursery.start_soon(self.merges.run)
            nursery.start_soon(self.checkpointer.run)
            await self._stopping.wait()
            self.phase = "stopping"
            with trio.move_on_after(STOP_TIMEOUT_S):
                await self._say_goodbye()
                await self.checkpointer.take()
            nursery.cancel_scope.cancel()

    # --- starting and stopping --------------------------------------------------------------------------------

    async def _wake_up(self) -> None:
        await self.store.load()
        await self.book.load()
        await self.merger.load()
        checkpoint = await self.checkpoints.load()
        if checkpoint is not None:
            await self.runtime.compute.run(
                partial(self.trainer.load, checkpoint.state), lane="train", cost_s=self.runtime.costs.copy_s
            )
            self.rounds.resume(self.trainer.step)
            log.info("resumed", step=self.trainer.step)
        if self.merger.head_record is not None:
            self.rounds.merge_committed(self.merger.head_record.record.point)
        self._publish_heartbeat()

    async def _merge_settled(self) -> None:
        """The others are told of a merge taken over here, and it becomes durable."""
        self._problem = ""
        self._publish_heartbeat()
        self._progress.made()
        await self.checkpointer.take()

    async def _say_goodbye(self) -> None:
        self._publish_heartbeat()
        with trio.move_on_after(GOODBYE_S):
            await self.anti_entropy.reconcile_with_all()

    # --- training and exchanging ------------------------------------------------------------------------------

    async def _train(self) -> None:
        slice_steps = 1
        while True:
            match self.rounds.plan():
                case Train(steps_max=steps_max):
                    self.phase = "training"
                    slice_steps = await self._train_slice(min(slice_steps, steps_max))
                case AwaitFinalMerge():
                    self.phase = "merging"
                    await self._progress.wait()
                case Finished():
                    self.phase = "finished"
                    await self._progress.wait()

    async def _train_slice(self, steps: int) -> int:
        """Take ``steps`` inner steps; returns how many make the next slice about ``SLICE_S`` long."""
        began_s = trio.current_time()
        report = await self.runtime.compute.run(
            partial(self.trainer.run_slice, steps), lane="train", cost_s=steps * self.runtime.costs.step_s
        )
        # Waiting for others in the lane is part of what a step takes, and so of the advertised speed.
        elapsed_s = max(trio.current_time() - began_s, 1e-6)
        keep = math.exp(-steps / SMOOTHING_STEPS)
        if math.isfinite(report.loss):
            # One that overflowed has left the weights as they were; in the mean it would stay for ever.
            self.loss = report.loss if self.loss is None else keep * self.loss + (1 - keep) * report.loss
        first = self.steps_per_s == 0.0
        self.steps_per_s = (
            steps / elapsed_s if first else keep * self.steps_per_s + (1 - keep) * steps / elapsed_s
        )
        self.tokens_per_s = self.steps_per_s * report.tokens / steps
        due = self.rounds.trained(self.trainer.step)
        if due is not None:
            self._exchanges_in.send_nowait(due)
        if not isinstance(self.rounds.plan(), Train):
            self._publish_heartbeat()
            self._progress.made()
        return max(1, round(SLICE_S * steps / elapsed_s))

    async def _exchange(self) -> None:
        async for due in self._exchanges_out:
            try:
                await self.exchanger.exchange(due)
                self._problem = ""
            except (GossamerError, OSError) as error:
                self._report_problem(f"exchange skipped: {error}")
            finally:
                self.rounds.exchange_ended()

    # --- members -----------------------------------------------------------------------------------

    def _alive(self) -> list[PeerId]:
        return sorted({self.local, *self.members.alive(trio.current_time())})

    def _may_mix_with(self, peer: PeerId) -> bool:
        """Whether ``peer`` is alive, not banned and no beginner, whose weights would undo what was learned here."""
        member = self.members.get(peer, trio.current_time())
        if member is None or member.state != "alive":
            return False
        grown = member.heartbeat.tokens >= BEGINNER_TOKENS_SHARE * self.trainer.tokens
        return grown and self._eligible(peer) and not self.ledger.banned(peer)

    def _is_elder(self, peer: PeerId) -> bool:
        """Whether ``peer`` says it has learned so much more that our weights are no measure for its own."""
        beat = self._heartbeat_of(peer)
        return beat is not None and self.trainer.tokens < BEGINNER_TOKENS_SHARE * beat.tokens

    def _unheard_s(self, peer: PeerId) -> float:
        return self.members.unheard_s(peer, trio.current_time())

    def _heed(self, author: PeerId, kind: str, body: Message | None) -> None:
        """Heartbeats, however they arrive, are for the member table and the merger."""
        if kind != "heartbeat" or author == self.local:
            return
        if isinstance(body, Heartbeat):
            self.members.heard(author, body, trio.current_time())
            self.merger.heads_changed(author, body.head, body.head_height, body.head_participants)
        else:
            self.members.forget(author)

    def _heartbeat_of(self, peer: PeerId) -> Heartbeat | None:
        return self.notices.body_of(peer, "heartbeat", Heartbeat)

    async def _follow_connections(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            match event:
                case PeerUp(peer=peer):
                    self.members.connected(peer)
                case PeerDown(peer=peer, broken=True):
                    self.members.disconnected(peer)

    def _publish_heartbeat(self) -> None:
        self.notices.publish(
            "heartbeat",
            Heartbeat(
                addresses=list(self.runtime.transport.local.addresses)[: self.limits.addresses_per_peer_max],
                agent=self._agent,
                step=self.trainer.step,
                steps_total=self.rounds.steps_total,
                steps_per_s=self.steps_per_s,
                tokens=self.trainer.tokens,
                loss=min(self.loss or 0.0, LOSS_TOLD_MAX),
                head=self.merger.head,
                head_height=self.merger.head_height,
                head_participants=self.merger.head_participants,
                # A goodbye stands: who stops has a last checkpoint to write and merges to finish, and beats meanwhile.
                leaving=self._stopping.is_set(),
            ),
        )

    async def _beat(self) -> None:
        pause_s = HEARTBEAT_S_MIN
        while True:
            await trio.sleep(pause_s)
            self._publish_heartbeat()
            pause_s = min(HEARTBEAT_GROWTH * pause_s, heartbeat_interval_s(1 + len(self.members)))

    def _progress_of_alive(self) -> list[MemberProgress]:
        own = MemberProgress(self.trainer.step, self.rounds.steps_total, self.steps_per_s)
        words = self.members.words_of_alive(trio.current_time())
        return [own, *(_progress_now(beat, unheard_s) for _, beat, unheard_s in words)]


def _progress_now(beat: Heartbeat, unheard_s: float) -> MemberProgress:
    """Where a member should be by now: in a large swarm its last word is some time old."""
    step = min(beat.step + beat.steps_per_s * unheard_s, max(beat.steps_total, beat.step))
    return MemberProgress(step, beat.steps_total, beat.steps_per_s)
