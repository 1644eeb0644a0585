"""A model that learns from bytes: its state, what its own batches say about directions, and what records do to it.

Owns one node's integer state, the float weights that derive from it, and the probes on its own data. The state is a
pure function of the base weights and the set of records that were applied, whoever made them and in whatever order they
came (``training.integer_state``); probing never touches it. Not thread-safe: the caller runs one method at a time. It
never waits, never looks at a clock and knows no peers, only the names of logs.

Relies on: a record is applied once, and taken back only after that.
"""

from __future__ import annotations

import fnmatch
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from blake3 import blake3
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from training.base_weights import fault_of, shapes_of
from training.byte_code import decode, encode, rate_units
from training.directions import Key, KeySequence
from training.evaluation import held_out_accuracy, held_out_loss
from training.export import read_safetensors
from training.huggingface import Pretrained
from training.integer_state import IntegerState, Move
from training.probing import Prober
from training.run_spec import RunSpec
from training.spec_sections import OneByteSpec
from training.tasks import Data, Task, build_task
from training.trainer import Counter, bad_checkpoint, init_generator, resolve_device

CHECKPOINT_FORMAT = "one-byte-1"

POOL = b"pool"
"""Stands in the place of a log for the directions that all share; no log has so short a name."""

SEQUENCES_KEPT = 4096
"""Logs whose keys need not be derived again."""


class _Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a checkpoint; safetensors knows only strings."""

    format: str
    run: str
    grid: str
    step: Counter
    tokens: Counter
    applied: str


@dataclass(frozen=True, slots=True)
class RecordRun:
    """Consecutive records of one log, made at one clock."""

    log: bytes
    first: int
    """Sequence number of the first."""
    clock: int
    records: bytes


@dataclass(frozen=True, slots=True)
class Probed:
    """What a step of probes gave: a byte for each, and the mean of the losses they saw."""

    records: bytes
    loss: float


class RecordLearner(Protocol):
    """What a node in one-byte mode trains, as the node sees it. In life that is OneByteLearner."""

    @property
    def spec(self) -> RunSpec:
        """The run."""

    @property
    def step(self) -> int:
        """Minibatches probed on since the beginning of the run."""

    @property
    def tokens(self) -> int:
        """What they held."""

    def probe(self, log: bytes, first: int) -> Probed:
        """Probe the next minibatch: ``probes`` records, from number ``first`` of ``log`` on. Applies none of them."""

    def apply(self, come: Sequence[RecordRun], gone: Sequence[RecordRun] = ()) -> None:
        """Let the records of ``come`` move the weights, and take back those of ``gone``."""

    def size_of(self, run: RecordRun) -> float:
        """How far ``run`` moves each weight, all its steps together: step sizes times projected gradients."""

    def state_without(self, gone: Sequence[RecordRun]) -> bytes:
        """The state as it would be without the records of ``gone``: every number, little-endian."""

    def take_state(self, state: bytes) -> None:
        """Go on from a state that ``state_without`` gave, here or elsewhere. Raises ValueError."""

    @property
    def base_hash(self) -> bytes:
        """BLAKE3 of what ``state_without`` gives when no record is left."""

    def digest(self) -> bytes:
        """The state hash, 32 bytes."""

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are now, by name: views, of which nothing may be changed."""

    def evaluate(self, *, bytes_max: int | None = None) -> float:
        """Held-out loss of the weights."""

    def save(self, applied: str) -> bytes:
        """Everything needed to go on; ``applied`` says which records the state holds."""

    def applied_in(self, data: bytes) -> str:
        """What was said to ``save``, which returned ``data``. Raises CheckpointError for bytes that are of no use."""

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""


