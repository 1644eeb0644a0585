"""The inner loop of one node: the only writer of its live weights.

Owns the weights, the gradient, the optimizer and the counters; what is learned is a ``training.tasks`` Task. Weights,
gradient and the optimizer's state are flat fp32 vectors in layout order, and the model's parameters are views of them,
so a fragment is read or changed with one copy. Not thread-safe: the caller runs one method at a time. It never waits,
never looks at a clock and knows no peers.

Invariants: no non-finite value enters the weights, neither from a gradient nor from a caller. On the CPU, with the
same number of threads, a trainer loaded from a checkpoint goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Annotated

import msgspec
import torch
from blake3 import blake3
from msgspec import Meta
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from p2p.errors import GossamerError
from training.evaluation import held_out_accuracy, held_out_loss
from training.export import read_safetensors
from training.layout import ParameterLayout
from training.learner import SliceReport, check_values
from training.optimizers import build_optimizer, learning_rate
from training.run_spec import RunSpec
from training.tasks import Data, build_task

CHECKPOINT_FORMAT = "2"

Counter = Annotated[int, Meta(ge=0, le=2**62)]


class DeviceError(GossamerError):
    """The device asked for does not exist on this machine."""


class CheckpointError(GossamerError):
    """Checkpoint bytes that are damaged, or of another run or model."""


class _Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a checkpoint; safetensors knows only strings."""

    format: str
    run: str
    layout: str
    step: Counter
    tokens: Counter


