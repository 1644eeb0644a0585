"""The history of a simulation as one hash: everything that is delivered and everything that happens, in order.

Owns what enters the hash, and the form in which a trace is written down. Equal hashes mean the same run.
"""

from __future__ import annotations

import json
import struct
from typing import TextIO

from blake3 import blake3

from netsim.connection import Frame
from netsim.results import Event

_STAMP = struct.Struct("<dIIBI")
"""How a delivery enters the hash: time, numbers of the two hosts, kind, stream; then its bytes."""


class Trace:
    """Hashes everything that is delivered and everything that happens; writes it down if asked to."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._hash = blake3()
        self._file = file

    def delivered(
        self, at_s: float, source: int, target: int, kind: Frame, stream_id: int, payload: bytes
    ) -> None:
        """A frame has arrived; hosts are told by number."""
        self._hash.update(_STAMP.pack(at_s, source, target, kind, stream_id))
        self._hash.update(payload)
        if self._file is not None:
            line = {
                "at_s": at_s,
                "from": source,
                "to": target,
                "frame": kind.name.lower(),
                "stream": stream_id,
                "bytes": len(payload),
            }
            self._file.write(json.dumps(line) + "\n")

    def happened(self, event: Event) -> None:
        """A fault, a merge, a phase: whatever is told of a run."""
        self._hash.update(repr(event).encode())
        if self._file is not None:
            line = {
                "at_s": event.at_s,
                "event": event.what,
                "machines": event.machines,
                "detail": event.detail,
            }
            self._file.write(json.dumps(line) + "\n")

    def hexdigest(self) -> str:
        """Of everything so far: equal for equal histories."""
        return self._hash.hexdigest()
