"""Outer steps: where a model goes from what its members came to by themselves.

Owns the arithmetic between two merges: from the parent that all started from and what they came to on average, the next
parent and the momentum. Pure functions of flat fp32 CPU tensors, each operation by itself and in one order, so that all
who hold the same inputs come to the same bits; inputs are never changed.

With Delta the parent minus the average, the pseudo-gradient:

* ``nesterov``: m <- mu m + Delta; parent <- parent - eta (Delta + mu m) (DiLoCo, Douillard et al., arXiv 2311.08105).
  eta = 1 and mu = 0 is federated averaging, bit for bit.
* ``pair_step``: no parent that all share; members meet in groups, and the momentum, each one's own, pulls them together
  (NoLoCo, Kolehmainen et al., arXiv 2506.10911, equation 2).

Never knows who the members are, nor how values travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def nesterov(
    parent: Tensor, average: Tensor, momentum: Tensor, *, rate: float, memory: float
) -> tuple[Tensor, Tensor]:
    """The next parent and the next momentum; ``rate`` is eta, ``memory`` mu.

    parent - eta (Delta + mu m) is worked out as average + (1 - eta) Delta - eta mu m, which is the average itself where
    eta is 1 and mu 0.
    """
    delta = parent - average
    momentum = (momentum * memory).add_(delta)
    return average + (delta * (1.0 - rate)).sub_(momentum * (rate * memory)), momentum


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What one member of a group brings: where it started this outer step, and where its inner steps took it."""

    start: Tensor
    end: Tensor


def pair_step(
    own: Side, group: Sequence[Side], momentum: Tensor, *, rate: float, memory: float
) -> tuple[Tensor, Tensor]:
    """Where a member of ``group`` goes on from, and its momentum; ``rate`` is beta and gamma, ``memory`` alpha.

    d <- alpha d + beta mean(end - start) - gamma (start - mean start); next <- start + d. ``group`` is in an order that
    all of it share, own side included.
    """
    starts, ends = torch.zeros_like(own.start), torch.zeros_like(own.start)
    for side in group:
        starts.add_(side.start)
        ends.add_(side.end)
    starts.div_(float(len(group)))
    ends.div_(float(len(group)))
    # beta (mean end - mean start) - gamma (start - mean start), with beta = gamma, is beta (mean end - start).
    momentum = (momentum * memory).add_((ends - own.start).mul_(rate))
    return own.start + momentum, momentum


def pair_contraction(*, rate: float, memory: float, group: int = 2) -> float:
    """By what the variance between members changes in a ``pair_step`` of random groups; above 1 they drift apart.

    The largest eigenvalue of the recursion for the second moments of distance and momentum, without any gradient. With
    groups of two a memory of 0.9 holds together only up to a rate of 0.37, one of 0.5 up to 1.49.
    """
    apart = 1.0 - 1.0 / group
    g, m = rate, memory
    # Rows: what the next E e^2, E e d and E d^2 are of the present ones. Of a random group, e less its mean keeps
    # `apart` of its variance.
    moved = torch.tensor([g * g * apart, -2 * m * g * apart, m * m], dtype=torch.float64)
    crossed = moved + torch.tensor([-g * apart, m, 0.0], dtype=torch.float64)
    distance = crossed + torch.tensor([1.0 - g * apart, m, 0.0], dtype=torch.float64)
    return float(torch.linalg.eigvals(torch.stack([distance, crossed, moved])).abs().max())
