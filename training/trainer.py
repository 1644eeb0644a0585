"""The inner loop of one node: the only writer of its live weights.

Owns the model, AdamW, the batch stream and the counters. Weights, gradients and both Adam moments are flat fp32
vectors in layout order, and the model's parameters are views of them, so a fragment is read or changed with one copy.
Not thread-safe: the caller runs one method at a time. It never waits, never looks at a clock and knows no peers.

Invariants: no non-finite value enters the weights, neither from a gradient nor from a caller. On the CPU, with the
same number of threads, a trainer loaded from a checkpoint goes on bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Annotated, Any

import msgspec
import torch
from blake3 import blake3
from msgspec import Meta
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from p2p.errors import GossamerError
from training.data import BatchStream, Corpus
from training.export import read_safetensors
from training.layout import ParameterLayout
from training.learner import SliceReport
from training.model import GPT
from training.run_spec import OptimizerSpec, RunSpec

CHECKPOINT_FORMAT = "1"
EVALUATION_TOKENS = 4096
"""Tokens in one forward pass of an evaluation; bounds its memory."""

Counter = Annotated[int, Meta(ge=0, le=2**62)]

_DECAYED = ("weight", "embedding")


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
    position: Counter


class Trainer:
    """One node's model in training. ``step`` and ``tokens`` count since the beginning of the run."""

    def __init__(
        self,
        spec: RunSpec,
        corpus: Corpus,
        *,
        run: bytes,
        peer: str,
        part: tuple[int, int] | None,
        device: str,
        threads: int | None,
    ) -> None:
        """``part = (k, n)`` trains on the k-th of n parts; ``threads`` sets torch's, for the whole process.

        Raises DeviceError for a device this machine lacks and DataError for a text that is too short.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec
        self.corpus = corpus.evaluated_on(spec.data.held_out_bytes)
        self.device = resolve_device(device)
        self.step = 0
        self.tokens = 0
        self._run = run
        context = spec.model.context
        self._stream = BatchStream(
            corpus.part(part), seed=run + peer.encode(), batch=spec.train.batch, context=context
        )
        self._held_out_windows = self.corpus.held_out_windows(context)
        self._model = GPT(spec.model, _init_generator(spec, peer)).to(self.device)
        self.layout = ParameterLayout.of(self._model, spec.exchange.fragments)
        self._live = torch.zeros(self.layout.total, device=self.device)
        self._gradient = torch.zeros_like(self._live)
        self._mean = torch.zeros_like(self._live)
        self._square = torch.zeros_like(self._live)
        self._optimizer = self._bind()
        self._reduced = self.device.type == "cuda" and spec.train.precision == "auto"

    def _bind(self) -> torch.optim.AdamW:
        """Make parameters, gradients and moments views of the flat vectors."""
        parameters = dict(self._model.named_parameters())
        live, gradient = self.layout.views(self._live), self.layout.views(self._gradient)
        for name, parameter in parameters.items():
            live[name].copy_(parameter.detach())
            parameter.data = live[name]
            parameter.grad = gradient[name]
        optimizer_spec = self.spec.optimizer
        kinds = {span.name: span.kind for span in self.layout.spans}
        decayed = [parameters[name] for name in parameters if kinds[name] in _DECAYED]
        others = [parameters[name] for name in parameters if kinds[name] not in _DECAYED]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups,
            betas=(optimizer_spec.beta1, optimizer_spec.beta2),
            weight_decay=optimizer_spec.weight_decay,
            fused=True,
        )
        mean, square = self.layout.views(self._mean), self.layout.views(self._square)
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": mean[name],
                "exp_avg_sq": square[name],
            }
        return optimizer

    # --- training -------------------------------------------------------------------------------------------------

    def run_slice(self, steps: int) -> SliceReport:
        """Take ``steps`` inner steps. The loss is read back once, at the end, so that a GPU is kept busy."""
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self._take_step()
        tokens = steps * self.spec.train.batch * self.spec.model.context
        self.tokens += tokens
        return SliceReport(steps, tokens, total.item() / steps)

    def _take_step(self) -> Tensor:
        window_BT = torch.from_numpy(self._stream.next()).to(self.device, non_blocking=True).long()
        self._gradient.zero_()
        with torch.autocast("cuda", torch.bfloat16) if self._reduced else contextlib.nullcontext():
            logits_BTV = self._model(window_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), window_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.spec.optimizer, self.spec.train.steps, self.step)
        self._optimizer.step()
        self.step += 1
        return loss.detach()

    def _clip(self) -> None:
        """Scale the gradient to at most ``clip_norm``; one that is not finite becomes zero, without asking the GPU."""
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((self.spec.optimizer.clip_norm / (norm + 1e-6)).clamp_(max=1.0))
        self._gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    # --- weights --------------------------------------------------------------------------------------------------

    def read(self, fragment: int | None = None) -> Tensor:
        """A CPU copy of the live weights, or of one fragment of them: flat fp32 in layout order."""
        return self._slot(fragment).to("cpu", copy=True)

    def add(self, fragment: int | None, delta: Tensor) -> None:
        """Add ``delta`` to the live weights, or to one fragment. Raises ValueError unless every element is finite."""
        slot = self._slot(fragment)
        _check_values(delta, slot.numel())
        slot.add_(delta.to(self.device))

    def write(self, values: Tensor) -> None:
        """Replace the live weights. Raises ValueError unless every element is finite."""
        _check_values(values, self.layout.total)
        self._live.copy_(values)

    def _slot(self, fragment: int | None) -> Tensor:
        return self._live if fragment is None else self.layout.cut(self._live, fragment)

    # --- use ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, values: Tensor | None = None, *, bytes_max: int | None = None) -> float:
        """Held-out loss in nats per byte of the live weights, or of flat ``values``, in fp32.

        Reads the same windows on every node: all of the held-out text that the spec allows, or ``bytes_max`` of it.
        """
        weights = self._weights(values)
        context = self.spec.model.context
        windows = self._held_out_windows
        if bytes_max is not None:
            windows = windows[: max(1, bytes_max // context)]
        rows = max(1, EVALUATION_TOKENS // context)
        total = 0.0
        for start in range(0, len(windows), rows):
            window_BT = torch.from_numpy(windows[start : start + rows].copy()).to(self.device).long()
            logits_BTV = functional_call(self._model, weights, (window_BT[:, :-1],))
            total += F.cross_entropy(
                logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten(), reduction="sum"
            ).item()
        return total / (len(windows) * context)

    @torch.inference_mode()
    def sample(self, prompt: bytes, count: int, temperature: float, values: Tensor | None = None) -> bytes:
        """``count`` bytes that the model writes after ``prompt``; the same call gives the same bytes.

        ``temperature`` 0 always takes the likeliest byte.
        """
        weights = self._weights(values)
        generator = torch.Generator().manual_seed(self.spec.seed)
        text = list(prompt or b"\n")
        for _ in range(count):
            window_BT = torch.tensor([text[-self.spec.model.context :]], device=self.device)
            logits_V = functional_call(self._model, weights, (window_BT,))[0, -1].cpu()
            if temperature > 0:
                text.append(
                    int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
                )
            else:
                text.append(int(logits_V.argmax()))
        return bytes(text[len(text) - count :])

    def _weights(self, values: Tensor | None) -> dict[str, Tensor]:
        return self.layout.views(self._live if values is None else values.to(self.device))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Everything needed to go on: weights, Adam moments, counters and the place in the stream, as safetensors."""
        progress = _Progress(
            format=CHECKPOINT_FORMAT,
            run=self._run.hex(),
            layout=self.layout.digest.hex(),
            step=self.step,
            tokens=self.tokens,
            position=self._stream.position,
        )
        vectors = {name: vector.cpu() for name, vector in self._vectors().items()}
        return save(vectors, metadata=_as_text(progress))

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""
        try:
            vectors, metadata = read_safetensors(data)
            progress = msgspec.convert(metadata, _Progress, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise _bad_checkpoint(str(error)) from error
        if (progress.format, progress.run, progress.layout) != (
            CHECKPOINT_FORMAT,
            self._run.hex(),
            self.layout.digest.hex(),
        ):
            raise _bad_checkpoint("it is of another run, model or version")
        own = self._vectors()
        if vectors.keys() != own.keys():
            raise _bad_checkpoint(f"it holds {', '.join(sorted(vectors)) or 'nothing'}")
        for name, vector in vectors.items():
            if vector.dtype != torch.float32:
                raise _bad_checkpoint(f"{name} is {vector.dtype}")
            try:
                _check_values(vector, self.layout.total)
            except ValueError as error:
                raise _bad_checkpoint(f"{name}: {error}") from error
        if bool((vectors["adam_square"] < 0).any()):
            raise _bad_checkpoint("adam_square has a negative element")
        for name, vector in vectors.items():
            own[name].copy_(vector)
        self.step, self.tokens, self._stream.position = progress.step, progress.tokens, progress.position
        for state in self._optimizer.state.values():
            state["step"].fill_(float(self.step))

    def _vectors(self) -> dict[str, Tensor]:
        return {"weights": self._live, "adam_mean": self._mean, "adam_square": self._square}


def learning_rate(spec: OptimizerSpec, steps: int, step: int) -> float:
    """The rate of 0-based ``step`` of ``steps``: a linear warm-up, then a cosine to ``min_rate_fraction``."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, steps - spec.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return spec.learning_rate * (spec.min_rate_fraction + (1 - spec.min_rate_fraction) * cosine)


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


def _init_generator(spec: RunSpec, peer: str) -> torch.Generator:
    author = peer if spec.init == "per-peer" else ""
    seed = blake3(f"gossamer/init/{spec.seed}/{author}".encode()).digest(length=8)
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


def _check_values(values: Tensor, count: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"shape {tuple(values.shape)}, expected ({count},)")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("an element is not finite")


def _as_text(progress: _Progress) -> dict[str, str]:
    return {key: str(value) for key, value in msgspec.structs.asdict(progress).items()}


def _bad_checkpoint(reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot go on from this checkpoint: {reason}",
        why="training must not continue from weights that may be damaged",
        fix="the node tries the checkpoint before it; without one it starts from the last merged model",
    )
