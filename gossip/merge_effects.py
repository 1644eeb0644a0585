"""What an attempt at a link wants done: what ``gossip.merge_proposer`` returns and ``gossip.merging`` carries out.

Owns their form and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossip.messages import (
    Ballot,
    CommittedRecord,
    MergeAccept,
    MergeCall,
    MergeOutlook,
    MergePlan,
    MergeRecord,
    SignedContribution,
)
from p2p.transport import PeerId


@dataclass(frozen=True, slots=True)
class Ask:
    """Send ``request`` to ``peer``; the reply, or its absence, comes back with ``stage``."""

    peer: PeerId
    request: MergeCall | MergePlan | MergeOutlook | MergeAccept
    stage: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Report the deadline of ``stage`` after ``seconds``."""

    stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Recompute:
    """Owners disagree about ``piece``: sum it here, and report."""

    piece: int
    contributors: tuple[SignedContribution, ...]


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look at the results of ``record`` before it is proposed, and report."""

    record: MergeRecord


@dataclass(frozen=True, slots=True)
class Suspect:
    """A peer broke a rule; ``code`` is for the ledger."""

    peer: PeerId
    code: str
    what: str


@dataclass(frozen=True, slots=True)
class Concluded:
    """The link is decided."""

    committed: CommittedRecord


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt came to nothing, and why; ``outbid`` is the highest ballot it lost against, if any."""

    why: str
    outbid: Ballot | None


Effect = Ask | Wait | Recompute | Inspect | Suspect | Concluded | Failed
