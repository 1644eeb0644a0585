"""What long benchmarks have done already, so that one that was stopped goes on where it was.

Owns a file of rows, one JSON line each, found again by their keys, and the digest of the code that a row is of. Never
knows what a row says: whoever makes one decides what its key depends on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import torch
from blake3 import blake3

import training


class KeptRow(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all rows."""

    key: str
    """Equal for rows that must come to the same."""


R = TypeVar("R", bound=KeptRow)


class KeptRows(Generic[R]):
    """The rows of one kind in one file."""

    def __init__(self, file: Path, row_type: type[R]) -> None:
        self._file = file
        self._by_key: dict[str, R] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                row = msgspec.json.decode(line, type=row_type)
            except msgspec.MsgspecError:
                continue  # Half a line, of a run that was killed, or one of another version of this file.
            self._by_key[row.key] = row

    def get(self, key: str) -> R | None:
        """The row with this key, if it is there."""
        return self._by_key.get(key)

    def add(self, row: R) -> None:
        """Keep a row: it is there after whatever happens next."""
        with self._file.open("ab") as out:
            if out.tell() and self._file.read_bytes()[-1:] != b"\n":
                out.write(b"\n")
            out.write(msgspec.json.encode(row) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        self._by_key[row.key] = row


_TELL_FILES = """
import importlib, sys
importlib.import_module(sys.argv[1])
for module in [*sys.modules.values()]:
    print(getattr(module, "__file__", None) or "")
"""


@cache
def code_digest(module: str) -> bytes:
    """Of every module of ours that ``module`` brings with it, as a fresh interpreter finds them, and of what runs them:
    a Python's library is a text to learn from, too."""
    root = Path(training.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", _TELL_FILES, module],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    files = {Path(line) for line in found.stdout.splitlines()}
    hasher = blake3(f"{sys.version} {torch.__version__}".encode())
    for file in sorted(file for file in files if file.is_relative_to(root) and ".venv" not in file.parts):
        hasher.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return hasher.digest()
