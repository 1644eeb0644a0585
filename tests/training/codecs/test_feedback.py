"""Error feedback: nothing is lost, old debts fade, and descent by large values alone comes to the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.codecs.blocks import E3M0
from training.codecs.codec import Codec
from training.codecs.feedback import encode_with
from training.codecs.masked import Masked
from training.codecs.plain import FP32
from training.codecs.sparse import TopK

LOSSY: list[Codec] = [E3M0(), TopK(), Masked(inner=FP32)]


def some(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
def test_what_was_sent_and_what_is_owed_are_what_came_in(codec: Codec) -> None:
    owed, total, sent = torch.zeros(5000), torch.zeros(5000), torch.zeros(5000)
    for round_ in range(20):
        update = some(5000, round_)
        total += update
        data, owed = encode_with(codec, update, owed, key=round_)
        sent += codec.decode(data, 5000, round_)
    torch.testing.assert_close(sent + owed, total, rtol=0, atol=2e-5)


def test_with_decay_a_debt_is_bounded() -> None:
    owed = torch.zeros(4096)
    for _ in range(50):
        _, owed = encode_with(TopK(), torch.ones(4096), owed, decay=0.5)
    assert owed.max() <= 2.0


def test_an_exact_codec_owes_nothing() -> None:
    _, owed = encode_with(FP32, some(100, 0), torch.zeros(100))
    assert not owed.any()


def test_inputs_stay_as_they_are_so_that_a_lost_broadcast_can_be_sent_again() -> None:
    values, before = some(300, 0), some(300, 1)
    copies = values.clone(), before.clone()
    first = encode_with(E3M0(), values, before)
    assert torch.equal(values, copies[0])
    assert torch.equal(before, copies[1])
    again = encode_with(E3M0(), values, before)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode_with(E3M0(), torch.tensor([1.0, float("inf")]), torch.zeros(2))


def descend(codec: Codec, *, feedback: bool) -> float:
    """Least squares in 256 dimensions of four workers that want different things; how far from the optimum it ends.

    Without feedback the workers' largest values cancel each other for ever, and the small ones are never sent.
    """
    targets = [3 * some(256, seed) for seed in range(4)]
    best = torch.stack(targets).mean(0)
    owed = [torch.zeros(256) for _ in targets]
    x = torch.zeros(256)
    for _ in range(300):
        step = torch.zeros(256)
        for member, target in enumerate(targets):
            data, left = encode_with(codec, x - target, owed[member])
            step += codec.decode(data, 256)
            if feedback:
                owed[member] = left
        x -= 0.03 * step / len(targets)
    return ((x - best).norm() / best.norm()).item()


def test_without_feedback_top_k_never_arrives_and_with_it_it_does() -> None:
    assert descend(TopK(one_in=8), feedback=True) < 0.1
    assert descend(TopK(one_in=8), feedback=False) > 0.5
