"""One-byte mode on every device that this machine has: known answers, so that no two machines ever differ."""

from __future__ import annotations

import pytest
import torch

from training.byte_code import rate_units
from training.directions import KeySequence, direction_words, signs_of
from training.integer_state import IntegerState, Move

DEVICES = ["cpu"] + [f"cuda:{number}" for number in range(torch.cuda.device_count())]

SEQUENCE = KeySequence(bytes(range(32)), b"a log of 16 byte")
SHAPES = {
    "layers.0.weight": (96, 70),
    "layers.0.bias": (70,),
    "embedding": (40, 33),
    "scale": (1,),
    "none": (3, 5),
}
SIZES = {"layers.0.weight": 0.3, "layers.0.bias": 1e-4, "embedding": 7.0, "scale": 250.0, "none": 0.0}

WORDS = [
    ["1932b19802a4a600", "0bf98a32a77309c6", "d5f20c814c980c09"],
    ["6f28e464cd0fc49a", "604ab1b4b67b8955", "379af873bace696c"],
    ["437b9177333a8a1c", "0653579808d0bfe1", "3080f0ef86987bc9"],
]
EMPTY = "e442a1bdc6ad5444acc801f7fa0ee4d118e5609a5c0372796db4164021679148"
FEW = "63c8e1623a3bb804a9f55eeddc036a1731540adf33073d96314c6c12c15b302b"
MANY = "9bc3bce51a4551b6a6b0c3d06eb37ceba0c6890240fe5c5600ec4e9f925ce7cb"


def fresh(device: str) -> IntegerState:
    base = {
        name: torch.linspace(
            -SIZES[name], SIZES[name], torch.Size(shape).numel(), dtype=torch.float64
        ).float()
        for name, shape in SHAPES.items()
    }
    shaped = {name: tensor.view(SHAPES[name]) for name, tensor in base.items()}
    return IntegerState.rounded(shaped, torch.device(device))


def moves(count: int) -> list[Move]:
    rates = (rate_units(1e-4, 10.0), rate_units(3e-3, 10.0))
    return [Move(SEQUENCE.key(7 * n), (37 * n + 5) % 256, rates[n % 2]) for n in range(count)]


@pytest.mark.parametrize("device", DEVICES)
def test_words_and_signs(device: str) -> None:
    keys = [SEQUENCE.key(number) for number in (0, 1, 2**33)]
    words = direction_words(keys, 1000, 3, torch.device(device)).cpu()
    assert [[f"{word % 2**64:016x}" for word in row] for row in words.tolist()] == WORDS
    signs = signs_of(direction_words(keys, 1000, 3, torch.device(device))).cpu()
    assert torch.equal(signs, signs_of(words))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "digest"), [(0, EMPTY), (5, FEW), (200, MANY)])
def test_the_state_after_so_many_records(device: str, count: int, digest: str) -> None:
    state = fresh(device)
    state.add(moves(count))
    assert state.digest().hex() == digest
    weights = torch.empty(state.grid.size, device=device)
    state.derive(weights)
    on_cpu = torch.empty(state.grid.size)
    IntegerState(state.grid, state.values.cpu()).derive(on_cpu)
    assert torch.equal(weights.cpu(), on_cpu)
    state.subtract(moves(count))
    assert state.digest().hex() == EMPTY
