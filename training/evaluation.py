"""What weights are worth on what is held out of a task.

Owns the two measures that people read, loss and accuracy, alike for every mode of training. Changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from training.tasks import Task


@torch.inference_mode()
def held_out_loss(task: Task, weights: dict[str, Tensor], bytes_max: int | None) -> float:
    """Mean loss in fp32 over what is held out, or about ``bytes_max`` of it: nats per target, whatever that is."""
    total, count = 0.0, 0
    for inputs, targets in task.held_out(bytes_max):
        logits = functional_call(task.model, weights, (inputs,))
        total += F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return total / count


@torch.inference_mode()
def held_out_accuracy(task: Task, weights: dict[str, Tensor]) -> float:
    """The share of held-out targets that are found likeliest."""
    right, count = 0, 0
    for inputs, targets in task.held_out(None):
        logits = functional_call(task.model, weights, (inputs,))
        right += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return right / count
