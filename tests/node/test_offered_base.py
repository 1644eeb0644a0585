"""The weights that a one-byte run starts from: whoever hands them over, they are the ones its spec names, or none."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import trio
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from gossip.ledger import PeerLedger
from gossip.messages import CHUNK_BYTES, ShardRef
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore, outline_of
from netsim.network import SimHost, SimNetwork, address_of, open_sim_network
from node.base import ATTEMPTS, RETRY_S, BaseSource, weights_ref
from p2p.limits import DEFAULT_LIMITS
from p2p.transport import PeerId
from tests.conftest import Entries
from tests.gossip.world import IDENTITIES, MemoryDisk
from training.base_weights import BaseError, base_from_bytes, base_to_bytes
from training.run_spec import parse_run_spec

SHAPES = {"a.weight": (5, 7), "b.bias": (3,), "large": (CHUNK_BYTES // 4, 2)}
"""Three chunks, the last one short."""
SEEKER, ONE, OTHER, THIRD = (identity.peer for identity in IDENTITIES[:4])


def weights(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


DATA = base_to_bytes(weights())


async def reference(data: bytes = DATA) -> ShardRef:
    """How a spec names ``data``."""
    root = (await outline_of(data))[0].root
    return ShardRef(root=root, size=4 * sum(map(math.prod, SHAPES.values())))


class Holder:
    """A store that says it holds what it is asked for, and serves ``data`` as it."""

    def __init__(self, ref: ShardRef, data: bytes) -> None:
        self._ref, self._data = ref, data

    async def outline(self, ref: ShardRef) -> object:
        return (await outline_of(self._data))[1]

    async def get(self, ref: ShardRef) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._data


class World:
    """A newcomer that wants the base, and holders."""

    def __init__(self, network: SimNetwork, host: SimHost, stack: contextlib.AsyncExitStack) -> None:
        self.network, self.host, self._stack = network, host, stack
        self.disk = MemoryDisk()
        self.store = ShardStore(self.disk, quota_bytes=1 << 26)

    async def holder(self, peer: PeerId, serve: Holder | None) -> None:
        """One that serves; without ``serve`` it holds nothing."""
        host = await self._stack.enter_async_context(self.network.open_host(peer))
        store = ShardStore(MemoryDisk(), quota_bytes=1 << 26) if serve is None else serve
        ShardServer(transport=host, store=cast(ShardStore, store), ledger=PeerLedger()).serve()

    async def obtain(self, ref: ShardRef, *holders: PeerId, path: Path | None = None) -> dict[str, Tensor]:
        source = BaseSource(
            path=path,
            store=self.store,
            transport=self.host,
            bootstrap=[f"{address_of(peer)}/p2p/{peer}" for peer in holders],
            limits=DEFAULT_LIMITS,
        )
        return await source.weights(ref, SHAPES, None)


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:

    async with (
        open_sim_network(random.Random(1), limits=DEFAULT_LIMITS) as network,
        network.open_host(SEEKER) as host,
        contextlib.AsyncExitStack() as stack,
    ):
        yield World(network, host, stack)


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == SHAPES.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in weights().items()
    )


# --- from peers -----------------------------------------------------------------------------------------------------


async def test_it_is_fetched_once_by_hash_and_kept(autojump_clock: object) -> None:
    async with world() as one:
        ref = await reference()
        await one.holder(ONE, Holder(ref, DATA))
        assert same(await one.obtain(ref, ONE))
        again = ShardStore(one.disk, quota_bytes=1 << 26)
        await again.load()
        one.store = again
        assert same(await one.obtain(ref)), "nobody is asked for what is kept"


LIES: dict[str, Callable[[bytes], bytes]] = {
    "another hash": lambda data: base_to_bytes(weights(2)),
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "truncated": lambda data: data[: len(data) // 2],
    "another shape": lambda data: data + bytes(4),
    "another dtype": lambda data: (
        torch.frombuffer(bytearray(data), dtype=torch.float32).half().numpy().tobytes()
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_honest_holder_beside_a_liar_is_enough(
    autojump_clock: object, lie: str, told: Entries
) -> None:
    async with world() as one:
        ref = await reference()
        await one.holder(ONE, Holder(ref, LIES[lie](DATA)))
        await one.holder(OTHER, Holder(ref, DATA))
        assert same(await one.obtain(ref, ONE, OTHER))
        refused = {entry["peer"] for entry in told if entry["event"] == "refused"}
        assert refused <= {ONE}, "the order in which they are asked is drawn"


@pytest.mark.parametrize("lie", LIES)
async def test_a_lying_holder_alone_gets_nobody_to_start(
    autojump_clock: object, lie: str, told: Entries
) -> None:
    async with world() as one:
        ref = await reference()
        await one.holder(ONE, Holder(ref, LIES[lie](DATA)))
        with pytest.raises(BaseError, match="could not be fetched") as refused:
            await one.obtain(ref, ONE)
        assert refused.value.why
        assert "--base PATH" in refused.value.fix
        assert {entry["peer"] for entry in told if entry["event"] == "refused"} == {ONE}
        assert not one.disk.files


async def test_without_a_holder_it_is_asked_for_two_minutes(autojump_clock: object) -> None:
    async with world() as one:
        ref = await reference()
        await one.holder(ONE, None)
        began_s = trio.current_time()
        with pytest.raises(BaseError, match="could not be fetched") as refused:
            await one.obtain(ref, ONE, OTHER)
        assert "not-held" in refused.value.why
        assert trio.current_time() - began_s == pytest.approx(ATTEMPTS * RETRY_S, rel=0.5)


async def test_a_holder_that_comes_up_late_is_found(autojump_clock: object) -> None:
    async with trio.open_nursery() as nursery, world() as one:
        ref = await reference()
        found: list[dict[str, Tensor]] = []

        async def join() -> None:
            found.append(await one.obtain(ref, ONE))

        nursery.start_soon(join)
        await trio.sleep(30)
        assert not found
        await one.holder(ONE, Holder(ref, DATA))
        await trio.sleep(10)
        assert same(found[0])


async def test_a_holder_that_stalls_is_left_for_another(autojump_clock: object) -> None:
    class Stalling(Holder):
        async def get(self, ref: ShardRef) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    async with world() as one:
        ref = await reference()
        await one.holder(ONE, Stalling(ref, DATA))
        await one.holder(OTHER, Holder(ref, DATA))
        assert same(await one.obtain(ref, ONE, OTHER))


async def test_what_rotted_on_disk_is_fetched_again(autojump_clock: object) -> None:
    async with world() as one:
        ref = await reference()
        await one.holder(ONE, Holder(ref, DATA))
        await one.obtain(ref, ONE)
        (path,) = one.disk.files
        one.disk.flip_bit(path, 1000)
        one.store = ShardStore(one.disk, quota_bytes=1 << 26)
        await one.store.load()
        assert same(await one.obtain(ref, ONE))


async def test_a_base_that_is_named_and_not_finite_starts_nothing(autojump_clock: object) -> None:
    """Whoever made the spec named it; no node may begin from it, and each says why."""
    broken = weights()
    broken["b.bias"][1] = torch.nan
    data = base_to_bytes(broken)
    async with world() as one:
        ref = await reference(data)
        await one.holder(ONE, Holder(ref, data))
        with pytest.raises(BaseError, match=r"b\.bias .*not finite"):
            await one.obtain(ref, ONE)


# --- from a file ----------------------------------------------------------------------------------------------------


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "base.safetensors"
    save_file(tensors, path)
    return path


async def test_a_file_of_ones_own_is_as_good(autojump_clock: object, tmp_path: Path) -> None:
    path = written(tmp_path, weights())
    async with world() as one:
        ref = await reference()
        assert same(await one.obtain(ref, path=path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"b.bias": w["b.bias"] + 1}, "another model than the run starts from"),
        (lambda w: w | {"b.bias": torch.zeros(4)}, r"b\.bias has shape \(4,\)"),
        (lambda w: w | {"b.bias": w["b.bias"].half()}, r"b\.bias is torch\.float16"),
        (lambda w: w | {"b.bias": w["b.bias"].double()}, r"b\.bias is torch\.float64"),
        (lambda w: w | {"b.bias": torch.full((3,), torch.inf)}, "not finite"),
        (lambda w: w | {"c": torch.zeros(1)}, "has a tensor c"),
        (lambda w: {"large": w["large"]}, r"lacks a\.weight"),
    ],
)
async def test_a_file_of_other_weights_is_refused_by_name(
    autojump_clock: object, tmp_path: Path, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    path = written(tmp_path, change(weights()))
    async with world() as one:
        with pytest.raises(BaseError, match=message):
            await one.obtain(await reference(), path=path)
        assert not one.disk.files


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "empty"])
async def test_a_file_that_is_none_is_refused(autojump_clock: object, tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, weights())
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "garbage":
            path.write_bytes(blake3(b"garbage").digest(length=10_000))
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
    async with world() as one:
        with pytest.raises(BaseError, match="cannot start from these weights"):
            await one.obtain(await reference(), path=path)


@pytest.mark.parametrize("size", [0, 4, len(DATA) - 4, len(DATA) - 1, len(DATA) + 4])
def test_bytes_of_another_size_are_no_weights_of_the_model(size: int) -> None:
    with pytest.raises(BaseError, match="the model takes"):
        base_from_bytes((DATA + DATA)[:size], SHAPES)


def test_a_spec_without_a_base_names_none() -> None:
    assert weights_ref(parse_run_spec('name = "a"\ninit = "shared"\n[one_byte]\n')) is None
