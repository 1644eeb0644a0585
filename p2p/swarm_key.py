"""The key of a private swarm: 32 secret bytes that all of its members hold and nobody else.

Owns the key's file, its text in an invite, and the keys that are derived from it, one for each use, so that no two uses
can be played against each other. Never prints or logs it. It is always drawn at random: what a stranger is told would
let one who guesses try a pass phrase against it.

The file has the form that other libp2p programs use for such keys (``/key/swarm/psk/1.0.0/``).
"""

from __future__ import annotations

import base64
import contextlib
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from p2p.errors import SwarmKeyError
from p2p.private_file import create_private, read_private

KEY_BYTES = 32
TEXT_CHARS = 52
"""Of base32 without padding."""

_FILE = "/key/swarm/psk/1.0.0/\n/base16/\n{}\n"
_FILE_FORM = re.compile(_FILE.format(r"(?P<key>[0-9a-f]{64})").removesuffix("\n") + r"\s*")


@dataclass(frozen=True, slots=True)
class SwarmKey:
    """The key of one private swarm. Compares by its bytes, and does not show them."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @classmethod
    def generate(cls) -> SwarmKey:
        """A new random key, not stored anywhere."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> SwarmKey | None:
        """The key stored in ``path``; None without such a file. Raises SwarmKeyError for one that cannot be used."""
        try:
            data = read_private(
                path,
                SwarmKeyError,
                use="without its key a node cannot connect to its private swarm",
                risk="whoever reads it can join the private swarm",
            )
        except FileNotFoundError:
            return None
        if (found := _FILE_FORM.fullmatch(data.decode(errors="replace"))) is None:
            raise SwarmKeyError(
                f"{path} holds no swarm key",
                why="the file is damaged or of another kind",
                fix="move it away and join again with an invite: gossamer join 'INVITE'",
            )
        return cls(bytes.fromhex(found["key"]))

    def store(self, path: Path) -> None:
        """Write the key to ``path`` with mode 0600, in place of whatever is there. Raises SwarmKeyError."""
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # of a process that died in here
                partial.unlink()
            create_private(partial, _FILE.format(self.secret.hex()).encode())
            partial.replace(path)
        except OSError as error:
            raise SwarmKeyError(
                f"cannot write {path}: {error.strerror}",
                why="a node keeps the key of its private swarm there",
                fix="name another folder: --home PATH, or GOSSAMER_HOME",
            ) from error

    @classmethod
    def from_text(cls, text: str) -> SwarmKey:
        """The key that ``text`` gives. Raises ValueError for anything but what a key's own ``text`` is."""
        if len(text) != TEXT_CHARS:
            raise ValueError(f"a swarm key has {TEXT_CHARS} characters")
        key = cls(base64.b32decode(text.upper() + "=" * (-len(text) % 8)))
        if key.text != text:
            raise ValueError("a swarm key is lower-case base32")
        return key

    @property
    def text(self) -> str:
        """As an invite has it: lower-case base32 without padding."""
        return base64.b32encode(self.secret).decode().rstrip("=").lower()

    def derived(self, use: str) -> bytes:
        """32 bytes for one ``use`` alone (BLAKE3's key derivation)."""
        return blake3(self.secret, derive_key_context=use).digest()
