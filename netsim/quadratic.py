"""Quadratic: a Learner whose loss is a parabola, for simulations of faults and of scale. Steps cost microseconds.

Owns the problem, its exact solution, and one machine's weights on it. Machine i descends on
f_i(x) = 1/2 sum_k a_k (x_k - c_ik)^2 by stochastic gradients, a_k (x_k - c_ik) + noise * xi with iid Gaussian xi. The
centres c_i differ from machine to machine as their data would; their mean over the parts of a run is ``optimum``, and
as all share the curvatures a_k, that is the minimum of the mean of all f_i.

Any number of steps costs as much as one. With r_k = 1 - rate * a_k, n steps are the affine map
x_k <- c_ik + r_k^n (x_k - c_ik) plus rate * noise * sum_j r_k^(n-1-j) xi_j, one Gaussian of variance
(rate * noise)^2 (1 - r_k^(2n)) / (1 - r_k^2); it is drawn from (run, peer, step at which the slice begins).

Guarantees: the same slices give the same bits, before and after ``save`` and ``load``. Other slices of as many steps
give the same weights without noise, up to rounding, and weights of the same distribution with it.

It looks to its peers like a network: two machines' weights are uncorrelated before they train but of equal variance,
biases and norms start alike, and nobody's small tensors pass near zero, where honest members would refuse each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from gossip.merge_chain import sealed, unsealed
from gossip.messages import Count, Hash, Message
from p2p.codec import decode, encode
from p2p.errors import GossamerError, MalformedMessage
from training.layout import Kind, ParameterLayout, TensorSpan
from training.learner import SliceReport
from training.run_spec import RunSpec
from training.trainer import CheckpointError

CHECKPOINT_FORMAT = 1
FRAGMENT_SIZE_MIN = 32
"""Elements of a fragment. The moments of smaller tensors differ so much by chance that honest members would ban each
other for them."""
LOSS_MIN = 1.0
"""Added to every loss: what is left at the optimum, as data always leaves something."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuadraticProblem:
    """What all machines of a run descend on. Raises ValueError for a rate at which descent diverges."""

    dimension: int = 64
    noise: float = 0.3
    """Standard deviation of each element of a gradient."""
    heterogeneity: float = 1.0
    """Standard deviation of a machine's centre about the optimum, in each element of its weight tensors."""
    curvature_spread: float = 10.0
    """The largest curvature, which is 1, over the smallest."""
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 2 or self.curvature_spread < 1:
            raise ValueError(
                "descent needs a learning rate between 0 and 2 and a curvature spread of 1 or more"
            )


class _Saved(Message, frozen=True):
    """A checkpoint; sealed by its hash."""

    format: int
    run: Hash
    layout: Hash
    step: Count
    tokens: Count
    weights: bytes


