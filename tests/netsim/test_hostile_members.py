"""Members of the run that are wrong at a higher layer, among honest nodes: refused, counted, told, and without effect.

The hostile member is made of the product's own parts, so that it comes as far as its one lie lets it.
"""

import contextlib
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import structlog
import torch
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from structlog.testing import capture_logs
from trio.testing import MockClock

from gossip.address_book import AddressBook
from gossip.anti_entropy import AntiEntropy
from gossip.ledger import PeerLedger
from gossip.links import Links
from gossip.messages import SNAPSHOT_PROTOCOL, ShardRef, Snapshot, WantSnapshot
from gossip.notices import NoticeTable
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore
from netsim.disk import SimDisk
from netsim.network import address_of
from netsim.world import World, open_world
from node.node import HEARTBEAT_S, Node
from p2p.identity import Identity, Signer
from p2p.rpc import serve_calls
from p2p.transport import PeerId
from tests.gossip.world import heartbeat
from tests.netsim.test_world import SPEC, anchors, finished, small_corpus, until
from training.data import Corpus
from training.layout import TensorSpan
from training.run_spec import RunSpec, canonical_bytes, run_id
from training.trainer import SliceReport
from training.wire import encode_values

MALLORY = Identity(Ed25519PrivateKey.from_private_bytes(b"M" * 32))
SHORT = msgspec.structs.replace(SPEC, train=msgspec.structs.replace(SPEC.train, steps=200))

Entries = list[MutableMapping[str, Any]]
Forge = Callable[[torch.Tensor, list[TensorSpan]], torch.Tensor]
"""What is offered in place of a fragment, given its values and where its tensors lie."""


class Scribbler:
    """Signs as Mallory, with signatures that prove nothing."""

    peer = MALLORY.peer
    verify = staticmethod(MALLORY.verify)

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """Sixty-four bytes."""
        return bytes(64)


class RottenStore(ShardStore):
    """Hands out what it holds with one bit turned."""

    async def get(self, ref: ShardRef) -> bytes:
        """Almost the bytes of ``ref``."""
        data = bytearray(await super().get(ref))
        data[-1] ^= 1
        return bytes(data)


def faithful(values: torch.Tensor, _: list[TensorSpan]) -> torch.Tensor:
    return values


