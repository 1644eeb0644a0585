"""Every element of a model has one place in the flat vector, the same on every node, in fragments of like size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.layout import ParameterLayout
from training.model import GPT
from training.spec_sections import GptSpec


def gpt(seed: int = 0, **changes: int) -> GPT:
    spec = GptSpec(**({"layers": 6, "width": 16, "heads": 2, "context": 16} | changes))
    return GPT(spec, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fragments", [1, 2, 3, 6])
def test_fragments_tile_the_vector_and_spans_tile_the_fragments(fragments: int) -> None:
    model = gpt()
    layout = ParameterLayout.of(model, fragments)
    assert layout.total == sum(parameter.numel() for parameter in model.parameters())
    assert layout.fragments == fragments
    assert sum(map(layout.fragment_size, range(fragments))) == layout.total
    for fragment in range(fragments):
        edge = 0
        for span in layout.fragment_spans(fragment):
            assert span.start == edge
            edge = span.stop
        assert edge == layout.fragment_size(fragment)


def test_a_fragment_is_a_strided_group_of_whole_layers() -> None:
    layout = ParameterLayout.of(gpt(), 3)
    for fragment in range(3):
        layers = {
            span.name.split(".")[1] for span in layout.fragment_spans(fragment) if "blocks" in span.name
        }
        assert layers == {str(fragment), str(fragment + 3)}


def test_fragments_are_close_in_size() -> None:
    layout = ParameterLayout.of(gpt(width=64), 3)
    sizes = [layout.fragment_size(fragment) for fragment in range(3)]
    assert max(sizes) <= 1.25 * min(sizes)


def test_parameters_agree_with_the_spec_and_tied_tensors_appear_once() -> None:
    layout = ParameterLayout.of(gpt(), 1)
    assert layout.total == GptSpec(layers=6, width=16, heads=2, context=16).parameters
    assert sum(span.kind == "embedding" for span in layout.spans) == 2


def test_kinds_are_the_state_classes_of_mixing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.norm = nn.LayerNorm(2)
            self.embedding = nn.Embedding(4, 2)
            self.scale = nn.Parameter(torch.ones(1))

    kinds = {span.name: span.kind for span in ParameterLayout.of(Odd(), 1).spans}
    assert kinds == {
        "linear.weight": "weight",
        "linear.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "embedding.weight": "embedding",
        "scale": "scalar",
    }


def test_cut_and_join_are_inverse_and_wrong_parts_are_refused() -> None:
    layout = ParameterLayout.of(gpt(), 3)
    values = torch.randn(layout.total)
    parts = [layout.cut(values, fragment) for fragment in range(3)]
    assert torch.equal(layout.join(parts), values)
    with pytest.raises(ValueError, match="fragment 0"):
        layout.join(parts[::-1])
    with pytest.raises(ValueError, match="2 fragments"):
        layout.join(parts[:2])


def test_the_digest_tells_layouts_apart() -> None:
    digests = {
        ParameterLayout.of(gpt(**changes), s).digest for s in (1, 2) for changes in ({}, {"width": 32})
    }
    assert len(digests) == 4
    assert ParameterLayout.of(gpt(seed=1), 2).digest in digests


def test_initial_weights_are_the_same_bits_on_every_machine() -> None:
    model = gpt(seed=7)
    first = model.tokens.weight.flatten()[:2].tolist()
    assert [value.hex() for value in first] == ["0x1.3d211a0000000p-9", "-0x1.55e4c00000000p-6"]
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].down.weight.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.05)


def test_a_position_never_sees_what_comes_after_it() -> None:
    model = gpt()
    text = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[0, 9] = (text[0, 9] + 1) % 256
    difference = (model(text) - model(changed)).abs().amax(2)[0]
    assert bool((difference[:9] == 0).all())
    assert bool((difference[9:] > 0).all())
