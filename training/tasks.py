"""What there is to learn: a model, batches of inputs and targets for it, and what it is measured on.

Owns the registries of models and data: the one place where a kind in a run spec becomes an object. Every task is one
of classification, of the next byte or token or of an example, so that loss and accuracy mean the same in all of them
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
from training.data import Corpus
from training.huggingface import Pretrained
from training.labelled import Examples, LabelledBatches, LabelledData
from training.mlp import MLP
from training.model import GPT
from training.run_spec import RunSpec
from training.spec_sections import GptSpec, HuggingFaceSpec, MlpSpec, NpzDataSpec, TextDataSpec
from training.token_task import TokenTask
from training.windows import Batch, TextWindows, drawn_symbol

EVALUATION_TOKENS = 4096
"""Tokens in one forward pass of an evaluation; bounds its memory."""

EVALUATION_ACTIVATIONS = 1 << 22
"""Numbers in the widest layer in one forward pass of an evaluation of an MLP."""

Data: TypeAlias = Corpus | LabelledData


class TaskError(GossamerError):
    """The task of a run has no use for what was asked."""


class Task(Protocol):
    """A model and what it learns."""

    @property
    def model(self) -> nn.Module:
        """On the device of the task, as are its batches."""

    unit: str
    """What a target is, and a token of this task: a ``byte`` or a ``token`` of text, or an ``example``."""
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
    pretrained: Pretrained | None = None,
) -> Task:
    """What ``spec`` asks to learn from ``part`` of ``data``.

    ``seed`` decides the batches, ``generator`` the initial weights. ``pretrained`` is what a Hugging Face model is made
    of, which has no initial weights of its own. Raises DataError where there is too little data.
    """
    if isinstance(spec.model, HuggingFaceSpec):
        assert isinstance(data, Corpus), "a causal language model learns from text"
        assert pretrained is not None, "a run of a Hugging Face model starts from its base"
        return TokenTask(spec, spec.model, pretrained, data, part, seed, device)
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
        self._windows = TextWindows(
            corpus.part(part),
            corpus.held_out,
            unit=self.unit,
            context=model.context,
            batch=spec.train.batch,
            seed=seed,
            evaluation_rows=max(1, EVALUATION_TOKENS // model.context),
            device=device,
        )

    def batch(self, number: int) -> Batch:
        """Windows of the training text, and the same one byte further on."""
        return self._windows.batch(number)

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """The held-out text as windows that follow each other."""
        return self._windows.held_out(bytes_max)

    @torch.inference_mode()
    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """What the model writes; the same call gives the same bytes. ``temperature`` 0 takes the likeliest byte."""
        generator = torch.Generator().manual_seed(self._seed)
        text = list(prompt or b"\n")
        for _ in range(count):
            window_BT = torch.tensor([text[-self._context :]], device=self._device)
            logits_V = functional_call(self.model, weights, (window_BT,))[0, -1].cpu()
            text.append(drawn_symbol(logits_V, temperature, generator))
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