class OneByteLearner:
    """One node's model in one-byte mode. ``step`` counts the minibatches it has probed on since the run began."""

    def __init__(self, spec: RunSpec, task: Task, *, run: bytes, base: Mapping[str, Tensor]) -> None:
        """``base``: fp32 weights of the model, by name. Raises ValueError when they are not those of it, or none is
        trained."""
        assert isinstance(spec.one_byte, OneByteSpec)
        self.spec = spec
        self.step = 0
        self.tokens = 0
        self._one_byte: OneByteSpec = spec.one_byte
        self._run = run
        self.task = task
        self._rate = rate_units(self._one_byte.step_size, self._one_byte.clip)
        self._sequences: dict[bytes, KeySequence] = {}
        self._pool = KeySequence(run, POOL)
        parameters = dict(task.model.named_parameters())
        if fault := fault_of(base, shapes_of(task.model)):
            raise ValueError(fault)
        trained = {name: base[name] for name in parameters if self._is_trained(name)}
        if not trained:
            raise ValueError(f"no parameter has a name like {', '.join(self._one_byte.trained)}")
        device = next(iter(parameters.values())).device
        self.state = IntegerState.rounded(trained, device)
        self.base_hash = blake3(self.state.to_bytes()).digest()
        self._weights = torch.empty(self.state.grid.size, device=device)
        views = self.state.grid.views(self._weights)
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            if name in views:
                parameter.data = views[name]
            else:
                parameter.data.copy_(base[name])
        self.state.derive(self._weights)
        self._prober = Prober(task.model, self.state.grid, self._weights)

    def _is_trained(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._one_byte.trained)

    # --- records --------------------------------------------------------------------------------------------------

    def probe(self, log: bytes, first: int) -> Probed:
        """Probe the next minibatch: ``probes`` records, from number ``first`` of ``log`` on. Applies none of them."""
        inputs, targets = self.task.batch(self.step)
        losses: list[float] = []

        def loss() -> Tensor:
            logits = self.task.model(inputs)
            value = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
            losses.append(value.item())
            return value

        spec = self._one_byte
        slopes = [
            self._prober.slope(loss, self._key(log, first + number), spec.epsilon)
            for number in range(spec.probes)
        ]
        self.step += 1
        self.tokens += self.task.batch_tokens
        return Probed(
            bytes(encode(slope, spec.clip, spec.table) for slope in slopes), sum(losses) / len(losses)
        )

    def apply(self, come: Sequence[RecordRun], gone: Sequence[RecordRun] = ()) -> None:
        """Let the records of ``come`` move the weights, and take back those of ``gone``."""
        self.state.add([move for run in come for move in self._moves(run)], self._one_byte.table)
        self.state.subtract([move for run in gone for move in self._moves(run)], self._one_byte.table)
        self.state.derive(self._weights)

    def size_of(self, run: RecordRun) -> float:
        """How far ``run`` moves each weight, all its steps together: step sizes times projected gradients."""
        spec = self._one_byte
        halved = math.ldexp(spec.step_size, -bisect_right(spec.halvings, run.clock))
        return halved * sum(abs(decode(byte, spec.clip, spec.table)) for byte in run.records)

    def _moves(self, run: RecordRun) -> list[Move]:
        rate = self._rate >> bisect_right(self._one_byte.halvings, run.clock)
        return [
            Move(self._key(run.log, run.first + number), byte, rate)
            for number, byte in enumerate(run.records)
        ]

    def _key(self, log: bytes, number: int) -> Key:
        sequence = self._sequences.get(log)
        if sequence is None:
            if len(self._sequences) >= SEQUENCES_KEPT:
                self._sequences.clear()
            sequence = self._sequences[log] = KeySequence(self._run, log)
        if not self._one_byte.pool:
            return sequence.key(number)
        # A log goes through the pool in an order of its own: which direction it takes is as random as its keys.
        start = sequence.key(number)[0] % (1 << 64)
        return self._pool.key(start % self._one_byte.pool)

    def digest(self) -> bytes:
        """The state hash, 32 bytes: of everything that the records decide, and nothing else."""
        return self.state.digest()

    def state_without(self, gone: Sequence[RecordRun]) -> bytes:
        """The state as it would be without the records of ``gone``: every number, little-endian."""
        state = IntegerState(self.state.grid, self.state.values.clone())
        state.subtract([move for run in gone for move in self._moves(run)], self._one_byte.table)
        return state.to_bytes()

    def take_state(self, state: bytes) -> None:
        """Go on from a state that ``state_without`` gave, here or elsewhere. Raises ValueError."""
        self.state.take(state)
        self.state.derive(self._weights)

    # --- use ------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The weights that the model has now, by name: views, of which nothing may be changed."""
        return {name: parameter.data for name, parameter in self.task.model.named_parameters()}

    def evaluate(self, *, bytes_max: int | None = None) -> float:
        """Held-out loss of the weights, in fp32."""
        return held_out_loss(self.task, self.weights(), bytes_max)

    def accuracy(self) -> float:
        """The share of held-out targets that the weights find likeliest."""
        return held_out_accuracy(self.task, self.weights())

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, applied: str) -> bytes:
        """The state and the counters, as safetensors; ``applied`` says which records the state holds."""
        progress = _Progress(
            format=CHECKPOINT_FORMAT,
            run=self._run.hex(),
            grid=self.state.grid.digest.hex(),
            step=self.step,
            tokens=self.tokens,
            applied=applied,
        )
        metadata = {key: str(value) for key, value in msgspec.structs.asdict(progress).items()}
        return save({"state": self.state.values.cpu()}, metadata=metadata)

    def applied_in(self, data: bytes) -> str:
        """What was said to ``save``, which returned ``data``. Raises CheckpointError for bytes that are of no use."""
        return self._read(data)[0].applied

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""
        progress, values = self._read(data)
        self.state.values.copy_(values)
        self.state.derive(self._weights)
        self.step, self.tokens = progress.step, progress.tokens

    def _read(self, data: bytes) -> tuple[_Progress, Tensor]:
        try:
            tensors, metadata = read_safetensors(data)
            progress = msgspec.convert(metadata, _Progress, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise bad_checkpoint(str(error)) from error
        expected = (CHECKPOINT_FORMAT, self._run.hex(), self.state.grid.digest.hex())
        if (progress.format, progress.run, progress.grid) != expected:
            raise bad_checkpoint("it is of another run, base or version")
        values = tensors.get("state")
        if values is None or values.dtype != torch.int32 or values.shape != self.state.values.shape:
            raise bad_checkpoint("it holds no state of this model")
        return progress, values


def build_one_byte_task(
    spec: RunSpec,
    data: Data,
    *,
    run: bytes,
    peer: str,
    part: tuple[int, int] | None,
    device: str,
    threads: int | None,
    pretrained: Pretrained | None = None,
) -> Task:
    """What a node learns in one-byte mode; arguments and errors are those of ``training.trainer.Trainer``.

    Its model has the initial weights that all nodes draw alike, but for a Hugging Face model, made of ``pretrained``:
    that one's weights mean nothing before the base is in it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return build_task(
        spec,
        data,
        part=part,
        seed=run + peer.encode(),
        generator=init_generator(spec, peer),
        device=resolve_device(device),
        pretrained=pretrained,
    )
