"""A device against arithmetic: a small product and its gradients, compared with the same in fp64 on the CPU.

Owns the inputs, which are the same everywhere. ``python -m training.self_test DEVICE`` prints the outcome as JSON, in a
process of its own, since a broken driver takes the process along that wakes it.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch

from p2p.errors import GossamerError
from training.trainer import resolve_device

ROWS, INNER, COLUMNS = 64, 256, 96


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    device: str
    name: str
    """What its maker calls it."""
    error: float
    """The largest difference over the largest value; infinite where anything is not finite."""
    seconds: float


def self_test(device: torch.device) -> SelfTest:
    """Compute on ``device``. Raises whatever torch raises."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(ROWS, INNER, generator=generator)
    right = torch.randn(INNER, COLUMNS, generator=generator)
    began_s = time.perf_counter()
    tried = [tensor.double().cpu() for tensor in _product_and_gradients(left.to(device), right.to(device))]
    seconds = time.perf_counter() - began_s
    exact = _product_and_gradients(left.double(), right.double())
    errors = [
        float((a - b).abs().max() / b.abs().max()) if bool(a.isfinite().all()) else float("inf")
        for a, b in zip(tried, exact, strict=True)
    ]
    return SelfTest(device=str(device), name=_name(device), error=max(errors), seconds=seconds)


def _product_and_gradients(left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
    left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
    product = left @ right
    return [product.detach(), *torch.autograd.grad(product.square().mean(), (left, right))]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    """Test the device that the command line names."""
    try:
        outcome: object = {"result": self_test(resolve_device(sys.argv[1]))}
    except GossamerError as error:
        outcome = {"error": {"what": error.what, "why": error.why, "fix": error.fix}}
    except RuntimeError as error:
        outcome = {"error": {"what": f"{sys.argv[1]}: {error}", "why": "", "fix": ""}}
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    main()
