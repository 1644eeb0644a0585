"""NodeState: the few facts of a node's life that outlast its process, beside checkpoints and promises.

Owns ``node.json`` in the run's folder. The incarnation is durable before the node says its first word, so the
notices of a restarted node always supersede those of its earlier lives.
"""

from __future__ import annotations

import msgspec
import structlog
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
        state = msgspec.json.decode(await disk.read(PATH), type=NodeState)
    except FileNotFoundError:
        state = NodeState(incarnation=int(wall_time_s))
    except msgspec.MsgspecError as error:
        log.warning("node state damaged, starting a new count", path=PATH, error=str(error))
        state = NodeState(incarnation=int(wall_time_s))
    state = replace(state, incarnation=state.incarnation + 1)
    await save_state(disk, state)
    return state


async def save_state(disk: Disk, state: NodeState) -> None:
    """Make ``state`` durable."""
    await disk.write_atomic(PATH, msgspec.json.encode(state))
