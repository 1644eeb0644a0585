"""Labelled data dealt out among the machines of a simulation, evenly or by labels.

Owns who learns from what in experiments on data that differs between nodes; in life every node brings its own. Pure
functions of their arguments and a random generator. All machines keep one held-out set, so their losses compare.

How unlike machines are is said by ``alpha``, the concentration of a symmetric Dirichlet distribution over the classes,
from which each machine draws its own mix of them: 100 is nearly even, 0.1 leaves it with about three classes of ten.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from p2p.errors import GossamerError
from training.data import DataError
from training.labelled import Examples, LabelledData


@functools.cache
def digits() -> LabelledData:
    """The 1,797 handwritten digits of scikit-learn: 64 features, ten classes. Raises GossamerError.

    Features are standardised by the mean and the deviation of all pixels, so that what is always white stays constant.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GossamerError(
            "the digits are not here",
            why="they come with scikit-learn, which only experiments need",
            fix="pip install 'gossamer[research]'",
        ) from error
    found = load_digits()
    x = (found.data - found.data.mean()) / found.data.std()
    return LabelledData.of(Examples(x.astype(np.float32), found.target.astype(np.int64)))


def dealt(
    data: LabelledData, machines: int, *, alpha: float | None, rng: random.Random
) -> list[LabelledData]:
    """``data`` dealt out among ``machines``, no training example to two of them, as many to each.

    ``alpha`` None deals them out at random. Otherwise each machine in turn draws its mix of classes, and by it its
    examples, without replacement; a class that runs out leaves the mix (Hsu, Qi, Brown, arXiv 1909.06335, with a
    uniform prior). Batches are drawn with replacement, so that a single example is enough for one. Raises DataError
    when there are more machines than examples.
    """
    share = len(data.train) // machines
    if not share:
        raise DataError(
            f"{len(data.train)} examples cannot be dealt out among {machines} machines",
            why="every machine learns from examples of its own",
            fix="run fewer machines, or let them draw from all of the data: learner.resampled = true",
        )
    generator = _numpy_generator(rng)
    order = generator.permutation(len(data.train))
    if alpha is None:
        return [replace(data, train=data.train.take(rows)) for rows in np.array_split(order, machines)]
    classes, class_of = np.unique(data.train.y[order], return_inverse=True)
    left = [list(order[class_of == index]) for index in range(len(classes))]
    parts = []
    for _ in range(machines):
        mix = generator.dirichlet(np.full(len(classes), alpha))
        counts = _drawn_without_replacement(generator, mix, [len(rows) for rows in left], share)
        rows = [left[index].pop() for index, count in enumerate(counts) for _ in range(count)]
        parts.append(replace(data, train=data.train.take(np.array(rows, np.intp))))
    return parts


def preferring(data: LabelledData, machines: int, *, alpha: float, rng: random.Random) -> list[LabelledData]:
    """All of ``data`` for each of ``machines``, which draw every batch by a mix of classes of their own.

    How arXiv 2507.06542 makes nodes unlike without making their data few.
    """
    generator = _numpy_generator(rng)
    classes = np.unique(data.train.y)
    parts = []
    for _ in range(machines):
        preference = np.zeros(int(classes[-1]) + 1)
        preference[classes] = generator.dirichlet(np.full(len(classes), alpha))
        parts.append(replace(data, preference=tuple(preference.tolist())))
    return parts


def _drawn_without_replacement(
    generator: np.random.Generator, mix: NDArray[np.float64], left: list[int], count: int
) -> list[int]:
    """How many of each class ``count`` draws by ``mix`` take when ``left`` are there."""
    taken = np.zeros(len(left), np.int64)
    while missing := count - int(taken.sum()):
        room = np.array(left) - taken
        weights = np.where(room > 0, mix, 0.0)
        if not weights.any():
            weights = room.astype(np.float64)
        taken += np.minimum(generator.multinomial(missing, weights / weights.sum()), room)
    return [int(number) for number in taken]


def _numpy_generator(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(128))
