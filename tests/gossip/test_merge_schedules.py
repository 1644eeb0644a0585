"""Acceptors and proposers under every kind of bad luck: never two different records decided for one link.

The machines run without a network: calls and replies lie in one bag from which a seeded generator draws, so that
they are lost, doubled, reordered and delayed past deadlines at will; proposers start, die and start again; acceptors
restart with what they had written, or die for good, which the others know at once. Sums are stood in for by names,
because nothing here depends on them.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.merge_acceptor import AcceptorState, accept, promise
from gossip.merge_effects import Ask, Concluded, Failed, Inspect
from gossip.merge_pace import MergePace
from gossip.merge_proposer import Proposal
from gossip.merge_record import (
    Link,
    can_decide,
    check_committed,
    check_record,
    electorate,
    owners,
    quorum,
    record_hash,
    sign_acknowledgement,
    sign_contribution,
)
from gossip.merge_shape import MergeShape
from gossip.merge_sums import cover
from gossip.messages import (
    AcceptedRecord,
    Ballot,
    Contribution,
    MergeAccept,
    MergeCall,
    MergeOffer,
    MergePlan,
    MergeRecord,
    MergeResults,
    Outbid,
    PieceResult,
    ShardRef,
)
from p2p.codec import decode, encode
from p2p.errors import CallRefused
from p2p.limits import Limits
from tests.gossip.merge_world import CheapSigner, peer_named
from tests.gossip.test_merge_record import FIRST, PEERS, record_on
from tests.gossip.world import RUN

PIECES = 2
SHAPE = MergeShape((8,) * PIECES)
LINKS = {"genesis": Link.genesis(RUN), "later": Link.after(record_on(Link.genesis(RUN), PEERS, PEERS))}


def ref(*words):
    return ShardRef(root=blake3(repr(words).encode()).digest(), size=8)


@dataclass
class Peer:
    """One member: an acceptor whose state is always written before it answers, and perhaps a proposer."""

    name: str
    link: Link
    state: AcceptorState = field(init=False)
    proposal: Proposal | None = None
    lives: int = 0
    forgetful: bool = False
    dead: set[str] = field(default_factory=set)
    """Who is gone for good."""

    def __post_init__(self):
        self.state = AcceptorState(parent=self.link.parent)

    def answer(self, request):
        """The reply, or None for a refusal."""
        try:
            match request:
                case MergeCall():
                    state, answer = promise(self.state, request.ballot)
                    self.write(state)
                    if isinstance(answer, Outbid):
                        return answer
                    inputs = [ref(self.name, self.lives, piece) for piece in range(PIECES)]
                    offer = Contribution(peer=self.name, weight=1, moved=list(range(PIECES)), inputs=inputs)
                    signed = sign_contribution(CheapSigner(self.name), self.link, offer)
                    return MergeOffer(contribution=signed, accepted=answer)
                case MergePlan():
                    names = [contribution.peer for contribution in request.contributors]
                    chosen = owners(request.parent, names, PIECES, 1)
                    results = [
                        PieceResult(
                            piece=piece,
                            shard=ref(piece, [c.signature for c in request.contributors]),
                            update=None,
                        )
                        for piece in range(PIECES)
                        if self.name in chosen[piece]
                    ]
                    return MergeResults(results=results, missing=[])
                case MergeAccept():
                    check_record(request.record, self.link, SHAPE, CheapSigner(self.name))
                    if request.record.ballot == request.ballot and not self.gives_up_for(request.record):
                        return None
                    state, outbid = accept(
                        self.state, AcceptedRecord(ballot=request.ballot, record=request.record)
                    )
                    self.write(state)
                    return outbid or sign_acknowledgement(
                        CheapSigner(self.name), request.record, request.ballot
                    )
        except CallRefused:
            return None

    def gives_up_for(self, record):
        """Whether nothing that was accepted here stands in the way of a new record."""
        if self.state.accepted is None or self.state.accepted.record == record:
            return True
        deciders = electorate(self.state.accepted.record, self.link)
        return not can_decide(deciders, self.dead - electorate(record, self.link))

    def write(self, state):
        """To disk and back, as every restart does."""
        if self.forgetful:
            state = AcceptorState(parent=state.parent, promised=state.promised)
        self.state = decode(encode(state), AcceptorState, bytes_max=1 << 20)


def decided_under(
    link: Link,
    count: int,
    seed: int,
    loss: float,
    *,
    forgetful: bool = False,
    wavering: bool = False,
    mortal: int = 0,
) -> list[tuple[MergeRecord, frozenset[str]]]:
    """The records decided on ``link`` by ``count`` members with the luck of ``seed``, and who had a voice in each.

    ``wavering``: each attempt takes up to two other members for absent. ``mortal``: so many die for good.
    """
    rng = random.Random(seed)
    names = [peer_named(number) for number in range(count)]
    dead = set()
    peers = {name: Peer(name, link, forgetful=forgetful, dead=dead) for name in names}
    bag = []
    decided = {}

    def perform(peer, proposal, effects):
        for effect in effects:
            match effect:
                case Ask():
                    bag.append(("request", peer, proposal, effect))
                case Inspect():
                    faults = (
                        {rng.randrange(PIECES): rng.choice([None, "norm"])} if rng.random() < loss else {}
                    )
                    perform(peer, proposal, proposal.inspected(effect.record, faults))
                case Concluded():
                    check_committed(effect.committed, link, SHAPE, CheapSigner(names[0]))
                    record = effect.committed.record
                    decided[record_hash(record)] = record, electorate(record, link)
                    peer.proposal = None
                case Failed():
                    peer.proposal = None

    for _ in range(120 * count):
        luck = rng.random()
        peer = peers[rng.choice([name for name in names if name not in dead])]
        if luck < 0.04:
            met = peer.state.promised.attempt if peer.state.promised else -1
            others = [name for name in names if name != peer.name]
            peer.proposal = Proposal(
                link=link,
                ballot=Ballot(attempt=met + 1, proposer=peer.name),
                point=1,
                alive=[name for name in names if name not in dead],
                absent=rng.sample(others, rng.randint(0, 2)) if wavering else link.voters(()) & dead,
                unheard=dead.intersection,
                shape=SHAPE,
                replicas=1,
                pace=MergePace(Limits()),
                signer=CheapSigner(peer.name),
            )
            # What a proposer promises itself is on disk before anybody hears of its ballot.
            state, _ = promise(peer.state, peer.proposal._ballot)
            peer.write(state)
            perform(peer, peer.proposal, peer.proposal.start())
        elif luck < 0.05:
            peer.proposal = None
            peer.lives += 1
        elif luck < 0.06 and len(dead) < mortal:
            peer.proposal = None
            dead.add(peer.name)
        elif luck < 0.08 and peer.proposal is not None:
            perform(peer, peer.proposal, peer.proposal.deadline(peer.proposal._stage))
        elif bag:
            index = rng.randrange(len(bag))
            message = bag[index] if rng.random() < 0.1 else bag.pop(index)
            if rng.random() < loss:
                continue
            match message:
                case "request", _, _, ask if ask.peer in dead:
                    continue
                case "request", asker, proposal, ask:
                    reply = peers[ask.peer].answer(ask.request)
                    bag.append(("reply", asker, proposal, (ask, reply)))
                case "reply", asker, proposal, (ask, reply):
                    if asker.proposal is not proposal:
                        continue
                    if reply is None:
                        effects = proposal.unanswered(ask.peer, ask.stage)
                    else:
                        effects = proposal.answered(ask.peer, ask.stage, reply)
                    perform(asker, proposal, effects)
    return list(decided.values())


@settings(max_examples=60, deadline=None)
@given(
    link=st.sampled_from(sorted(LINKS)),
    count=st.integers(1, 5),
    seed=st.integers(0, 1 << 32),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_one_link_is_never_decided_twice(link, count, seed, loss):
    # The electorate of the later link is always the same five; at genesis it is whoever takes part.
    assert len(decided_under(LINKS[link], count if link == "genesis" else 5, seed, loss)) <= 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), loss=st.sampled_from([0.0, 0.05, 0.3]))
def test_two_records_are_decided_only_where_their_quorums_need_not_meet(seed, loss):
    decided = decided_under(LINKS["later"], 5, seed, loss, wavering=True)
    for (_, one), (_, other) in itertools.combinations(decided, 2):
        assert quorum(one) + quorum(other) <= len(one | other)


@settings(max_examples=150, deadline=None)
@given(
    link=st.sampled_from(sorted(LINKS)),
    mortal=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_a_second_record_is_decided_only_without_a_quorum_of_the_first(link, mortal, seed, loss):
    """Whoever had a voice in the earlier one and has none in the later is dead; the others had to give it up."""
    for decision in itertools.combinations(decided_under(LINKS[link], 5, seed, loss, mortal=mortal), 2):
        (_, earlier), (_, later) = sorted(decision, key=lambda record_and_voters: record_and_voters[0].ballot)
        assert len(earlier & later) < quorum(earlier)


@pytest.mark.parametrize("link", LINKS)
def test_whoever_is_left_decides_whatever_was_accepted_before(link):
    assert all(decided_under(LINKS[link], 5, seed, 0.0, mortal=4) for seed in range(40))


def test_the_schedules_do_decide():
    decisions = sum(len(decided_under(LINKS["later"], 5, seed, 0.05)) for seed in range(20))
    assert decisions >= 10


def test_the_schedules_show_a_broken_acceptor():
    """A canary: acceptors that do not write down what they accepted decide twice, and it is seen."""
    assert any(len(decided_under(LINKS["later"], 5, seed, 0.05, forgetful=True)) > 1 for seed in range(60))


def test_an_old_record_is_proposed_again_only_with_promises_of_those_who_decide_about_it():
    """Else it would be decided beside one that they decided for since: here for that of the second proposer.

    The first proposer alone has accepted its own record when it takes three members for absent, and the third member
    that its second attempt reaches has already accepted another.
    """
    link = LINKS["later"]
    peers = [Peer(peer_named(number), link) for number in range(5)]

    def attempt(number, *, proposer, absent, called, accepting):
        """What an attempt ends in when only ``called`` are reached at first and only ``accepting`` at last."""
        proposal = Proposal(
            link=link,
            ballot=Ballot(attempt=number, proposer=peers[proposer].name),
            point=1,
            alive=[peers[one].name for one in called],
            absent=[peers[one].name for one in absent],
            unheard=lambda members: (),
            shape=SHAPE,
            replicas=1,
            pace=MergePace(Limits()),
            signer=CheapSigner(peers[proposer].name),
        )
        effects = proposal.start()
        while asked := [effect for effect in effects if isinstance(effect, Ask | Inspect)]:
            effects = []
            for ask in asked:
                if isinstance(ask, Inspect):
                    effects += proposal.inspected(ask.record, {})
                    continue
                reached = accepting if isinstance(ask.request, MergeAccept) else called
                peer = next(peer for peer in peers if peer.name == ask.peer)
                reply = peer.answer(ask.request) if peers.index(peer) in reached else None
                if reply is None:
                    effects += proposal.unanswered(ask.peer, ask.stage)
                else:
                    effects += proposal.answered(ask.peer, ask.stage, reply)
        return effects[-1]

    alone = attempt(0, proposer=0, absent=[], called=[0, 1, 2], accepting=[0])
    assert isinstance(alone, Failed)
    others = attempt(1, proposer=2, absent=[], called=[2, 3, 4], accepting=[2, 3, 4])
    assert isinstance(others, Concluded)
    again = attempt(2, proposer=0, absent=[2, 3, 4], called=[0, 1], accepting=[0, 1, 3])
    assert isinstance(again, Failed)
    assert again.why == "2 of the 3 promises needed for a record that was accepted before"


def test_an_acceptor_refuses_a_second_record_under_one_ballot():
    ballot = Ballot(attempt=0, proposer=PEERS[0])
    state, _ = accept(AcceptorState(parent=FIRST.parent), AcceptedRecord(ballot=ballot, record=FIRST))
    other = record_on(Link.genesis(RUN), contributors=PEERS[:2])
    with pytest.raises(CallRefused):
        accept(state, AcceptedRecord(ballot=ballot, record=other))
    accept(state, AcceptedRecord(ballot=ballot, record=FIRST))


def test_nobody_can_use_up_the_ballots():
    with pytest.raises(CallRefused):
        promise(AcceptorState(parent=bytes(32)), Ballot(attempt=1 << 40, proposer=PEERS[0]))


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([], ""),
        (["ab"], "b"),
        (["ab", "ac", "ad"], "a"),
        (["ad", "bd", "cd"], "d"),
        (["ab", "ba"], "a"),
        (["ad", "bd", "cd", "ab", "ac"], "ad"),
    ],
)
def test_blame_falls_on_who_is_in_most_reports(edges, expected):
    assert cover(tuple(edge) for edge in edges) == set(expected)
