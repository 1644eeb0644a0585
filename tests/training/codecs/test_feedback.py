"""Error feedback: nothing is lost, old residuals fade, and descent by large values alone comes to the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.codecs.blocks import E3M0
from training.codecs.codec import Codec
from training.codecs.feedback import ErrorFeedback
from training.codecs.masked import Masked
from training.codecs.plain import FP32
from training.codecs.sparse import TopK

LOSSY: list[Codec] = [E3M0(), TopK(), Masked(inner=FP32)]


def some(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
def test_what_was_sent_and_what_is_owed_are_what_came_in(codec: Codec) -> None:
    feedback, total, sent = ErrorFeedback(codec, 5000), torch.zeros(5000), torch.zeros(5000)
    for round_ in range(20):
        update = some(5000, round_)
        total += update
        sent += codec.decode(feedback.encode(update, round_), 5000, round_)
    torch.testing.assert_close(sent + feedback.residual, total, rtol=0, atol=2e-5)


def test_with_decay_a_residual_is_bounded() -> None:
    feedback = ErrorFeedback(TopK(), 4096, decay=0.5)
    for _ in range(50):
        feedback.encode(torch.ones(4096))
    assert feedback.residual.max() <= 2.0


def test_an_exact_codec_owes_nothing() -> None:
    feedback = ErrorFeedback(FP32, 100)
    feedback.encode(some(100, 0))
    assert not feedback.residual.any()


def test_what_did_not_arrive_is_owed_still() -> None:
    feedback = ErrorFeedback(E3M0(), 300)
    feedback.encode(some(300, 0))
    owed = feedback.residual + some(300, 1)
    feedback.encode(some(300, 1))
    feedback.take_back()
    torch.testing.assert_close(feedback.residual, owed)


def test_what_cannot_be_sent_changes_nothing() -> None:
    feedback = ErrorFeedback(E3M0(), 2)
    feedback.encode(torch.tensor([1.0, 0.3]))
    before = feedback.residual.clone()
    with pytest.raises(ValueError, match="not finite"):
        feedback.encode(torch.tensor([1.0, float("inf")]))
    assert torch.equal(feedback.residual, before)


def descend(codec: Codec, *, feedback: bool) -> float:
    """Least squares in 256 dimensions of four workers that want different things; how far from the optimum it ends.

    Without feedback the workers' largest values cancel each other for ever, and the small ones are never sent.
    """
    targets = [3 * some(256, seed) for seed in range(4)]
    best = torch.stack(targets).mean(0)
    senders = [ErrorFeedback(codec, 256) for _ in targets]
    x = torch.zeros(256)
    for _ in range(300):
        step = torch.zeros(256)
        for target, sender in zip(targets, senders, strict=True):
            data = sender.encode(x - target) if feedback else codec.encode(x - target)
            step += codec.decode(data, 256)
        x -= 0.03 * step / len(targets)
    return ((x - best).norm() / best.norm()).item()


def test_without_feedback_top_k_never_arrives_and_with_it_it_does() -> None:
    assert descend(TopK(one_in=8), feedback=True) < 0.1
    assert descend(TopK(one_in=8), feedback=False) > 0.5