def with_a_nan(values: torch.Tensor, _: list[TensorSpan]) -> torch.Tensor:
    values[len(values) // 2] = torch.nan
    return values


def too_short(values: torch.Tensor, _: list[TensorSpan]) -> torch.Tensor:
    return values[:-1]


def a_million_times(values: torch.Tensor, _: list[TensorSpan]) -> torch.Tensor:
    return 1e6 * values


def with_one_tensor_blown_up(values: torch.Tensor, spans: list[TensorSpan]) -> torch.Tensor:
    """Its norm is still within bounds."""
    span = next(span for span in spans if span.kind == "weight")
    values[span.start : span.stop] *= 5
    return values


@contextlib.asynccontextmanager
async def mallory(
    world: World,
    *,
    beside: Node,
    forge: Forge = faithful,
    signer: Signer = MALLORY,
    store: type[ShardStore] = ShardStore,
    spec: RunSpec | None = None,
    **beat: object,
) -> AsyncIterator[None]:
    """One more member for the length of the block, wrong in what the arguments say and by the book in all else."""
    spec = spec or world.spec
    limits, rng, ledger = world.network.limits, random.Random(0), PeerLedger()
    async with world.network.open_host(MALLORY.peer) as host, trio.open_nursery() as nursery:
        table = NoticeTable(signer=signer, run=run_id(spec), incarnation=1, limits=limits)
        links = Links(
            transport=host,
            book=AddressBook(SimDisk(), local=MALLORY.peer, limits=limits, rng=rng),
            ledger=ledger,
            notices=table,
            run=run_id(spec),
            spec=canonical_bytes(spec),
            agent="mallory/1",
            bootstrap=[
                f"{address_of(machine.identity.peer)}/p2p/{machine.identity.peer}"
                for machine in world.machines
            ],
            limits=limits,
            rng=rng,
        )
        sync = AntiEntropy(transport=host, notices=table, ledger=ledger, limits=limits, rng=rng)
        shards = store(SimDisk(), quota_bytes=1 << 30)
        ShardServer(transport=host, store=shards, ledger=ledger).serve()

        async def give(_: PeerId, want: WantSnapshot) -> Snapshot:
            values = beside.trainer.read(want.fragment)
            forged = forge(values, beside.trainer.layout.fragment_spans(want.fragment))
            return Snapshot(shard=await shards.put(encode_values(forged, spec.exchange.wire), owner="given"))

        async def say() -> None:
            while True:
                table.publish(
                    "heartbeat",
                    heartbeat(
                        **({"addresses": list(host.local.addresses), "step": 100, "tokens": 3200} | beat)
                    ),
                )
                await trio.sleep(HEARTBEAT_S)

        serve_calls(host, SNAPSHOT_PROTOCOL, WantSnapshot, give, limits=limits, on_malformed=lambda *_: None)
        for task in (links.run, sync.run, say):
            nursery.start_soon(task)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus()


@pytest.fixture
def told() -> Iterator[Entries]:
    """What nodes log, from INFO on."""
    quiet = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    with capture_logs() as entries:
        yield entries
    structlog.configure(**quiet)


LIES = {
    "NaN in a fragment": ({"forge": with_a_nan}, "non-finite"),
    "a fragment too short": ({"forge": too_short}, "shape"),
    "a fragment a million times as large": ({"forge": a_million_times}, "norm"),
    "one tensor five times as large": ({"forge": with_one_tensor_blown_up}, "variance"),
    "bytes that are not what they are called": ({"store": RottenStore}, "hash"),
    "signatures that prove nothing": ({"signer": Scribbler()}, "signature"),
    "another run": ({"spec": msgspec.structs.replace(SPEC, name="other-world")}, "wrong-run"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_refused_counted_and_told_and_changes_nothing(
    autojump_clock: MockClock, corpus: Corpus, told: Entries, lie: str
) -> None:
    how, reason = LIES[lie]
    async with open_world(SPEC, corpus, machines=2, seed=11) as world:
        nodes = await world.start_all()
        async with mallory(world, beside=nodes[0], **how):
            await until(lambda: all(node.ledger.refusals[reason] for node in nodes), seconds=60)
            steps = [node.trainer.step for node in nodes]
            await until(lambda: finished(nodes), seconds=120)
        assert max(steps) < SPEC.train.steps
        for node in nodes:
            assert set(node.ledger.refusals) == {reason}
            assert node.exchanger.mixes_failed <= node.ledger.refusals[reason], "who is banned is not asked"
            assert bool(torch.isfinite(node.trainer.read()).all())
            assert node.merges.last.contributors == sorted(node.local for node in nodes)
        assert len(anchors(nodes)) == 1
    refused = [entry for entry in told if entry["event"] == "refused" and entry["peer"] == MALLORY.peer]
    assert {entry["reason"] for entry in refused} == {reason}
    assert len(refused) == sum(node.ledger.refusals[reason] for node in nodes)
    assert not [entry for entry in told if entry["log_level"] in ("error", "critical")]


BOASTS = {
    "a chain it cannot show": {"head": b"h" * 32, "head_height": 1000, "head_participants": 1_000_000},
    "a run without end": {"step": 0, "steps_total": 2**53, "steps_per_s": 1e-9},
    "a run of no steps": {"step": 0, "steps_total": 0, "steps_per_s": 1e9},
}


@pytest.mark.parametrize("boast", BOASTS)
async def test_what_a_member_claims_of_itself_does_not_keep_others_from_merging(
    autojump_clock: MockClock, corpus: Corpus, boast: str
) -> None:
    async with open_world(SHORT, corpus, machines=2, seed=12) as world:
        nodes = await world.start_all()
        async with mallory(world, beside=nodes[0], **BOASTS[boast]):
            await until(
                lambda: all(
                    node.members.get(MALLORY.peer, trio.current_time()) is not None for node in nodes
                ),
                seconds=5,
            )
            await until(lambda: finished(nodes), seconds=30 + 3 * SPEC.merge.wait_s_max)
        assert len(anchors(nodes)) == 1
        assert all(node.merges.last.contributors == sorted(node.local for node in nodes) for node in nodes)
        assert all(node.ledger.refusals.total() == 0 for node in nodes)


BAD_INPUTS = {
    "NaN": (lambda values: torch.full_like(values, torch.nan), "non-finite"),
    "a million times as large": (lambda values: 1e6 * values, "norm"),
    "too short": (lambda values: values[:-1], "shape"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
async def test_weights_that_must_not_be_averaged_are_left_out_of_merges(
    autojump_clock: MockClock, corpus: Corpus, bad: str
) -> None:
    forge, reason = BAD_INPUTS[bad]
    async with open_world(SHORT, corpus, machines=4, seed=13) as world:
        *nodes, broken = await world.start_all()
        read = broken.trainer.read
        broken.trainer.read = lambda fragment=None: forge(read()) if fragment is None else read(fragment)
        await until(lambda: all(node.merges.count == 2 for node in nodes), seconds=120)
        assert len(anchors(nodes)) == 1
        for node in nodes:
            assert node.merges.last.contributors == sorted(node.local for node in nodes)
            assert set(node.ledger.refusals) <= {reason, "not-held"}
            assert bool(torch.isfinite(node.trainer.read()).all())
        assert any(node.ledger.refusals[reason] for node in nodes)


@pytest.mark.parametrize("loss", [math.nan, 1e30])
async def test_a_loss_that_overflows_once_costs_nobody_its_standing(
    autojump_clock: MockClock, corpus: Corpus, loss: float
) -> None:
    async with open_world(SHORT, corpus, machines=2, seed=14) as world:
        nodes = await world.start_all()
        train = nodes[0].trainer.run_slice
        losses = iter([loss])

        def overflow_once(steps: int) -> SliceReport:
            report = train(steps)
            return replace(report, loss=next(losses, report.loss))

        await until(lambda: nodes[0].trainer.step >= 100, seconds=60)
        nodes[0].trainer.run_slice = overflow_once
        await until(lambda: all(node.merges.count == 2 for node in nodes), seconds=60)
        assert all(node.merges.last.contributors == sorted(node.local for node in nodes) for node in nodes)
        assert all(node.ledger.refusals.total() == 0 for node in nodes)
