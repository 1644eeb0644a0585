"""The daemon on real sockets, in this process: what its settings do to the world outside."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from msgspec.structs import replace

from cli.node_process import free_ports
from gossip.ledger import PeerLedger
from gossip.messages import ShardRef
from gossip.newcomer import fetch_spec
from gossip.shard_transfer import PACED_PIECE_BYTES, ShardFetcher
from node import daemon
from node.base import spec_based_on
from node.config import NodeConfig, load_config
from node.control import Export, NoDaemon, Stop, ask
from node.day_budget import DAY_S, DayTraffic
from node.home import Home
from node.status import NodeStatus
from node.surroundings import wall_time_s
from p2p.errors import CallRefused, GossamerError
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.transport import PeerId, PeerRecord
from tests.scraping import scrape
from tests.training.tiny_models import save_model
from tests.training.tiny_models import spec_of as tiny_huggingface_spec
from training.huggingface import Pretrained
from training.run_spec import parse_run_spec, run_id
from training.spec_sections import ExchangeSpec, OneByteSpec

SPEC = parse_run_spec("""
name = "daemon-test"
[model]
layers = 2
width = 64
heads = 2
context = 32
[data]
held_out_bytes = 4096
[train]
steps = 2
batch = 2
[exchange]
every_steps = 1
fragments = 1
""")


async def finished(home: Home, condition: Callable[[NodeStatus], object]) -> NodeStatus:
    """The status of the node in ``home`` once it has trained and ``condition`` holds."""
    with trio.fail_after(60):
        while True:
            await trio.sleep(0.1)
            try:
                status = await ask(home.control_socket, "status", result_type=NodeStatus)
            except NoDaemon:
                continue
            if status.phase == "finished" and condition(status):
                return status


def largest_shard(home: Home) -> ShardRef:
    """Of those the node of ``home`` holds; they are named by what they are."""
    names = [file.name.split("-") for file in (home.run_folder(run_id(SPEC)) / "shards").iterdir()]
    refs = [ShardRef(root=bytes.fromhex(root), size=int(size)) for root, size in names]
    return max(refs, key=lambda ref: ref.size)


async def test_a_hugging_face_model_goes_in_and_comes_out(tmp_path: Path) -> None:
    """What is exported lies beside what transformers needs to load it, and belongs to no other model's folder."""
    save_model(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"file {number} line {number}\n" for number in range(20_000)))
    spec = await spec_based_on(tiny_huggingface_spec(), tmp_path / "model")
    home = Home.at(tmp_path / "home")
    home.create()
    Identity.create(home.identity_file)
    config = NodeConfig(
        listen=("/ip4/127.0.0.1/tcp/0",), threads=1, data_path=texts, base_path=tmp_path / "model"
    )
    out = tmp_path / "tuned" / "model.safetensors"
    out.parent.mkdir()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(daemon._live, home, config, spec=spec, run=None, bootstrap=(), linger=True)
        )
        status = await finished(home, lambda status: status.records is not None)
        assert status.unit == "token"
        written = await ask(home.control_socket, "export", Export(path=str(out)), result_type=dict)
        (out.parent / "config.json").write_text("{}")
        with pytest.raises(GossamerError, match="belongs to another model"):
            await ask(home.control_socket, "export", Export(path=str(out)), result_type=dict)
        nursery.cancel_scope.cancel()
    assert written["bytes"] == out.stat().st_size
    assert (out.parent / "tokenizer.json").read_text() == Pretrained.read(tmp_path / "model").tokenizer


