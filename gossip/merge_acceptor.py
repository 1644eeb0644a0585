"""The acceptor of one link of the merge chain: what it has promised and accepted, and how it answers.

Owns the two rules on which the agreement rests (Lamport, "Paxos Made Simple", 2001, section 2.2): a promise
excludes everything under a lower ballot, and whoever promises tells what it has accepted. Functions from a state
and a message to the state that must be on disk *before* the answer is sent, and the answer. IO-free. Whether a
record is a good one, and the one accepted before may be given up for it, is judged elsewhere (``gossip.merge_record``,
``gossip.merge_member``) before ``accept`` is asked.
"""

from __future__ import annotations

from gossip.messages import AcceptedRecord, Ballot, Hash, Message, Outbid
from p2p.errors import CallRefused

ATTEMPT_JUMP_MAX = 1 << 20
"""How far a ballot's attempt may be ahead of the last promised: nobody can use up the numbers."""


class AcceptorState(Message, frozen=True):
    """A member's word on the link after ``parent``; another link starts with no promise."""

    parent: Hash
    promised: Ballot | None = None
    accepted: AcceptedRecord | None = None


def promise(state: AcceptorState, ballot: Ballot) -> tuple[AcceptorState, AcceptedRecord | Outbid | None]:
    """Promise ``ballot`` unless a higher one is promised; the answer is the record accepted so far, or Outbid.

    The same ballot may be promised again: a proposer whose call was lost asks twice. Raises CallRefused.
    """
    if state.promised is not None and ballot < state.promised:
        return state, Outbid(ballot=state.promised)
    attempts = state.promised.attempt if state.promised is not None else 0
    if ballot.attempt > attempts + ATTEMPT_JUMP_MAX:
        raise CallRefused("ballot", f"attempt {ballot.attempt} is too far ahead of {attempts}")
    return AcceptorState(parent=state.parent, promised=ballot, accepted=state.accepted), state.accepted


def accept(state: AcceptorState, proposal: AcceptedRecord) -> tuple[AcceptorState, Outbid | None]:
    """Accept a record under a ballot unless a higher one is promised; the answer is None, or Outbid.

    Raises CallRefused for a second record under one ballot, which no honest proposer sends.
    """
    if state.promised is not None and proposal.ballot < state.promised:
        return state, Outbid(ballot=state.promised)
    accepted = state.accepted
    if accepted is not None and accepted.ballot == proposal.ballot and accepted.record != proposal.record:
        raise CallRefused("equivocation", "a second record under one ballot")
    return AcceptorState(parent=state.parent, promised=proposal.ballot, accepted=proposal), None
