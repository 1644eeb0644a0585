"""One plan's sums: nothing of an earlier plan gets into a record, and after a plan that fails comes a smaller one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gossip.merge_effects import Ask, Effect, Inspect, Recompute, Suspect
from gossip.merge_pace import MergePace
from gossip.merge_proposer import Proposal
from gossip.merge_record import Link, owners, sign_contribution
from gossip.merge_sums import Sums
from gossip.messages import (
    Ballot,
    Contribution,
    MergeCall,
    MergeOffer,
    MergePlan,
    MergeResults,
    PieceResult,
    ShardRef,
    SignedContribution,
)
from p2p.limits import Limits
from p2p.transport import PeerId
from tests.gossip.merge_world import CheapSigner, peer_named
from tests.gossip.test_merge_schedules import PIECES, SHAPE, ref
from tests.gossip.world import RUN

LINK = Link.genesis(RUN)


def contribution_of(peer: PeerId) -> SignedContribution:
    inputs = [ref(peer, piece) for piece in range(PIECES)]
    return sign_contribution(
        CheapSigner(peer), LINK, Contribution(peer=peer, weight=1, moved=list(range(PIECES)), inputs=inputs)
    )


def sum_of(plan: MergePlan, piece: int) -> ShardRef:
    """The right sum of one piece under one plan."""
    return ref(piece, [contribution.peer for contribution in plan.contributors])


def carried_out(proposal: Proposal, effects: list[Effect], liars: dict[int, PeerId]) -> list[Effect]:
    """Answer what a proposal asks until it wants its record looked at; ``liars`` sum their pieces wrongly."""
    plan: MergePlan | None = None
    done: list[Effect] = []
    while effects:
        effect = effects.pop(0)
        done.append(effect)
        match effect:
            case Ask(peer=peer, request=MergeCall(), stage=stage):
                offer = MergeOffer(contribution=contribution_of(peer), accepted=None)
                effects += proposal.answered(peer, stage, offer)
            case Ask(peer=peer, request=MergePlan() as plan, stage=stage):
                names = [contribution.peer for contribution in plan.contributors]
                owned = owners(plan.parent, names, PIECES, 2)
                results = [
                    PieceResult(
                        piece=piece,
                        shard=ref("wrong") if liars.get(piece) == peer else sum_of(plan, piece),
                        update=None,
                    )
                    for piece in range(PIECES)
                    if peer in owned[piece]
                ]
                effects += proposal.answered(peer, stage, MergeResults(results=results, missing=[]))
            case Recompute(piece=piece):
                assert plan is not None
                right = PieceResult(piece=piece, shard=sum_of(plan, piece), update=None)
                effects += proposal.recomputed(piece, right)
    return done


def test_what_was_settled_in_one_plan_is_not_used_in_the_next() -> None:
    names = [peer_named(number) for number in range(5)]
    proposal = Proposal(
        link=LINK,
        ballot=Ballot(attempt=0, proposer=names[0]),
        point=1,
        alive=names,
        absent=[],
        unheard=lambda members: [],
        shape=SHAPE,
        replicas=2,
        pace=MergePace(Limits()),
        signer=CheapSigner(names[0]),
    )
    liar = owners(LINK.parent, names, PIECES, 2)[0][0]
    first = carried_out(proposal, proposal.start(), {0: liar})
    assert [effect.peer for effect in first if isinstance(effect, Suspect)] == [liar]
    record = first[-1].record if isinstance(first[-1], Inspect) else None
    assert record is not None
    assert record.results[0] == ref(0, names)
    # The other piece cannot be had: its owners are left out, and what is left is summed anew.
    second = carried_out(proposal, proposal.inspected(record, {1: None}), {})
    again = second[-1].record if isinstance(second[-1], Inspect) else None
    assert again is not None
    left = [contribution.peer for contribution in again.contributors]
    assert len(left) == 3
    assert again.results == [ref(piece, left) for piece in range(PIECES)]


def test_a_sum_that_the_other_owner_could_not_make_does_not_count() -> None:
    names = [peer_named(number) for number in range(5)]
    sums = Sums(
        [contribution_of(name) for name in names], link=LINK, moved=range(PIECES), shape=SHAPE, replicas=2
    )
    owned = owners(LINK.parent, names, PIECES, 2)
    liar, honest = owned[0]
    for piece, chosen in enumerate(owned):
        for owner in chosen:
            if (piece, owner) != (0, honest):
                result = PieceResult(piece=piece, shard=ref(piece), update=None)
                sums.take(owner, MergeResults(results=[result], missing=[]))
    assert sums.complete()
    sums.take(honest, MergeResults(results=[], missing=[liar]))
    assert not sums.complete()
    assert [contribution.peer for contribution in sums.reliable()] == [n for n in names if n != liar]


@given(st.data())
def test_a_plan_that_is_not_complete_is_followed_by_a_smaller_one(data: st.DataObject) -> None:
    names = [peer_named(number) for number in range(data.draw(st.integers(1, 6)))]
    replicas = data.draw(st.integers(1, 3))
    sums = Sums(
        [contribution_of(name) for name in names],
        link=LINK,
        moved=range(PIECES),
        shape=SHAPE,
        replicas=replicas,
    )
    owned = owners(LINK.parent, names, PIECES, replicas)
    for owner in sorted(sums.owners()):
        if data.draw(st.booleans()):
            continue  # It never answers.
        missing = data.draw(st.lists(st.sampled_from(names), unique=True))
        results = [
            PieceResult(piece=piece, shard=ref(piece), update=None)
            for piece in range(PIECES)
            if owner in owned[piece] and not missing
        ]
        sums.take(owner, MergeResults(results=results, missing=missing))
    if not sums.complete():
        assert len(sums.reliable()) < len(names)