class Trainer:
    """One node's model in training (``training.learner``). ``step`` and ``tokens`` count since the run began."""

    def __init__(
        self,
        spec: RunSpec,
        data: Data,
        *,
        run: bytes,
        peer: str,
        part: tuple[int, int] | None,
        device: str,
        threads: int | None,
    ) -> None:
        """``part = (k, n)`` trains on the k-th of n parts; ``threads`` sets torch's, for the whole process.

        Raises DeviceError for a device this machine lacks and DataError where there is too little data.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec
        self.device = resolve_device(device)
        self.step = 0
        self.tokens = 0
        self._run = run
        self.task = build_task(
            spec,
            data,
            part=part,
            seed=run + peer.encode(),
            generator=init_generator(spec, peer),
            device=self.device,
        )
        self._model = self.task.model
        self.layout = ParameterLayout.of(self._model, spec.exchange.fragments)
        self._live = torch.zeros(self.layout.total, device=self.device)
        self._gradient = torch.zeros_like(self._live)
        self._bind()
        self._optimizer = build_optimizer(spec.optimizer, self.layout, self._live, self._gradient)
        self._reduced = self.device.type == "cuda" and spec.train.precision == "auto"

    def _bind(self) -> None:
        """Make parameters and gradients views of the flat vectors."""
        live, gradient = self.layout.views(self._live), self.layout.views(self._gradient)
        for name, parameter in self._model.named_parameters():
            live[name].copy_(parameter.detach())
            parameter.data = live[name]
            parameter.grad = gradient[name]

    @property
    def unit(self) -> str:
        """What ``tokens`` counts and a loss is per: ``byte`` or ``example``."""
        return self.task.unit

    # --- training -------------------------------------------------------------------------------------------------

    def run_slice(self, steps: int) -> SliceReport:
        """Take ``steps`` inner steps. The loss is read back once, at the end, so that a GPU is kept busy."""
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self._take_step()
        tokens = steps * self.task.batch_tokens
        self.tokens += tokens
        return SliceReport(steps, tokens, total.item() / steps)

    def _take_step(self) -> Tensor:
        inputs, targets = self.task.batch(self.step)
        self._gradient.zero_()
        with torch.autocast("cuda", torch.bfloat16) if self._reduced else contextlib.nullcontext():
            logits = self._model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip()
        self._optimizer.take_step(learning_rate(self.spec.optimizer, self.spec.train.steps, self.step))
        self.step += 1
        return loss.detach()

    def _clip(self) -> None:
        """Scale the gradient to at most ``clip_norm``; one whose norm is not finite becomes zero."""
        clip_norm = self.spec.optimizer.clip_norm
        norm = torch.linalg.vector_norm(self._gradient)
        if self.device.type != "cpu":
            # Without asking the device, which would wait for it.
            self._gradient.mul_((clip_norm / norm).clamp_(max=1.0))
            self._gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        elif not math.isfinite(norm_here := norm.item()):
            self._gradient.zero_()
        elif norm_here > clip_norm:
            self._gradient.mul_(clip_norm / norm_here)

    # --- weights --------------------------------------------------------------------------------------------------

    def read(self, fragment: int | None = None) -> Tensor:
        """A CPU copy of the live weights, or of one fragment of them: flat fp32 in layout order."""
        return self._slot(fragment).to("cpu", copy=True)

    def add(self, fragment: int | None, delta: Tensor) -> None:
        """Add ``delta`` to the live weights, or to one fragment. Raises ValueError unless every element is finite."""
        slot = self._slot(fragment)
        check_values(delta, slot.numel())
        slot.add_(delta.to(self.device))

    def write(self, values: Tensor) -> None:
        """Replace the live weights. Raises ValueError unless every element is finite."""
        check_values(values, self.layout.total)
        self._live.copy_(values)

    def _slot(self, fragment: int | None) -> Tensor:
        return self._live if fragment is None else self.layout.cut(self._live, fragment)

    # --- use ------------------------------------------------------------------------------------------------------

    def evaluate(self, values: Tensor | None = None, *, bytes_max: int | None = None) -> float:
        """Held-out loss of the live weights, or of flat ``values``, in fp32: nats per byte of text, or per example.

        Reads the same on every node that has the same held out: all that the spec allows, or ``bytes_max`` of it.
        """
        return held_out_loss(self.task, self._weights(values), bytes_max)

    def accuracy(self, values: Tensor | None = None) -> float:
        """The share of held-out targets, bytes or examples, that the live weights, or ``values``, find likeliest."""
        return held_out_accuracy(self.task, self._weights(values))

    @torch.inference_mode()
    def _weights(self, values: Tensor | None) -> dict[str, Tensor]:
        return self.layout.views(self._live if values is None else values.to(self.device))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Everything needed to go on: weights, the optimizer's state and the counters, as safetensors."""
        progress = _Progress(
            format=CHECKPOINT_FORMAT,
            run=self._run.hex(),
            layout=self.layout.digest.hex(),
            step=self.step,
            tokens=self.tokens,
        )
        vectors = {name: vector.cpu() for name, vector in self._vectors().items()}
        return save(vectors, metadata=_as_text(progress))

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""
        try:
            vectors, metadata = read_safetensors(data)
            progress = msgspec.convert(metadata, _Progress, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise bad_checkpoint(str(error)) from error
        if (progress.format, progress.run, progress.layout) != (
            CHECKPOINT_FORMAT,
            self._run.hex(),
            self.layout.digest.hex(),
        ):
            raise bad_checkpoint("it is of another run, model or version")
        own = self._vectors()
        if vectors.keys() != own.keys():
            raise bad_checkpoint(f"it holds {', '.join(sorted(vectors)) or 'nothing'}")
        for name, vector in vectors.items():
            if vector.dtype != torch.float32:
                raise bad_checkpoint(f"{name} is {vector.dtype}")
            try:
                check_values(vector, self.layout.total)
            except ValueError as error:
                raise bad_checkpoint(f"{name}: {error}") from error
        if fault := self._optimizer.fault_of(vectors):
            raise bad_checkpoint(fault)
        for name, vector in vectors.items():
            own[name].copy_(vector)
        self.step, self.tokens = progress.step, progress.tokens
        self._optimizer.resume(self.step)

    def _vectors(self) -> dict[str, Tensor]:
        return {"weights": self._live, **self._optimizer.state}


def resolve_device(name: str) -> torch.device:
    """The device ``name`` means here: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. Raises DeviceError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    asked = re.fullmatch(r"(cpu|cuda|mps)(?::([0-9]{1,3}))?", name)
    if asked is None or int(asked[2] or 0) >= present[asked[1]]:
        raise DeviceError(
            f"there is no device {name} here",
            why=", ".join(f"{count} {kind}" for kind, count in present.items() if count) + " found",
            fix="set device = auto in config.toml, or pass --device cpu",
        )
    return torch.device(name)


def init_generator(spec: RunSpec, peer: str) -> torch.Generator:
    """What decides the initial weights of ``peer``."""
    author = peer if spec.init == "per-peer" else ""
    seed = blake3(f"gossamer/init/{spec.seed}/{author}".encode()).digest(length=8)
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


def _as_text(progress: _Progress) -> dict[str, str]:
    return {key: str(value) for key, value in msgspec.structs.asdict(progress).items()}


def bad_checkpoint(reason: str) -> CheckpointError:
    """The error for checkpoint bytes that are of no use, and why."""
    return CheckpointError(
        f"cannot go on from this checkpoint: {reason}",
        why="training must not continue from weights that may be damaged",
        fix="the node tries the checkpoint before it; without one it starts from the last merged model",
    )
