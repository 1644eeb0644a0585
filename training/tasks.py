"""What there is to learn: a model, batches of inputs and targets for it, and what it is measured on.

Owns the registries of models and data: the one place where a kind in a run spec becomes an object. Every task is one
of classification, of the next byte or of an example, so that loss and accuracy mean the same in all of them
(``training.trainer``). Holds no training state: a batch is a pure function of its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from p2p.errors import GossamerError
from training.data import Corpus, TextBatches
from training.labelled import Examples, LabelledBatches, LabelledData
from training.mlp import MLP
from training.model import GPT
from training.run_spec import GptSpec, MlpSpec, NpzDataSpec, RunSpec, TextDataSpec

EVALUATION_TOKENS = 4096
"""Tokens in one forward pass of an evaluation; bounds its memory."""

EVALUATION_ACTIVATIONS = 1 << 22
"""Numbers in the widest layer in one forward pass of an evaluation of an MLP."""

Data: TypeAlias = Corpus | LabelledData

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs of n rows and their targets, int64 (n, ...), for which the model gives logits (n, ..., classes)."""


class TaskError(GossamerError):
    """The task of a run has no use for what was asked."""


class Task(Protocol):
    """A model and what it learns."""

    @property
    def model(self) -> nn.Module:
        """On the device of the task, as are its batches."""

    unit: str
    """What a target is, and a token of this task: a ``byte`` of text, or an ``example``."""
    batch_tokens: int
    """Targets in a batch."""
    held_out_bytes: int
    held_out_digest: bytes
    """Tells whether two nodes evaluate on the same bytes."""

    def batch(self, number: int) -> Batch:
        """Batch ``number``, of which it is a pure function."""

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """All that is held out, or about ``bytes_max`` of it, in pieces."""

    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """``count`` bytes that the model writes after ``prompt``. Raises TaskError if it writes none."""


def load_data(spec: RunSpec, path: Path | None) -> Data:
    """What ``spec`` says is learned from; ``path`` is where this node's own lies. Raises DataError."""
    if isinstance(spec.model, MlpSpec):
        return LabelledData.load(path, inputs=spec.model.inputs, classes=spec.model.classes)
    return Corpus.load("text" if isinstance(spec.data, TextDataSpec) else "stdlib", path)


def build_task(
    spec: RunSpec,
    data: Data,
    *,
    part: tuple[int, int] | None,
    seed: bytes,
    generator: torch.Generator,
    device: torch.device,
) -> Task:
    """What ``spec`` asks to learn from ``part`` of ``data``.

    ``seed`` decides the batches, ``generator`` the initial weights. Raises DataError where there is too little data.
    """
    if isinstance(spec.model, GptSpec):
        assert isinstance(data, Corpus), "a GPT learns from text"
        return TextTask(spec, spec.model, data, part, seed, generator, device)
    assert isinstance(data, LabelledData), "an MLP learns from labelled examples"
    return LabelledTask(spec, spec.model, data, part, seed, generator, device)


class TextTask:
    """A byte-level GPT learns to tell the next byte."""

    def __init__(
        self,
        spec: RunSpec,
        model: GptSpec,
        corpus: Corpus,
        part: tuple[int, int] | None,
        seed: bytes,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        assert not isinstance(spec.data, NpzDataSpec)
        corpus = corpus.evaluated_on(spec.data.held_out_bytes)
        self.model = GPT(model, generator).to(device)
        self.unit = "byte"
        self.batch_tokens = spec.train.batch * model.context
        self.held_out_bytes = len(corpus.held_out)
        self.held_out_digest = corpus.held_out_digest
        self._context = model.context
        self._seed = spec.seed
        self._device = device
        self._batches = TextBatches(
            corpus.part(part), seed=seed, batch=spec.train.batch, context=model.context
        )
        self._windows = corpus.held_out_windows(model.context)

    def batch(self, number: int) -> Batch:
        """Windows of the training text, and the same one byte further on."""
        window_BT = torch.from_numpy(self._batches.at(number)).to(self._device, non_blocking=True).long()
        return window_BT[:, :-1], window_BT[:, 1:]

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """The held-out text as windows that follow each other."""
        windows = self._windows
        if bytes_max is not None:
            windows = windows[: max(1, bytes_max // self._context)]
        rows = max(1, EVALUATION_TOKENS // self._context)
        for start in range(0, len(windows), rows):
            window_BT = torch.from_numpy(windows[start : start + rows].copy()).to(self._device).long()
            yield window_BT[:, :-1], window_BT[:, 1:]

    @torch.inference_mode()
    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """What the model writes; the same call gives the same bytes. ``temperature`` 0 takes the likeliest byte."""
        generator = torch.Generator().manual_seed(self._seed)
        text = list(prompt or b"\n")
        for _ in range(count):
            window_BT = torch.tensor([text[-self._context :]], device=self._device)
            logits_V = functional_call(self.model, weights, (window_BT,))[0, -1].cpu()
            if temperature > 0:
                text.append(
                    int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
                )
            else:
                text.append(int(logits_V.argmax()))
        return bytes(text[len(text) - count :])


class LabelledTask:
    """An MLP learns to tell the class of an example."""

    def __init__(
        self,
        spec: RunSpec,
        model: MlpSpec,
        data: LabelledData,
        part: tuple[int, int] | None,
        seed: bytes,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        assert isinstance(spec.data, NpzDataSpec)
        data = data.evaluated_on(spec.data.held_out_examples)
        self.model = MLP(model, generator).to(device)
        self.unit = "example"
        self.batch_tokens = spec.train.batch
        self.held_out_bytes = len(data.held_out) * data.held_out.example_bytes
        self.held_out_digest = data.held_out_digest
        self._device = device
        self._batches = LabelledBatches(
            data.part(part), seed=seed, batch=spec.train.batch, preference=data.preference
        )
        self._held_out = data.held_out
        self._rows = EVALUATION_ACTIVATIONS // max(model.widths)

    def batch(self, number: int) -> Batch:
        """Examples and their classes."""
        return self._tensors(self._batches.at(number))

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """The held-out examples in their order."""
        count = len(self._held_out)
        if bytes_max is not None:
            count = min(count, max(1, bytes_max // self._held_out.example_bytes))
        for start in range(0, count, self._rows):
            yield self._tensors(self._held_out.take(slice(start, min(count, start + self._rows))))

    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """Refused: there is no text in this task."""
        raise TaskError(
            "this run's model writes no text",
            why="it tells the classes of examples",
            fix="measure it instead: gossamer evaluate",
        )

    def _tensors(self, examples: Examples) -> Batch:
        x_BD = torch.from_numpy(examples.x).to(self._device, non_blocking=True)
        y_B = torch.from_numpy(examples.y).to(self._device, non_blocking=True)
        return x_BD, y_B
