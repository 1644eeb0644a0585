"""One-byte mode: what directions and records cost beside the forward passes they are for, and what they need of memory.

Everything on one thread, with the model of examples/one_byte.toml and the product's own learner. Making the directions
of a probe is what the probe takes beyond two plain forward passes; the records of four nodes are applied as they come
in life: one's own at once, those of the three others by the batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Figure
from training.data import Corpus
from training.one_byte import OneByteLearner, RecordRun, build_one_byte_task
from training.run_spec import load_run_spec, run_id

SPEC_FILE = Path(__file__).parent.parent / "examples" / "one_byte.toml"
NODES = 4
BATCH, CONTEXT = 16, 128
"""Of the minibatch that is probed on."""
BATCH_RECORDS = 64
REPLAYED_BATCHES = 16
LOGS = [bytes([number]) * 16 for number in range(NODES)]


async def measure(repeats: int = 9) -> list[Figure]:
    """Shares of the two forward passes of a probe, records replayed per second, and memory beside the fp32 model."""
    torch.set_num_threads(1)
    learner = _learner()
    probe_share, apply_share, both = [], [], []
    for number in range(repeats + 1):
        forwards_s = _seconds(lambda: _two_forwards(learner))
        probe_s = _seconds(lambda at=number: learner.probe(LOGS[0], at))  # type: ignore[misc]
        own_s = _seconds(lambda at=number: learner.apply([_records(0, at, 1)]))  # type: ignore[misc]
        others_s = sum(
            _seconds(lambda log=log, at=number: learner.apply([_records(log, at, BATCH_RECORDS)]))  # type: ignore[misc]
            for log in range(1, NODES)
        )
        probe_share.append(100 * (probe_s - forwards_s) / forwards_s)
        apply_share.append(100 * (own_s + others_s / BATCH_RECORDS) / forwards_s)
        both.append(probe_share[-1] + apply_share[-1])
    replay = [_replayed_per_s(learner, number) for number in range(repeats)]
    parameters = sum(tensor.numel() for tensor in learner.weights().values())
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in learner.weights().values()}
    held_bytes = learner.state.values.nbytes
    held_bytes += sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    name = f"one byte, {parameters / 1e6:.1f} M parameters, {BATCH} x {CONTEXT} tokens"
    return [
        # The first round warms the caches.
        Figure(f"{name}: directions / two forwards", "%", tuple(probe_share[1:])),
        Figure(f"  applying the records of {NODES} nodes / two forwards", "%", tuple(apply_share[1:])),
        Figure("  both", "%", tuple(both[1:]), at_most=10),
        Figure("  records replayed on one core", "/s", tuple(replay), at_least=500),
        Figure("  state and weights / fp32 model", "x", (held_bytes / (4 * parameters),), at_most=2.1),
    ]


def _learner() -> OneByteLearner:
    spec = load_run_spec(SPEC_FILE)
    spec = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, batch=BATCH))
    task = build_one_byte_task(
        spec, Corpus.load("stdlib", None), run=run_id(spec), peer="bench", part=None, device="cpu", threads=1
    )
    base = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
    return OneByteLearner(spec, task, run=run_id(spec), base=base)


def _two_forwards(learner: OneByteLearner) -> None:
    inputs, targets = learner.task.batch(0)
    assert inputs.shape == (BATCH, CONTEXT)

    def loss() -> Tensor:
        return F.cross_entropy(learner.task.model(inputs).flatten(0, -2).float(), targets.flatten())

    with torch.no_grad():
        loss().item()
        loss().item()


def _records(log: int, batch: int, count: int) -> RecordRun:
    return RecordRun(LOGS[log], batch * count, batch * count, os.urandom(count))


def _replayed_per_s(learner: OneByteLearner, number: int) -> float:
    runs = [
        _records(at % NODES, number * REPLAYED_BATCHES + at, BATCH_RECORDS) for at in range(REPLAYED_BATCHES)
    ]

    def replay() -> None:
        for run in runs:
            learner.apply([run])

    return REPLAYED_BATCHES * BATCH_RECORDS / _seconds(replay)


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
