"""The experiment that shows what variance correction is for, run through the product's own mixing rules.

16 nodes with different initialisations train a tanh network of six weight matrices on handwritten digits and mix with
8 neighbours (a circulant graph) after every minibatch. Plain averaging shrinks the variance of every weight matrix to
1/16, signals vanish with depth, and training stalls; variance correction learns at least as fast as no communication;
from a common initialisation it changes nothing (Tian, Al-Ars, Kitsak, Hofstee, arXiv 2404.04616).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from training.layout import Kind, TensorSpan
from training.mixing import mix
from training.spec_sections import MixingRuleName

NODES = 16
NEIGHBOURS = (-4, -3, -2, -1, 1, 2, 3, 4)
WIDTHS = (64, 64, 64, 64, 64, 64, 10)
BATCH = 32
TICKS_MAX = 200
GOAL = 0.8
SEEDS = range(3)


@dataclass
class Outcome:
    """``ticks`` until the nodes' mean accuracy met the goal, None if never, and the state at that moment."""

    ticks: int | None
    variance_ratio_min: float
    """Of a weight matrix's variance to what it was at first, mean over the nodes: the lowest of the six."""
    gain_last: float


def mlp_spans() -> list[TensorSpan]:
    spans, start = [], 0
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(WIDTHS)):
        shapes: dict[Kind, tuple[int, ...]] = {"weight": (fan_out, fan_in), "bias": (fan_out,)}
        for kind, shape in shapes.items():
            stop = start + math.prod(shape)
            spans.append(TensorSpan(f"{layer}.{kind}", start, stop, shape, kind))
            start = stop
    return spans


SPANS = mlp_spans()


def initial_weights(seed: int, *, same: bool) -> torch.Tensor:
    """Xavier weights and zero biases of all nodes: (nodes, parameters)."""
    generator = torch.Generator().manual_seed(2 * seed)
    weights = torch.zeros(NODES, SPANS[-1].stop)
    for span in SPANS:
        if span.kind == "weight":
            std = math.sqrt(2 / sum(span.shape))
            weights[:, span.start : span.stop].normal_(0, std, generator=generator)
    return weights[:1].expand_as(weights).clone() if same else weights


def forward(weights: torch.Tensor, x_NBD: torch.Tensor) -> torch.Tensor:
    """Logits (nodes, batch, 10) of every node's network on its own rows of ``x_NBD``."""
    for index in range(0, len(SPANS), 2):
        weight, bias = (
            weights[:, span.start : span.stop].view(NODES, *span.shape) for span in SPANS[index : index + 2]
        )
        x_NBD = torch.baddbmm(bias[:, None], x_NBD, weight.transpose(1, 2))
        if index < len(SPANS) - 2:
            x_NBD = x_NBD.tanh()
    return x_NBD


def run(rule: MixingRuleName | None, seed: int, *, same_init: bool = False) -> Outcome:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(2 * seed + 1)
    shuffled = torch.randperm(len(x), generator=generator)
    train, test = shuffled[:1440], shuffled[1440:]
    x_test = x[test].expand(NODES, -1, -1)

    start = initial_weights(seed, same=same_init)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.01, momentum=0.9)
    ticks, gain = None, 1.0
    for tick in range(1, TICKS_MAX + 1):
        rows = train[torch.randint(len(train), (NODES, BATCH), generator=generator)]
        loss = (
            F.cross_entropy(forward(weights, x[rows]).flatten(0, 1), y[rows].flatten(), reduction="sum")
            / BATCH
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rule is not None:
            with torch.no_grad():
                before = list(weights.detach().clone())
                for node in range(NODES):
                    others = [before[(node + offset) % NODES] for offset in NEIGHBOURS]
                    result = mix(rule, before[node], others, SPANS)
                    weights[node].copy_(result.values)
                    gain = result.gain_max
        with torch.no_grad():
            accuracy = (forward(weights, x_test).argmax(2) == y[test]).float().mean().item()
        if accuracy >= GOAL:
            ticks = tick
            break
    ratios = [
        (weights[:, span.start : span.stop].var(1) / start[:, span.start : span.stop].var(1)).mean().item()
        for span in SPANS
        if span.kind == "weight"
    ]
    return Outcome(ticks, min(ratios), gain)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_plain_averaging_of_different_initialisations_stalls_at_a_sixteenth_of_the_variance() -> None:
    plain = run("mean", seed=0)
    assert plain.ticks is None
    assert plain.variance_ratio_min == pytest.approx(1 / NODES, abs=0.01)


def test_variance_correction_learns_at_least_as_fast_as_no_communication() -> None:
    alone = [run(None, seed) for seed in SEEDS]
    corrected = [run("variance_corrected", seed) for seed in SEEDS]
    assert sum(outcome.ticks for outcome in corrected) <= sum(outcome.ticks for outcome in alone)
    assert min(outcome.variance_ratio_min for outcome in corrected) > 0.9


def test_variance_correction_changes_nothing_from_a_common_initialisation() -> None:
    corrected, plain = (run(rule, seed=0, same_init=True) for rule in ("variance_corrected", "mean"))
    assert corrected.ticks == plain.ticks
    assert corrected.gain_last < 1.01
