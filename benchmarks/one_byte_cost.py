"""One-byte mode: what directions and records cost beside the forward passes they are for, and what they need of memory.

Everything on one thread, with the product's own learner, and each part right after the forward passes that it is
compared with, when nothing of it is in a cache. Making directions is what a probe does of that, to both sides, layer by
layer; the records of four nodes are applied as they come in life: one's own at once, those of the others by the batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Figure
from training.data import Corpus
from training.directions import SIGNS_PER_WORD, KeySequence, direction_words, signs_of
from training.one_byte import OneByteLearner, RecordRun, build_one_byte_task
from training.run_spec import parse_run_spec, run_id

NODES = 4
BATCH, CONTEXT = 16, 128
"""Of the minibatch that is probed on."""
SPEC = f"""
name = "one-byte-cost"
init = "shared"
[model]
layers = 6
width = 128
heads = 4
context = {CONTEXT}
[data]
held_out_bytes = 4096
[train]
batch = {BATCH}
[one_byte]
"""
BATCH_RECORDS = 64
REPLAYED_BATCHES = 16
LOGS = [bytes([number]) * 16 for number in range(NODES)]


async def measure(repeats: int = 9) -> list[Figure]:
    """Shares of the two forward passes of a probe, records replayed per second, and memory beside the fp32 model."""
    torch.set_num_threads(1)
    learner = _learner()
    beyond, making, applying, both = [], [], [], []
    for number in range(repeats + 1):
        forwards_s = _seconds(lambda: _two_forwards(learner))
        probe_s = _seconds(lambda at=number: learner.probe(LOGS[0], at))  # type: ignore[misc]
        _two_forwards(learner)
        making_s = _seconds(lambda at=number: _make_direction(learner, at))  # type: ignore[misc]
        _two_forwards(learner)
        own_s = _seconds(lambda at=number: learner.apply([_records(0, at, 1)]))  # type: ignore[misc]
        others_s = sum(
            _seconds(lambda log=log, at=number: learner.apply([_records(log, at, BATCH_RECORDS)]))  # type: ignore[misc]
            for log in range(1, NODES)
        )
        beyond.append(100 * (probe_s / forwards_s - 1))
        making.append(100 * making_s / forwards_s)
        applying.append(100 * (own_s + others_s / BATCH_RECORDS) / forwards_s)
        both.append(making[-1] + applying[-1])
    replay = [_replayed_per_s(learner, number) for number in range(repeats)]
    parameters = sum(tensor.numel() for tensor in learner.weights().values())
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in learner.weights().values()}
    held_bytes = learner.state.values.nbytes
    held_bytes += sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    name = f"one byte, {parameters / 1e6:.1f} M parameters, {BATCH} x {CONTEXT} tokens"
    return [
        # The first round warms the caches.
        Figure(f"{name}: a probe beyond two forwards", "%", tuple(beyond[1:])),
        Figure("  making its direction / two forwards", "%", tuple(making[1:])),
        Figure(f"  applying the records of {NODES} nodes / two forwards", "%", tuple(applying[1:])),
        Figure("  making and applying", "%", tuple(both[1:]), at_most=10),
        Figure("  records replayed on one core", "/s", tuple(replay), at_least=500),
        Figure("  state and weights / fp32 model", "x", (held_bytes / (4 * parameters),), at_most=2.1),
    ]


def _learner() -> OneByteLearner:
    spec = parse_run_spec(SPEC)
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


def _make_direction(learner: OneByteLearner, number: int) -> None:
    grid = learner.state.grid
    key = KeySequence(bytes(32), LOGS[0]).key(number)
    words = direction_words([key], 0, grid.words, torch.device("cpu"))
    for _ in range(2):
        for span in grid.spans:
            signs_of(words[:, span.start // SIGNS_PER_WORD : -(-span.stop // SIGNS_PER_WORD)])


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
