"""An MLP is what its spec says, starts from the same bits on every machine, and is cut into whole layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from training.layout import ParameterLayout
from training.mlp import MLP
from training.spec_sections import MlpSpec


def mlp(seed: int = 0, **changes: object) -> MLP:
    fields: dict[str, object] = {"inputs": 64, "hidden": (100, 30), "classes": 10}
    return MLP(MlpSpec(**(fields | changes)), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_logits_are_those_of_linear_layers_with_the_activation_between(activation: str) -> None:
    model = mlp(activation=activation)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    out = x
    for index, block in enumerate(model.blocks):
        out = F.linear(out, block.weight, block.bias)
        if index < 2:
            out = getattr(torch, activation)(out)
    assert torch.equal(model(x), out)
    assert out.shape == (7, 10)


def test_without_hidden_layers_it_is_linear() -> None:
    model = mlp(hidden=())
    x = torch.randn(3, 64)
    assert torch.allclose(model(2 * x), 2 * model(x), atol=1e-5)


def test_initial_weights_are_xaviers_and_the_same_bits_on_every_machine() -> None:
    model = mlp(seed=7, hidden=(1000, 300))
    for block in model.blocks:
        bound = math.sqrt(6 / (block.in_features + block.out_features))
        assert block.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert block.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not block.bias.any()
    first = mlp(seed=7).blocks[0].weight.flatten()[:2].tolist()
    assert [value.hex() for value in first] == ["0x1.b5c3700000000p-7", "-0x1.d7f2a80000000p-4"]


def test_parameters_agree_with_the_spec() -> None:
    spec = MlpSpec(inputs=64, hidden=(100, 30), classes=10)
    assert ParameterLayout.of(mlp(), 1).total == spec.parameters == 65 * 100 + 101 * 30 + 31 * 10


def test_a_fragment_is_a_strided_group_of_whole_layers_with_their_biases() -> None:
    layout = ParameterLayout.of(mlp(), 2)
    names = [{span.name for span in layout.fragment_spans(fragment)} for fragment in range(2)]
    assert names == [
        {"blocks.0.weight", "blocks.0.bias", "blocks.2.weight", "blocks.2.bias"},
        {"blocks.1.weight", "blocks.1.bias"},
    ]
    assert {span.kind for span in layout.spans} == {"weight", "bias"}
    assert ParameterLayout.of(mlp(), 3).fragments == 3
