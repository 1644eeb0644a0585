"""A learner of one-byte mode whose losses are drawn: the question is which records count, not what they teach.

Owns a task with one small tensor and random examples. Directions, bytes, state and checkpoints are the product's own
(``training.one_byte``), so that a state hash means here what it means in life.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from blake3 import blake3
from torch import Tensor, nn

from training.one_byte import OneByteLearner
from training.run_spec import RunSpec
from training.tasks import TaskError
from training.windows import Batch

PARAMETERS = 96


class _Line(nn.Module):
    """Logits of two classes, a linear function of the input: the smallest model that has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, PARAMETERS).view(2, PARAMETERS // 2))

    def forward(self, x_BD: Tensor) -> Tensor:
        out: Tensor = x_BD @ self.weight.T
        return out


class SketchedTask:
    """Random examples of random classes: there is nothing to learn, and every probe says something."""

    unit = "example"
    batch_tokens = 1
    held_out_bytes = 4 * PARAMETERS // 2
    held_out_digest = bytes(32)

    def __init__(self, peer: str) -> None:
        self.model: nn.Module = _Line()
        self._peer = peer

    def batch(self, number: int) -> Batch:
        """One example, drawn by the peer and the number."""
        drawn = blake3(f"{self._peer}/{number}".encode()).digest(length=PARAMETERS // 2 + 1)
        x_BD = torch.frombuffer(bytearray(drawn[1:]), dtype=torch.uint8).float().view(1, -1) / 64 - 2
        return x_BD, torch.tensor([drawn[0] % 2])

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """One example, the same everywhere."""
        yield torch.ones(1, PARAMETERS // 2), torch.tensor([0])

    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """Refused: there is no text."""
        raise TaskError("this model writes no text", why="it stands in for one", fix="run a real one")


def sketched_learner(spec: RunSpec, run: bytes, peer: str) -> OneByteLearner:
    """The learner of one machine."""
    task = SketchedTask(peer)
    base = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
    return OneByteLearner(spec, task, run=run, base=base)
