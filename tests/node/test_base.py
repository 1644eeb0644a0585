"""What a one-byte run starts from: named by whoever has it, obtained by those who have not, over the simulated network.

Goal: whatever the place, the bytes are those that the spec names, and a newcomer with an invite alone can go on.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import torch

from gossip.ledger import PeerLedger
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore
from netsim.network import LinkModel, open_sim_network
from node.base import BaseSource, files_ref, spec_based_on, weights_ref
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.transport import Transport
from tests.gossip.world import IDENTITIES, MemoryDisk
from tests.training.tiny_models import POSITIONS, edit_json, save_model, spec_of
from training.base_weights import BaseError
from training.export import export_safetensors
from training.huggingface import Pretrained, PretrainedError
from training.model import GPT
from training.run_spec import RunSpec, SpecError, check_startable, parse_run_spec, run_id
from training.spec_sections import GptSpec

LIMITS = Limits()
OURS, THEIRS = (identity.peer for identity in IDENTITIES[:2])

GPT_SPEC = """
name = "on-given-weights"
init = "shared"
[model]
layers = 1
width = 16
heads = 2
context = 16
[one_byte]
"""


class Holder:
    """A node's store, and where it looks."""

    def __init__(self, transport: Transport, path: Path | None, bootstrap: tuple[str, ...] = ()) -> None:
        self.store = ShardStore(MemoryDisk(), quota_bytes=1 << 30)
        self.transport = transport
        self.bootstrap = bootstrap
        self.path = path

    async def obtain(self, spec: RunSpec) -> tuple[Pretrained, dict[str, torch.Tensor]]:
        """As the daemon does."""
        source = BaseSource(
            path=self.path,
            store=self.store,
            transport=self.transport,
            bootstrap=self.bootstrap,
            limits=LIMITS,
        )
        files, weights = files_ref(spec), weights_ref(spec)
        assert files is not None
        assert weights is not None
        pretrained = await source.pretrained(files)
        return pretrained, await source.weights(weights, pretrained.shapes(), pretrained)


@contextlib.asynccontextmanager
async def two_hosts() -> AsyncIterator[tuple[Transport, Transport]]:
    link = LinkModel(latency_s=0.02, bytes_per_s=20e6)
    async with (
        open_sim_network(random.Random(1), link=link, limits=LIMITS) as network,
        network.open_host(OURS) as ours,
        network.open_host(THEIRS) as theirs,
    ):
        yield ours, theirs


async def test_a_newcomer_needs_no_directory(tmp_path: Path, autojump_clock: object) -> None:
    save_model(tmp_path)
    spec = await spec_based_on(spec_of(), tmp_path)
    check_startable(spec)
    async with two_hosts() as (ours, theirs):
        founder = Holder(theirs, tmp_path)
        _, held = await founder.obtain(spec)
        ShardServer(transport=theirs, store=founder.store, ledger=PeerLedger()).serve()
        address = f"{theirs.local.addresses[0]}/p2p/{THEIRS}"
        newcomer = Holder(ours, None, (address,))
        pretrained, weights = await newcomer.obtain(spec)
        assert pretrained == Pretrained.read(tmp_path)
        assert weights.keys() == held.keys()
        assert all(torch.equal(tensor, held[name]) for name, tensor in weights.items())
        # What was fetched once is there after a restart.
        again = Holder(ours, None)
        again.store = newcomer.store
        assert (await again.obtain(spec))[0] == pretrained


async def test_another_model_of_ones_own_is_told_apart(tmp_path: Path, autojump_clock: object) -> None:
    ours, other, words = (tmp_path / name for name in ("ours", "other", "words"))
    save_model(ours)
    save_model(other, seed=1)
    save_model(words)
    edit_json(words / "tokenizer.json", version="1.0", padding=None, added_tokens=[])
    spec = await spec_based_on(spec_of(), ours)
    assert run_id(spec) == run_id(await spec_based_on(spec_of(), ours))
    async with two_hosts() as (host, _):
        for directory in (other, words):
            assert run_id(spec) != run_id(await spec_based_on(spec_of(), directory))
            with pytest.raises(BaseError, match="another model"):
                await Holder(host, directory).obtain(spec)


async def test_weights_of_ones_own_may_be_a_file(tmp_path: Path, autojump_clock: object) -> None:
    """Such as ``gossamer export`` wrote: config and tokenizer are fetched, or were."""
    save_model(tmp_path)
    spec = await spec_based_on(spec_of(), tmp_path)
    pretrained = Pretrained.read(tmp_path)
    file = tmp_path / "exported.safetensors"
    file.write_bytes(export_safetensors(pretrained.read_weights(tmp_path), spec, metadata={}))
    async with two_hosts() as (host, _):
        holder = Holder(host, file)
        await holder.store.put(pretrained.to_bytes())
        assert (await holder.obtain(spec))[0] == pretrained


async def test_a_spec_is_based_on_a_file_of_weights(tmp_path: Path) -> None:
    spec = parse_run_spec(GPT_SPEC)
    assert isinstance(spec.model, GptSpec)
    model = GPT(spec.model, torch.Generator().manual_seed(3))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    file = tmp_path / "base.safetensors"
    file.write_bytes(export_safetensors(weights, spec, metadata={}))
    ref = weights_ref(await spec_based_on(spec, file))
    assert ref is not None
    assert ref.size == 4 * spec.model.parameters


async def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    cases: list[tuple[RunSpec, Path, type[GossamerError], str]] = [
        (parse_run_spec('name = "gossip"'), tmp_path, GossamerError, "no given weights"),
        (parse_run_spec(GPT_SPEC), tmp_path, BaseError, "cannot read"),
        (parse_run_spec(GPT_SPEC), tmp_path / "model.safetensors", BaseError, "base"),
        (spec_of(), tmp_path / "model.safetensors", PretrainedError, "not a directory"),
    ]
    for spec, path, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            await spec_based_on(spec, path)
        assert caught.value.why
        assert caught.value.fix


async def test_a_context_that_the_model_has_not_is_refused_at_once(tmp_path: Path) -> None:
    save_model(tmp_path)
    spec = spec_of()
    longer = msgspec.structs.replace(spec, model=msgspec.structs.replace(spec.model, context=POSITIONS + 1))
    with pytest.raises(PretrainedError, match="at once"):
        await spec_based_on(longer, tmp_path)


async def test_a_model_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    monkeypatch.setattr(Pretrained, "read_weights", lambda *_: {"w": torch.zeros(1).expand((1 << 28) + 1)})
    monkeypatch.setattr(Pretrained, "check", lambda *_, **__: None)
    monkeypatch.setattr("node.base.base_to_bytes", lambda _: b"as large as that")
    with pytest.raises(SpecError, match=r"model\.parameters"):
        await spec_based_on(spec_of(), tmp_path)
