"""NodeState: the few facts of a node's life that outlast its process, beside checkpoints and promises.

Owns ``node.json`` in the run's folder, which holds its own hash: one rotten digit would send a node back in time, or
have it report weights that it does not hold. The incarnation is durable before the node says its first word, so the
notices of a restarted node always supersede those of its earlier lives.
"""

from __future__ import annotations

import msgspec
import structlog
from blake3 import blake3
from msgspec.structs import replace

from gossip.disk import Disk
from node.status import MergeReport

PATH = "node.json"

log = structlog.get_logger()


class NodeState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node must remember about itself."""

    incarnation: int = 0
    """Grows by one with every start."""
    tokens_at_anchor: int = 0
    """Tokens trained on when the last merge was adopted: what this node's next merge weight counts from."""
    last_merge: MergeReport | None = None
    """The merge whose anchor the newest checkpoint builds on; None before the first."""


async def begin_life(disk: Disk, *, wall_time_s: float) -> NodeState:
    """Load the state and start the next incarnation, durable on return.

    A lost or damaged file must not send a node back in time, so the wall clock stands in for the lost counter.
    """
    try:
        state = _decoded(await disk.read(PATH))
    except FileNotFoundError:
        state = NodeState(incarnation=int(wall_time_s))
    except ValueError as error:
        log.warning("node state damaged, starting a new count", path=PATH, error=str(error))
        state = NodeState(incarnation=int(wall_time_s))
    state = replace(state, incarnation=state.incarnation + 1)
    await save_state(disk, state)
    return state


async def save_state(disk: Disk, state: NodeState) -> None:
    """Make ``state`` durable."""
    data = msgspec.json.encode(state)
    await disk.write_atomic(
        PATH, msgspec.json.encode(_Stored(hash=blake3(data).hexdigest(), state=msgspec.Raw(data)))
    )


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: ``state`` is the JSON of a NodeState, ``hash`` the BLAKE3 of those bytes in hex."""

    hash: str
    state: msgspec.Raw


def _decoded(data: bytes) -> NodeState:
    """The state in the bytes of a file. Raises ValueError when a bit of it has changed."""
    try:
        stored = msgspec.json.decode(data, type=_Stored)
        if blake3(bytes(stored.state)).hexdigest() != stored.hash:
            raise ValueError("its bytes do not match their hash")
        return msgspec.json.decode(stored.state, type=NodeState)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