class Quadratic:
    """One machine's weights in training. Implements training.learner.Learner."""

    def __init__(
        self,
        spec: RunSpec,
        problem: QuadraticProblem,
        *,
        run: bytes,
        peer: str,
        part: tuple[int, int] | None,
    ) -> None:
        """``part = (k, n)``: the centre of the k-th of n machines (k > n: of one more); None: the optimum itself.

        The spec gives fragments, batch (a sample counts as a token) and whether machines start alike.
        Raises GossamerError when fragments would be too small.
        """
        self.spec = spec
        self.problem = problem
        self.layout = quadratic_layout(problem.dimension, spec.exchange.fragments)
        self.device = torch.device("cpu")
        self.step = 0
        self.tokens = 0
        self._run = run
        self._slices = [self.layout.fragment_slice(fragment) for fragment in range(self.layout.fragments)]
        author = peer if spec.init == "per-peer" else ""
        self._live, self._optimum, curvature = _terrain(self.layout, problem, run, author)
        self._centre = self._optimum
        if part is not None:
            self._centre = self._optimum + _offset(self.layout, problem, run, part)
        self._half_curvature = (0.5 * curvature).astype(np.float32)
        self._rate: Doubles = 1.0 - problem.learning_rate * curvature
        self._slice_steps = 0
        self._decay = self._spread = np.zeros_like(self._live)
        self._bits = np.random.Philox(key=_seed("noise", run.hex(), peer))
        self._normal = np.random.Generator(self._bits)
        self._bits_state = self._bits.state

    @property
    def optimum(self) -> Tensor:
        """A copy of the weights that minimise the mean of all f_i."""
        return torch.from_numpy(self._optimum.copy())

    # --- training ---------------------------------------------------------------------------------------------

    def run_slice(self, steps: int) -> SliceReport:
        """Take ``steps`` inner steps; the loss is f_i at their end."""
        if steps != self._slice_steps:
            self._prepare(steps)
        live = self._live
        live -= self._centre
        live *= self._decay
        if self.problem.noise:
            live += self._spread * self._draw(self.step)
        loss = float(np.dot(self._half_curvature * live, live))
        live += self._centre
        tokens = steps * self.spec.train.batch
        self.step += steps
        self.tokens += tokens
        return SliceReport(steps, tokens, LOSS_MIN + loss)

    def _prepare(self, steps: int) -> None:
        """Slices are mostly of one length: keep the transition of the last."""
        decay = self._rate**steps
        deviation = self.problem.learning_rate * self.problem.noise
        self._slice_steps = steps
        self._decay = decay.astype(np.float32)
        self._spread = (deviation * np.sqrt((1 - decay**2) / (1 - self._rate**2))).astype(np.float32)

    def _draw(self, step: int) -> Floats:
        """Standard normals that belong to ``step``: a counter-based generator is put there, not run up to it."""
        state = self._bits_state
        state["state"]["counter"][:] = (0, step, 0, 0)
        self._bits.state = state
        return self._normal.standard_normal(len(self._live), dtype=np.float32)

    # --- weights ----------------------------------------------------------------------------------------------

    def read(self, fragment: int | None = None) -> Tensor:
        """A copy of the live weights, or of one fragment of them: flat fp32 in layout order."""
        return torch.from_numpy(self._slot(fragment).copy())

    def add(self, fragment: int | None, delta: Tensor) -> None:
        """Add ``delta`` to the live weights, or to one fragment. Raises ValueError unless every element is finite."""
        slot = self._slot(fragment)
        slot += _checked(delta, len(slot))

    def write(self, values: Tensor) -> None:
        """Replace the live weights. Raises ValueError unless every element is finite."""
        self._live[:] = _checked(values, len(self._live))

    def _slot(self, fragment: int | None) -> Floats:
        return self._live if fragment is None else self._live[self._slices[fragment]]

    # --- use --------------------------------------------------------------------------------------------------

    def evaluate(self, values: Tensor | None = None, *, bytes_max: int | None = None) -> float:
        """``LOSS_MIN`` plus how much the mean of all f_i lies above its minimum, at the live weights or ``values``."""
        distance = (self._live if values is None else values.numpy()) - self._optimum
        return LOSS_MIN + float(np.dot(self._half_curvature * distance, distance))

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Everything needed to go on, behind its hash."""
        saved = _Saved(
            format=CHECKPOINT_FORMAT,
            run=self._run,
            layout=self.layout.digest,
            step=self.step,
            tokens=self.tokens,
            weights=self._live.tobytes(),
        )
        return sealed(encode(saved))

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""
        try:
            saved = decode(unsealed(data), _Saved, bytes_max=len(data))
        except MalformedMessage as error:
            raise _bad_checkpoint(error.what) from error
        if (saved.format, saved.run, saved.layout) != (CHECKPOINT_FORMAT, self._run, self.layout.digest):
            raise _bad_checkpoint("it is of another run, problem or version")
        if len(saved.weights) != self._live.nbytes:
            raise _bad_checkpoint(f"it has {len(saved.weights)} bytes of weights")
        weights = np.frombuffer(saved.weights, dtype=np.float32)
        if not np.isfinite(weights).all():
            raise _bad_checkpoint("an element is not finite")
        self._live[:] = weights
        self.step, self.tokens = saved.step, saved.tokens


@lru_cache(maxsize=8)
def quadratic_layout(dimension: int, fragments: int) -> ParameterLayout:
    """``dimension`` elements in equal fragments, each a weight of three quarters of it, a bias and a norm.

    Raises GossamerError when a fragment would have fewer than FRAGMENT_SIZE_MIN elements.
    """
    if dimension < fragments * FRAGMENT_SIZE_MIN:
        raise GossamerError(
            f"a quadratic of {dimension} elements is too small for {fragments} fragments",
            why=f"members of the run compare the variances of each other's fragments, which takes {FRAGMENT_SIZE_MIN} "
            "elements to mean anything",
            fix=f"set learner.dimension to {fragments * FRAGMENT_SIZE_MIN} or more, or run.exchange.fragments to less",
        )
    bounds = [dimension * fragment // fragments for fragment in range(fragments + 1)]
    spans = [
        span
        for fragment in range(fragments)
        for span in _fragment_spans(fragment, *bounds[fragment : fragment + 2])
    ]
    return ParameterLayout(tuple(spans), tuple(bounds))


def _fragment_spans(fragment: int, start: int, stop: int) -> Iterator[TensorSpan]:
    small = (stop - start) // 8
    kinds: list[tuple[Kind, int]] = [("weight", stop - start - 2 * small), ("bias", small), ("norm", small)]
    for kind, size in kinds:
        shape = (1, size) if kind == "weight" else (size,)
        yield TensorSpan(f"blocks.{fragment}.{kind}", start, start + size, shape, kind)
        start += size


def _terrain(
    layout: ParameterLayout, problem: QuadraticProblem, run: bytes, author: str
) -> tuple[Floats, Floats, Doubles]:
    """Where ``author`` starts, the optimum and the curvatures.

    Weights are +1 and -1 in equal numbers at both ends, so that all have variance 1, and differ in which is which.
    """
    start, optimum = np.empty(layout.total, np.float32), np.empty(layout.total, np.float32)
    curvature = np.ones(layout.total)
    for span in layout.spans:
        place, size = slice(span.start, span.stop), span.stop - span.start
        signs = _signs(size, "optimum", run.hex(), span.name)
        if span.kind == "weight":
            start[place] = _signs(size, "start", run.hex(), span.name, author)
            optimum[place] = signs
            curvature[place] = problem.curvature_spread ** -np.linspace(0.0, 1.0, size)
        elif span.kind == "bias":
            start[place], optimum[place] = 0.5 * signs, signs
        else:
            start[place], optimum[place] = 1.0, 1.0 + 0.25 * signs
    return start, optimum, curvature


def _signs(size: int, *names: str) -> Floats:
    """+1 and -1, as many of each as possible, in random order."""
    signs: Floats = np.where(_generator(*names).permutation(size) % 2, -1.0, 1.0).astype(np.float32)
    return signs


def _offset(layout: ParameterLayout, problem: QuadraticProblem, run: bytes, part: tuple[int, int]) -> Floats:
    """From the optimum to the centre of ``part``: Gaussian, with a mean over all parts of exactly zero."""
    number, parts = part
    heterogeneous = np.concatenate(
        [np.full(span.stop - span.start, span.kind == "weight") for span in layout.spans]
    )
    offset = _part_draw(layout.total, run, number) - _mean_part_draw(layout.total, run, parts)
    return (problem.heterogeneity * heterogeneous * offset).astype(np.float32)


def _part_draw(size: int, run: bytes, number: int) -> Doubles:
    return _generator("centre", run.hex(), str(number)).standard_normal(size)


@lru_cache(maxsize=8)
def _mean_part_draw(size: int, run: bytes, parts: int) -> Doubles:
    total = np.zeros(size)
    for number in range(1, parts + 1):
        total += _part_draw(size, run, number)
    return total / parts


def _generator(*names: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_seed(*names)))


def _seed(*names: str) -> int:
    return int.from_bytes(blake3("/".join(("netsim/quadratic", *names)).encode()).digest(length=16), "little")


def _checked(values: Tensor, size: int) -> Floats:
    if values.shape != (size,):
        raise ValueError(f"shape {tuple(values.shape)}, expected ({size},)")
    array: Floats = values.numpy()
    if not np.isfinite(array).all():
        raise ValueError("an element is not finite")
    return array


def _bad_checkpoint(reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot go on from this checkpoint: {reason}",
        why="training must not continue from weights that may be damaged",
        fix="the node tries the checkpoint before it; without one it starts from the last merged model",
    )
