"""Optimizers do what torch's do, on flat vectors; the rate follows its schedule."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from training.layout import ParameterLayout
from training.mlp import MLP
from training.optimizers import MOMENTUM_MIN, Optimizer, build_optimizer, learning_rate
from training.spec_sections import AdamWSpec, MlpSpec, OptimizerSpec, SgdSpec


class Bound:
    """An MLP whose parameters and gradients are views of flat vectors, under an optimizer."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.model = MLP(MlpSpec(inputs=4, hidden=(5,), classes=3), torch.Generator().manual_seed(0))
        self.layout = ParameterLayout.of(self.model, 2)
        self.live = torch.zeros(self.layout.total)
        self.gradient = torch.zeros(self.layout.total)
        live, gradient = self.layout.views(self.live), self.layout.views(self.gradient)
        for name, parameter in self.model.named_parameters():
            live[name].copy_(parameter.detach())
            parameter.data, parameter.grad = live[name], gradient[name]
        self.optimizer: Optimizer = build_optimizer(spec, self.layout, self.live, self.gradient)

    def expected(
        self, torch_optimizer: type[torch.optim.Optimizer], **options: float
    ) -> tuple[Tensor, torch.optim.Optimizer]:
        """A copy of the weights as one parameter, under an optimizer of torch's own."""
        parameter = self.live.clone().requires_grad_()
        parameter.grad = self.gradient
        return parameter, torch_optimizer([parameter], **options)


def gradients(total: int, count: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(total, generator=generator) for _ in range(count)]


def test_sgd_is_torchs_momentum() -> None:
    bound = Bound(SgdSpec(momentum=0.8))
    parameter, expected = bound.expected(torch.optim.SGD, lr=0.05, momentum=0.8)
    for gradient in gradients(bound.layout.total):
        bound.gradient.copy_(gradient)
        bound.optimizer.take_step(0.05)
        expected.step()
        assert torch.allclose(bound.live, parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [AdamWSpec(weight_decay=0.5), SgdSpec(weight_decay=0.5, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_weights_decay_by_themselves_and_biases_do_not(spec: OptimizerSpec) -> None:
    bound = Bound(spec)
    bound.live.fill_(1.0)
    for _ in range(4):
        bound.optimizer.take_step(0.1)
    for span in bound.layout.spans:
        kept = 0.95**4 if span.kind == "weight" else 1.0
        assert bound.live[span.start : span.stop] == pytest.approx(kept)
    assert not any(vector.any() for vector in bound.optimizer.state.values())


def test_momentum_of_what_stopped_learning_ends_at_zero_not_among_denormal_numbers() -> None:
    bound = Bound(SgdSpec(momentum=0.9))
    bound.gradient.fill_(1.0)
    bound.optimizer.take_step(0.0)
    bound.gradient.zero_()
    for _ in range(700):
        bound.optimizer.take_step(0.0)
    momentum = bound.optimizer.state["momentum"]
    assert 0.9**600 > MOMENTUM_MIN > torch.finfo(torch.float32).tiny
    assert not momentum.any()


def test_adamw_is_torchs_on_the_same_vectors() -> None:
    bound = Bound(AdamWSpec(weight_decay=0.0, beta1=0.8, beta2=0.9))
    parameter, expected = bound.expected(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9), weight_decay=0.0)
    for gradient in gradients(bound.layout.total):
        bound.gradient.copy_(gradient)
        bound.optimizer.take_step(0.05)
        expected.step()
    assert torch.allclose(bound.live, parameter, rtol=1e-4, atol=1e-5)
    assert set(bound.optimizer.state) == {"adam_mean", "adam_square"}
    assert all(vector.shape == bound.live.shape for vector in bound.optimizer.state.values())


def test_a_step_does_not_import_torchs_compiler() -> None:
    program = (
        "import sys; from tests.training.test_optimizers import AdamWSpec, Bound;"
        "Bound(AdamWSpec()).optimizer.take_step(0.1); print('torch._dynamo' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


@pytest.mark.parametrize("spec", [AdamWSpec(), SgdSpec(weight_decay=0.1)], ids=["adamw", "sgd"])
def test_the_state_is_all_there_is_to_resume(spec: OptimizerSpec) -> None:
    bound = Bound(spec)
    drawn = gradients(bound.layout.total)
    for gradient in drawn[:10]:
        bound.gradient.copy_(gradient)
        bound.optimizer.take_step(0.05)
    resumed = Bound(spec)
    resumed.live.copy_(bound.live)
    for name, vector in resumed.optimizer.state.items():
        vector.copy_(bound.optimizer.state[name])
    resumed.optimizer.resume(10)
    for each in (bound, resumed):
        for gradient in drawn[10:]:
            each.gradient.copy_(gradient)
            each.optimizer.take_step(0.05)
    assert torch.equal(bound.live, resumed.live)


@pytest.mark.parametrize(
    "spec", [AdamWSpec(), SgdSpec(weight_decay=1.0, momentum=0.999)], ids=["adamw", "sgd"]
)
def test_no_step_makes_a_weight_that_is_not_finite(spec: OptimizerSpec) -> None:
    """Not even from the largest weights there are, under the longest gradients that clipping lets through."""
    bound = Bound(spec)
    bound.live.fill_(torch.finfo(torch.float32).max)
    bound.live[::2] *= -1
    bound.gradient.copy_(-1000 * bound.live.sign())
    for _ in range(50):
        bound.optimizer.take_step(1.0)
    assert bool(torch.isfinite(bound.live).all())


@pytest.mark.parametrize(
    "spec", [AdamWSpec(), SgdSpec(learning_rate=2e-3, warmup_steps=20)], ids=["adamw", "sgd"]
)
def test_the_rate_warms_up_and_falls_along_a_cosine_to_its_floor(spec: OptimizerSpec) -> None:
    rates = [learning_rate(spec, 220, step) for step in range(240)]
    peak = spec.learning_rate
    assert rates[0] == pytest.approx(peak / 20)
    assert rates[19] == rates[20] == peak
    assert rates[120] == pytest.approx(peak * 0.55)
    assert rates[220:] == pytest.approx([peak * 0.1] * 20)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_a_rate_without_warm_up_that_falls_to_itself_is_constant() -> None:
    spec = SgdSpec(learning_rate=0.02, warmup_steps=0, min_rate_fraction=1.0)
    assert {learning_rate(spec, 100, step) for step in (0, 1, 50, 99, 1000)} == {0.02}
    assert math.isfinite(learning_rate(spec, 1, 0))
