"""The text a run learns from, and the order in which a node reads it.

Owns the choice of files, the held-out split and the batches. Never writes, never leaves the machine, never
looks inside bytes: anything is text to a byte-level model.

The text is cut into units: a file, or for a file above 128 KiB its pieces of 32 KiB, so that one long file can be
learned from too. Units are ordered by their BLAKE3 hash and equal ones are kept once, so the same text gives the same
corpus wherever it lies. A unit is held out when its hash is 0 modulo 10; a text without any such unit gives up the
unit of the lowest hash.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from p2p.errors import GossamerError

TEXT_BYTES_MAX = 1 << 30
FILES_MAX = 1_000_000
WHOLE_FILE_BYTES_MAX = 128 << 10
PIECE_BYTES = 32 << 10

# Not part of every installation, or different on every machine.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Bytes = NDArray[np.uint8]

Symbols: TypeAlias = NDArray[np.integer[Any]]
"""A text as a model reads it: its bytes, or the numbers of a tokenizer's tokens."""


class DataError(GossamerError):
    """What a run learns from is missing, unreadable or not what its spec says."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """A text in two disjoint parts. ``held_out_digest`` (BLAKE3) tells whether two nodes evaluate on the same bytes."""

    train: Bytes
    held_out: Bytes
    held_out_digest: bytes

    @classmethod
    def load(cls, source: Literal["stdlib", "text"], path: Path | None) -> Corpus:
        """The corpus of ``source``: ``stdlib``, or ``text`` read from the file or folder ``path``. Raises DataError."""
        if source == "stdlib":
            return cls.of(_read(root := Path(sysconfig.get_path("stdlib")), _stdlib_files(root)))
        if path is None:
            raise DataError(
                "this run learns from your own text, and no path to it is set",
                why="its spec says data.source = text; each node brings its own files",
                fix="set data_path in config.toml, or pass --data PATH",
            )
        return cls.of(_read(path, _text_files(path)))

    @classmethod
    def of(cls, texts: list[bytes]) -> Corpus:
        """The corpus made of ``texts``, one per file. Raises DataError when there is too little of it."""
        units = {blake3(unit).digest(): unit for text in texts for unit in _units(text)}
        if len(units) < 2:
            raise DataError(
                f"the text is too short: {sum(map(len, texts)):,} bytes",
                why="some of it is set aside to measure the model on",
                fix=f"add files, or one file of more than {WHOLE_FILE_BYTES_MAX:,} bytes",
            )
        ordered = sorted(units)
        held = [key for key in ordered if int.from_bytes(key, "little") % 10 == 0] or ordered[:1]
        held_keys = set(held)
        return cls._split(
            train=b"".join(units[key] for key in ordered if key not in held_keys),
            held_out=b"".join(units[key] for key in held),
        )

    @classmethod
    def _split(cls, train: bytes, held_out: bytes) -> Corpus:
        return cls(
            train=np.frombuffer(train, np.uint8),
            held_out=np.frombuffer(held_out, np.uint8),
            held_out_digest=blake3(held_out).digest(),
        )

    def evaluated_on(self, bytes_max: int) -> Corpus:
        """The same corpus with at most ``bytes_max`` of held-out text."""
        held_out = self.held_out[:bytes_max]
        return replace(self, held_out=held_out, held_out_digest=blake3(held_out.tobytes()).digest())

    def part(self, part: tuple[int, int] | None) -> Bytes:
        """The training text, or its k-th of n contiguous, disjoint parts for ``part = (k, n)``, 1 <= k <= n."""
        if part is None:
            return self.train
        k, n = part
        length = len(self.train)
        return self.train[(k - 1) * length // n : k * length // n]


def held_out_windows(held_out: Symbols, context: int, unit: str = "byte") -> Symbols:
    """A held-out text as windows that overlap by one symbol: (windows, context + 1). Raises DataError."""
    if len(held_out) <= context:
        raise DataError(
            f"the held-out text has {len(held_out):,} {unit}s, a window needs {context + 1:,}",
            why="it is what the model is measured on",
            fix="add more text",
        )
    return np.lib.stride_tricks.sliding_window_view(held_out, context + 1)[::context]


class TextBatches:
    """Batches of text windows at random places, each a pure function of (``seed``, batch number).

    Raises DataError for a text shorter than a window.
    """

    def __init__(self, text: Symbols, *, seed: bytes, batch: int, context: int, unit: str = "byte") -> None:
        if len(text) <= context:
            raise DataError(
                f"this node's text has {len(text):,} {unit}s, a training window needs {context + 1:,}",
                why="a batch is made of windows as long as the model's context",
                fix="add text, or take a larger part of it",
            )
        self._key = blake3(seed).digest()
        self._batch = batch
        self._windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)

    def at(self, number: int) -> Symbols:
        """Batch ``number``: (batch, context + 1)."""
        batch: Symbols = self._windows[drawn(self._key, number, self._batch) % len(self._windows)]
        return batch


def drawn(key: bytes, number: int, count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit integers: a pure function of a 32-byte ``key`` and ``number``."""
    keyed = blake3(number.to_bytes(8, "little"), key=key)
    return np.frombuffer(keyed.digest(length=8 * count), "<u8")


def _units(text: bytes) -> Iterator[bytes]:
    if len(text) <= WHOLE_FILE_BYTES_MAX:
        yield text
    else:
        yield from (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _STDLIB_LEFT_OUT)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _text_files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _read(root: Path, files: Iterator[Path]) -> list[bytes]:
    """The bytes of all regular, non-empty files. Raises DataError, naming ``root`` or the file."""
    texts: list[bytes] = []
    total = 0
    try:
        for count, file in enumerate(files, start=1):
            status = file.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size:
                total += status.st_size
                if total > TEXT_BYTES_MAX or count > FILES_MAX:
                    raise DataError(
                        f"there is too much text in {root}",
                        why=f"it is held in memory: at most {TEXT_BYTES_MAX:,} bytes in {FILES_MAX:,} files",
                        fix="name a folder with less in it",
                    )
                texts.append(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read text from {error.filename or root}: {error.strerror}",
            why="without text there is nothing to train on",
            fix="name an existing file or folder that you may read",
        ) from error
    if not texts:
        raise DataError(
            f"there is no text in {root}",
            why="no regular, non-empty file was found (hidden ones are skipped)",
            fix="put files there, or name another folder",
        )
    return texts
