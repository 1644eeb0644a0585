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
    FragmentResult,
    MergeCall,
    MergeOffer,
    MergePlan,
    MergeResults,
    ShardRef,
    SignedContribution,
)
from p2p.limits import Limits
from p2p.transport import PeerId
from tests.gossip.merge_world import CheapSigner, peer_named
from tests.gossip.test_merge_schedules import FRAGMENTS, SHAPE, ref
from tests.gossip.world import RUN

LINK = Link.genesis(RUN)


def contribution_of(peer: PeerId) -> SignedContribution:
    inputs = [ref(peer, fragment) for fragment in range(FRAGMENTS)]
    return sign_contribution(CheapSigner(peer), LINK, Contribution(peer=peer, weight=1, inputs=inputs))


def sum_of(plan: MergePlan, fragment: int) -> ShardRef:
    """The right sum of one fragment under one plan."""
    return ref(fragment, [contribution.peer for contribution in plan.contributors])


def carried_out(proposal: Proposal, effects: list[Effect], liars: dict[int, PeerId]) -> list[Effect]:
    """Answer what a proposal asks until it wants its record looked at; ``liars`` sum their fragments wrongly."""
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
                owned = owners(plan.parent, names, FRAGMENTS, 2)
                results = [
                    FragmentResult(
                        fragment=fragment,
                        shard=ref("wrong") if liars.get(fragment) == peer else sum_of(plan, fragment),
                    )
                    for fragment in range(FRAGMENTS)
                    if peer in owned[fragment]
                ]
                effects += proposal.answered(peer, stage, MergeResults(results=results, missing=[]))
            case Recompute(fragment=fragment):
                assert plan is not None
                effects += proposal.recomputed(fragment, sum_of(plan, fragment))
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
        fragment_bytes=SHAPE,
        replicas=2,
        pace=MergePace(Limits()),
        signer=CheapSigner(names[0]),
    )
    liar = owners(LINK.parent, names, FRAGMENTS, 2)[0][0]
    first = carried_out(proposal, proposal.start(), {0: liar})
    assert [effect.peer for effect in first if isinstance(effect, Suspect)] == [liar]
    record = first[-1].record if isinstance(first[-1], Inspect) else None
    assert record is not None
    assert record.results[0] == ref(0, names)
    # The other fragment cannot be had: its owners are left out, and what is left is summed anew.
    second = carried_out(proposal, proposal.inspected(record, {1: None}), {})
    again = second[-1].record if isinstance(second[-1], Inspect) else None
    assert again is not None
    left = [contribution.peer for contribution in again.contributors]
    assert len(left) == 3
    assert again.results == [ref(fragment, left) for fragment in range(FRAGMENTS)]


def test_a_sum_that_the_other_owner_could_not_make_does_not_count() -> None:
    names = [peer_named(number) for number in range(5)]
    sums = Sums(
        [contribution_of(name) for name in names], parent=LINK.parent, fragment_bytes=SHAPE, replicas=2
    )
    owned = owners(LINK.parent, names, FRAGMENTS, 2)
    liar, honest = owned[0]
    for fragment, chosen in enumerate(owned):
        for owner in chosen:
            if (fragment, owner) != (0, honest):
                result = FragmentResult(fragment=fragment, shard=ref(fragment))
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
        parent=LINK.parent,
        fragment_bytes=SHAPE,
        replicas=replicas,
    )
    owned = owners(LINK.parent, names, FRAGMENTS, replicas)
    for owner in sorted(sums.owners()):
        if data.draw(st.booleans()):
            continue  # It never answers.
        missing = data.draw(st.lists(st.sampled_from(names), unique=True))
        results = [
            FragmentResult(fragment=fragment, shard=ref(fragment))
            for fragment in range(FRAGMENTS)
            if owner in owned[fragment] and not missing
        ]
        sums.take(owner, MergeResults(results=results, missing=missing))
    if not sums.complete():
        assert len(sums.reliable()) < len(names)
