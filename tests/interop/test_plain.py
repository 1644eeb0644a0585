"""What docs/PROTOCOL.md says and what the nodes do is the same: both come to the same from the same bytes."""

from __future__ import annotations

import contextlib
import random
import re
import tomllib
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save
from torch import Tensor, nn

from gossip.record_batches import Batch, InvalidBatch, check, make, parse
from gossip.record_logs import Offer, RecordLogs
from netsim.record_learner import SketchedTask
from node.one_byte_node import rules_of
from p2p.identity import Identity
from tests.interop import plain
from training.one_byte import OneByteLearner, RecordRun
from training.run_spec import RunSpec, load_run_spec, parse_run_spec, run_id, spec_as_toml
from training.spec_sections import OneByteSpec

ROOT = Path(__file__).parents[2]
PROTOCOL = (ROOT / "docs" / "PROTOCOL.md").read_text()

SPEC = """
name = "interop"
init = "shared"
[train]
steps = 1
[one_byte]
step_size = 3e-4
halvings = [40, 4100]
clip = 5.0
batch_records = 4096
log_allowance = 4096
log_share_percent = 50
log_reach = 4096
log_opening_cost = 4200
snapshot_records = 0
"""
VARIANTS = ["", "pool = 5", 'table = "sign"', "trained = ['layers.*', 'zero']"]
AUTHORS = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in range(3)]


