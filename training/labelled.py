"""Labelled examples: where they come from, which are held out, and the batches a node learns from.

Owns the format of the file: an .npz with ``x``, float32 (n, features), and ``y``, integers (n,) from 0 to classes - 1;
``x_test`` and ``y_test`` beside them are the held-out examples. Without those an example is held out when its BLAKE3
hash is 0 modulo 10, or the one of the lowest hash where there is none. Never writes, never leaves the machine.

Examples are ordered by their hash and equal ones are kept once, so the same examples give the same data in whatever
order the file has them, and any stretch of them is a fair sample. No example is both trained on and held out.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from training.data import DataError, drawn

DATA_BYTES_MAX = 1 << 30
"""Arrays in a file, unpacked."""

EXAMPLES_MAX = 1 << 21
"""Each is hashed, and its hash is held in memory while it is sorted."""

Floats: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = slice | NDArray[np.intp] | NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """``x``, float32 (n, features), and the class of each row in ``y``, int64 (n,)."""

    x: Floats
    y: Labels

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Examples:
        """Some of the examples."""
        return Examples(self.x[rows], self.y[rows])

    @property
    def example_bytes(self) -> int:
        """Bytes of one example."""
        return int(self.x.itemsize * self.x.shape[1] + self.y.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledData:
    """Examples in two disjoint parts. ``held_out_digest`` (BLAKE3) tells whether two nodes evaluate on the same."""

    train: Examples
    held_out: Examples
    held_out_digest: bytes
    preference: tuple[float, ...] | None = None
    """For each class how likely a batch's example is one of it; None draws from all examples alike."""

    @classmethod
    def load(cls, path: Path | None, *, inputs: int, classes: int) -> LabelledData:
        """The data in the .npz file ``path``, for a model with so many inputs and classes. Raises DataError."""
        if path is None:
            raise DataError(
                "this run learns from your own labelled examples, and no path to them is set",
                why="its spec says data.source = npz; each node brings its own file",
                fix="set data_path in config.toml, or pass --data FILE.npz",
            )
        arrays = _read(path)
        examples = _checked(path, arrays, "x", "y", inputs=inputs, classes=classes)
        if not arrays.keys() & {"x_test", "y_test"}:
            return cls.of(examples)
        return cls.of(examples, _checked(path, arrays, "x_test", "y_test", inputs=inputs, classes=classes))

    @classmethod
    def of(cls, examples: Examples, held_out: Examples | None = None) -> LabelledData:
        """The data made of ``examples``. Raises DataError when nothing would be left to learn from or to measure on."""
        examples, keys = _by_hash(examples)
        if held_out is None:
            held = np.array([int.from_bytes(key, "little") % 10 == 0 for key in keys], np.bool_)
            if not held.any():
                held[:1] = True
            held_out = examples.take(held)
        else:
            held_out, held_keys = _by_hash(held_out)
            known = set(held_keys)
            held = np.array([key in known for key in keys], np.bool_)
        train = examples.take(~held)
        if not len(train) or not len(held_out):
            raise DataError(
                f"there are too few different examples: {len(train)} to learn from, {len(held_out)} held out",
                why="some of them are set aside to measure the model on",
                fix="add examples to the file",
            )
        return cls(train, held_out, _digest(held_out))

    def evaluated_on(self, examples_max: int) -> LabelledData:
        """The same data with at most ``examples_max`` held-out examples."""
        held_out = self.held_out.take(slice(examples_max))
        return replace(self, held_out=held_out, held_out_digest=_digest(held_out))

    def part(self, part: tuple[int, int] | None) -> Examples:
        """The training examples, or the k-th of n disjoint parts of them for ``part = (k, n)``, 1 <= k <= n."""
        if part is None:
            return self.train
        k, n = part
        length = len(self.train)
        return self.train.take(slice((k - 1) * length // n, k * length // n))


class LabelledBatches:
    """Batches drawn with replacement, each a pure function of (``seed``, batch number).

    With a ``preference`` an example's class is drawn first, by these weights among the classes that there are.
    Raises DataError without an example to draw.
    """

    def __init__(
        self, examples: Examples, *, seed: bytes, batch: int, preference: tuple[float, ...] | None
    ) -> None:
        self._examples = examples
        self._key = blake3(seed).digest()
        self._batch = batch
        self._count = len(examples)
        self._classes: _Classes | None = None
        if preference is not None:
            self._classes = _Classes(examples.y, preference)
            self._count = self._classes.count
        if not self._count:
            raise DataError(
                "this node has no examples to learn from",
                why="its part of the data, or of the classes it prefers, is empty",
                fix="add examples, or cut the data into fewer parts",
            )

    def at(self, number: int) -> Examples:
        """Batch ``number``: ``batch`` examples."""
        if self._classes is None:
            rows = (drawn(self._key, number, self._batch) % self._count).astype(np.intp)
        else:
            rows = self._classes.rows(drawn(self._key, number, 2 * self._batch))
        return self._examples.take(rows)


class _Classes:
    """Rows of the classes that have both examples and weight."""

    def __init__(self, y: Labels, preference: tuple[float, ...]) -> None:
        weights = np.zeros(int(max(y, default=0)) + 1)
        known = min(len(weights), len(preference))
        weights[:known] = preference[:known]
        self._sizes = np.bincount(y, minlength=len(weights))
        weights[self._sizes == 0] = 0.0
        self._order = np.argsort(y, kind="stable")
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._edges = np.cumsum(weights)
        self.count = int(self._sizes[weights > 0].sum())

    def rows(self, drawn: NDArray[np.uint64]) -> NDArray[np.intp]:
        """One row for each pair of numbers: the first decides the class, the second the example."""
        first, second = drawn.reshape(2, -1)
        # 53 bits make a fraction below 1, so that the last class with weight is the last one found.
        points = (first >> np.uint64(11)) * 2.0**-53 * self._edges[-1]
        classes = np.searchsorted(self._edges, points, side="right")
        places = second % self._sizes[classes].astype(np.uint64)
        rows: NDArray[np.intp] = self._order[self._starts[classes] + places.astype(np.intp)]
        return rows


def _by_hash(examples: Examples) -> tuple[Examples, list[bytes]]:
    """The different ones among ``examples`` by ascending hash, and the hashes."""
    rows = {
        blake3(x.tobytes() + y.tobytes()).digest(): row
        for row, (x, y) in enumerate(zip(examples.x, examples.y, strict=True))
    }
    keys = sorted(rows)
    return examples.take(np.array([rows[key] for key in keys], np.intp)), keys


def _digest(examples: Examples) -> bytes:
    return blake3(examples.x.tobytes()).update(examples.y.tobytes()).digest()


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays in a file. Raises DataError, naming it."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Before anything is unpacked; no more is read of a member than it says here.
            total = sum(member.file_size for member in archive.infolist())
        if total > DATA_BYTES_MAX:
            raise _unusable(path, f"its arrays have {total:,} bytes, {DATA_BYTES_MAX:,} are allowed")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if key in ("x", "y", "x_test", "y_test")}
    except OSError as error:
        raise DataError(
            f"cannot read examples from {path}: {error.strerror or error}",
            why="without examples there is nothing to train on",
            fix="name an existing .npz file that you may read",
        ) from error
    except (ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(path, str(error) or type(error).__name__) from error


def _checked(
    path: Path, arrays: dict[str, NDArray[np.generic]], x_key: str, y_key: str, *, inputs: int, classes: int
) -> Examples:
    for key in (x_key, y_key):
        if key not in arrays:
            raise _unusable(path, f"there is no array {key} in it")
    x, y = arrays[x_key], arrays[y_key]
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != inputs:
        raise _unusable(path, f"{x_key} is {x.dtype} {x.shape}, the model takes float32 (n, {inputs})")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise _unusable(path, f"{y_key} is {y.dtype} {y.shape}, expected integers {x.shape[:1]}")
    if len(y) > EXAMPLES_MAX:
        raise _unusable(path, f"{x_key} has {len(y):,} examples, {EXAMPLES_MAX:,} are allowed")
    if not np.isfinite(x).all():
        raise _unusable(path, f"{x_key} has an element that is not finite")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise _unusable(path, f"{y_key} has labels outside 0 to {classes - 1}, the classes of the model")
    return Examples(np.ascontiguousarray(x, np.float32), y.astype(np.int64))


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"cannot use the examples in {path}: {reason}",
        why="labelled data is an .npz file with x, float32 (n, features), and y, integers (n,)",
        fix="write one: numpy.savez(FILE, x=x.astype('float32'), y=y)",
    )
