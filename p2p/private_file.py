"""Files that only their owner may read: keys.

Owns the mode they are made with, and the refusal to read one that others can read too. Never looks at what is in them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from p2p.errors import GossamerError


def create_private(path: Path, data: bytes) -> None:
    """Write ``data`` durably to ``path`` with mode 0600. Raises FileExistsError for a file that is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_private(path: Path, error_type: type[GossamerError], *, use: str, risk: str) -> bytes:
    """The bytes of ``path``. Raises FileNotFoundError, or ``error_type`` where it cannot be read, or others can too.

    ``use``: what it is needed for; ``risk``: what somebody else could do with it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_type(
            f"cannot read {path}: {error.strerror}", why=use, fix=f"check the owner of {path}"
        ) from error
    if mode & 0o077:
        raise error_type(
            f"{path} can be read by other users (mode {mode:04o})", why=risk, fix=f"chmod 600 {path}"
        )
    return data