class Odd(nn.Module):
    """Tensors of all sorts of sizes, and of a size that is a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 1)])
        self.big = nn.Parameter(torch.linspace(-1024, 900, 13))
        self.zero = nn.Parameter(torch.zeros(9))
        self.tiny = nn.Parameter(torch.linspace(-1e-12, 1e-12, 6).view(2, 3))
        for layer in self.layers:
            layer.weight.data = torch.linspace(-0.3, 0.5, layer.weight.numel()).view_as(layer.weight)
            layer.bias.data = torch.linspace(0.0, 3.0, layer.bias.numel())


class Chain:
    """One log as its author writes it; ``fork`` goes on from the same batch a second time."""

    def __init__(self, author: Identity, incarnation: int, before: Batch | None = None) -> None:
        self.author, self.incarnation, self.before = author, incarnation, before

    def fork(self) -> Chain:
        return Chain(self.author, self.incarnation, self.before)

    def add(self, spec: RunSpec, clock: int, records: bytes) -> bytes:
        run = run_id(spec)
        packed = make(run, self.author, self.before, self.incarnation, clock, records)
        # One that is not valid travels all the same, and what its author writes next goes on from the one before.
        with contextlib.suppress(InvalidBatch):
            self.before = check(run, packed, parse(packed), self.before, rules(spec), self.author)
        return packed


def rules(spec: RunSpec):
    assert isinstance(spec.one_byte, OneByteSpec)
    return rules_of(spec.one_byte)


def some_batches(spec: RunSpec, rng: random.Random) -> list[bytes]:
    """What honest authors, liars and a bad line may bring, in any order."""
    packed: list[bytes] = []
    for author in AUTHORS:
        for incarnation in rng.sample([0, 5, 77, 2**63 - 1], rng.randint(1, 3)):
            chains = [Chain(author, incarnation)]
            clock = rng.choice([0, 0, 0, 9, 40, 4096 + 30])
            for _ in range(rng.randint(1, 9)):
                chain = rng.choice(chains)
                size = rng.choice([1, 3, 8, 8, 20, 20, 3000 if rng.random() < 0.1 else 5])
                packed.append(chain.add(spec, clock, rng.randbytes(size)))
                clock = max(0, clock + rng.choice([0, 4, 11, 30, 30, 4200 if rng.random() < 0.1 else 1, -3]))
                if rng.random() < 0.05:
                    chains.append(chain.fork())
    packed += [mangled(data, rng) for data in rng.sample(packed, min(6, len(packed)))]
    packed += rng.sample(packed, min(5, len(packed)))
    rng.shuffle(packed)
    return packed


def mangled(data: bytes, rng: random.Random) -> bytes:
    """One bit another, one byte more or fewer, or a number written longer than it need be."""
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data + b"\0"
        case 2:
            return data[:-1]
        case _:
            key = b"\x65clock"
            begin = data.index(key) + len(key)
            short = data[begin] < 24
            return data[:begin] + (b"\x18" if short else b"") + data[begin:]


def by_the_nodes(spec: RunSpec, packed: list[bytes]) -> dict[str, object]:
    logs = RecordLogs(run=run_id(spec), signer=AUTHORS[0], rules=rules(spec))
    left, refused = packed, 0
    while left:
        waiting = []
        for data in left:
            try:
                if logs.offer(data)[0] in (Offer.ORPHAN, Offer.WAITING):
                    waiting.append(data)
            except InvalidBatch:
                refused += 1
        if len(waiting) == len(left):
            break
        left = waiting
    task = SketchedTask("interop")
    task.model = Odd()
    base = weights()
    learner = OneByteLearner(spec, task, run=run_id(spec), base=base)
    learner.apply([RecordRun(each.log, each.first, each.clock, each.records) for each in logs.counting()])
    return {
        "records": logs.records,
        "rows": logs.rows().hex(),
        "digest": logs.digest().hex(),
        "state": learner.digest().hex(),
        "refused": refused > 0,
    }


def weights() -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in Odd().named_parameters()}


def by_the_document(spec: RunSpec, packed: list[bytes]) -> dict[str, object]:
    written = tomllib.loads(spec_as_toml(spec))
    run, one_byte = plain.run_id_of(written), written["one_byte"]
    base = plain.trained_of(plain.read_safetensors(save(weights())), one_byte["trained"])
    logs, refused = plain.assemble(packed, run, one_byte)
    records = plain.count(logs, one_byte)
    return {
        "records": records,
        "rows": plain.heads(logs).hex(),
        "digest": blake3(plain.heads(logs)).hexdigest(),
        "state": plain.state_hash(base, logs, run, one_byte),
        "refused": len(refused) > 0,
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(8))
def test_both_come_to_the_same(variant: str, seed: int) -> None:
    spec = parse_run_spec(SPEC + variant)
    packed = some_batches(spec, random.Random(f"{variant} {seed}"))
    assert by_the_document(spec, packed) == by_the_nodes(spec, packed)


@pytest.mark.parametrize("name", ["one_byte", "demo", "compare"])
def test_run_ids_are_those_of_the_document(name: str) -> None:
    spec = load_run_spec(ROOT / "examples" / f"{name}.toml")
    assert plain.run_id_of(tomllib.loads(spec_as_toml(spec))) == run_id(spec)


def test_the_known_answers_of_the_document() -> None:
    key = plain.log_key(bytes(range(32)), b"log")
    rows = re.findall(
        r"^\| (\S+) \| (\w{16}) \| (\w{16}) \| (\w{16}) \| (\w{16}) \|$", PROTOCOL, re.MULTILINE
    )
    assert [number for number, *_ in rows] == ["0", "1", "2^40"]
    for number, *expected in rows:
        start, stride = plain.direction(key, {"0": 0, "1": 1, "2^40": 2**40}[number])
        got = start, stride, plain.word(start, stride, 0), plain.word(start, stride, 1)
        assert [f"{value:016x}" for value in got] == expected
    first = plain.signs(plain.word(*plain.direction(key, 0), 0))
    assert f"`{''.join(map(str, first))}`" in PROTOCOL
    words = [f"{plain.word(0, 0x9E3779B97F4A7C15, index):016x}" for index in range(3)]
    assert ", ".join(words) in PROTOCOL
    sizes = [f"size({q}) = {plain.size(q)}" for q in (1, 2, 126)]
    assert ", ".join(sizes) in PROTOCOL
    rate = plain.rate_at(0, {"step_size": 1e-4, "clip": 10.0, "halvings": []})
    assert f"rate = {rate}" in PROTOCOL
    moves = [plain.step(byte, rate, 28) for byte in (1, 127, 128, 255)]
    assert f"move by {', '.join(map(str, moves))}" in PROTOCOL
    (written,) = re.findall(r"```toml\n(.*?)```", PROTOCOL, re.DOTALL)
    assert f"`{plain.run_id_of(tomllib.loads(written)).hex()}`" in PROTOCOL
    assert parse_run_spec(written) == load_run_spec(ROOT / "examples" / "one_byte.toml")
