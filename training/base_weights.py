"""The weights that a run in one-byte mode starts from, as bytes that every node agrees on.

Owns their canonical form, all tensors in fp32, little-endian, one after the other in the order of their names, and the
way from a safetensors file to it. Nothing is converted: a checkpoint of another dtype has to be made fp32 by whoever
knows what it is, since all nodes must come to the same bits.

Relies on: ``training.export`` for reading safetensors, which may be anyone's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from p2p.errors import GossamerError
from training.export import read_safetensors

Shapes = Mapping[str, tuple[int, ...]]


class BaseError(GossamerError):
    """Base weights that are missing, unreadable or not those of the run."""


def base_to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """The canonical bytes of fp32 ``weights``."""
    return b"".join(
        weights[name].detach().cpu().contiguous().view(-1).numpy().astype("<f4").tobytes()
        for name in sorted(weights)
    )


def base_from_bytes(data: bytes, shapes: Shapes) -> dict[str, Tensor]:
    """The weights of a model of ``shapes`` whose canonical bytes are ``data``. Raises BaseError."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if len(data) != 4 * sum(sizes.values()):
        raise _unusable(f"{len(data):,} bytes, the model takes {4 * sum(sizes.values()):,}")
    values = torch.frombuffer(bytearray(data), dtype=torch.float32)
    weights, start = {}, 0
    for name in sorted(sizes):
        weights[name] = values[start : start + sizes[name]].view(shapes[name])
        start += sizes[name]
    if fault := fault_of(weights, shapes):
        raise _unusable(fault)
    return weights


def load_base(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """The weights in a safetensors file, such as ``gossamer export`` writes. Raises BaseError."""
    try:
        weights, _ = read_safetensors(path.read_bytes())
    except OSError as error:
        raise _unusable(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _unusable(f"{path} is {error}") from error
    if fault := fault_of(weights, shapes):
        raise _unusable(f"{path}: {fault}")
    return weights


def fault_of(weights: Mapping[str, Tensor], shapes: Shapes) -> str:
    """Why ``weights`` cannot be the base of a model of ``shapes``; empty when they can."""
    for name in sorted(weights.keys() ^ shapes.keys()):
        return f"the base {'lacks' if name in shapes else 'has a tensor'} {name}"
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            return f"{name} has shape {tuple(weights[name].shape)} in the base, {shape} in the model"
        if weights[name].dtype != torch.float32:
            return f"{name} is {weights[name].dtype} in the base, and must be torch.float32"
        if not bool(torch.isfinite(weights[name]).all()):
            return f"{name} has an element that is not finite"
    return ""


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _unusable(reason: str) -> BaseError:
    return BaseError(
        f"cannot start from these weights: {reason}",
        why="all nodes of a run in one-byte mode start from the same bits",
        fix="export them from the run that trained them: gossamer export --out base.safetensors",
    )