@pytest.mark.parametrize("mode", ["gossip", "one-byte"])
async def test_metrics_are_served_in_both_modes(tmp_path: Path, mode: str) -> None:
    home, (port,) = Home.at(tmp_path), free_ports(1)
    home.create()
    Identity.create(home.identity_file)
    home.config_file.write_text(
        f'listen = ["/ip4/127.0.0.1/tcp/0"]\nthreads = 1\n[metrics]\nlisten = "127.0.0.1:{port}"\n'
    )
    config = load_config(home.config_file, environ={}).config
    one_byte = replace(SPEC, init="shared", exchange=ExchangeSpec(), one_byte=OneByteSpec())
    spec = SPEC if mode == "gossip" else one_byte
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(daemon._live, home, config, spec=spec, run=None, bootstrap=(), linger=True)
        )
        status = await finished(home, lambda status: status.merges or status.records)
        told = await scrape(port)
        nursery.cancel_scope.cancel()
    assert told["gossamer_step"] == status.step == 2
    assert told["gossamer_loss"] == pytest.approx(status.loss)
    assert told["gossamer_tokens_per_second"] == status.tokens_per_s == 0
    assert ("gossamer_merges_total" in told) == (mode == "gossip")
    assert ("gossamer_records_applied" in told) == (mode == "one-byte")
    assert told["gossamer_trio_tasks"] > 10
    if mode == "gossip":
        assert told["gossamer_merges_total"] == status.merges
        assert 0 <= status.last_merge_s_ago <= told["gossamer_merge_age_seconds"] < 60


async def test_the_upload_cap_in_the_settings_holds_on_the_wire(tmp_path: Path) -> None:
    home, limits, rate = Home.at(tmp_path), Limits(), 1_000_000
    home.create()
    Identity.create(home.identity_file)
    home.config_file.write_text(
        f'listen = ["/ip4/127.0.0.1/tcp/0"]\nupload_bytes_per_s_max = {rate}\nthreads = 1\n'
    )
    config = load_config(home.config_file, environ={}).config
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(daemon._live, home, config, spec=SPEC, run=None, bootstrap=(), linger=True)
        )
        status = await finished(home, lambda status: status.merges)
        peer = PeerId(status.peer)
        shard = largest_shard(home)
        async with open_libp2p(Identity.generate(), listen=[], limits=limits) as transport:
            fetcher = ShardFetcher(
                transport=transport,
                ledger=PeerLedger(),
                limits=limits,
                rng=random.Random(0),
                reach=lambda _: transport.connect(
                    PeerRecord(peer, tuple(address.partition("/p2p/")[0] for address in status.addresses))
                ),
            )
            began_s = trio.current_time()
            for _ in range(2):
                await fetcher.fetch(shard, [peer], timeout_s=30)
            elapsed_s = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    # Each piece leaves once those before it are paid for, so only the last one comes for free.
    assert elapsed_s >= (2 * shard.size - PACED_PIECE_BYTES) / rate


async def test_what_is_spent_of_a_day_outlasts_the_process_and_training_goes_on(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    home.create()
    Identity.create(home.identity_file)
    # A day that begins only now, by a clock that was ahead, is still the day that counts.
    spent = DayTraffic(int(wall_time_s() // DAY_S) + 1, bytes_sent=2000)
    home.day_traffic_file.write_bytes(msgspec.json.encode(spent))
    home.config_file.write_text(
        'listen = ["/ip4/127.0.0.1/tcp/0"]\nupload_bytes_per_day_max = "2 kB"\nthreads = 1\n'
    )
    config = load_config(home.config_file, environ={}).config
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(daemon._live, home, config, spec=SPEC, run=None, bootstrap=(), linger=True)
        )
        status = await finished(home, lambda status: status.merges)
        assert (status.step, status.bytes_sent_today) == (2, 2000)
        assert status.problem.startswith(
            "today's data budget is spent: 2.0 KiB sent; in touch again at 00:00"
        )
        peer = PeerRecord(PeerId(status.peer), (status.addresses[0].partition("/p2p/")[0],))
        async with open_libp2p(Identity.generate(), listen=[], limits=Limits()) as transport:
            await transport.connect(peer)
            with pytest.raises(CallRefused, match="comes back by itself"):
                await fetch_spec(transport, peer.peer, run_id(SPEC), timeout_s=5)
        await ask(home.control_socket, "stop", Stop(), result_type=dict)
    after = msgspec.json.decode(home.day_traffic_file.read_bytes(), type=DayTraffic)
    assert after.day == spent.day
    assert 2000 < after.bytes_sent < 4000
