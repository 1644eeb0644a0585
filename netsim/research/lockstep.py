"""Members that average vectors over the simulated network in synchronous rounds, and what is measured of them.

Owns the rounds, a member's wires and the measurement. Whom a member calls, and what it makes of the answers, is its
exchange's: a subclass of ``Member``, written as a node would be, from what one member knows. Everything travels as
frames through streams of ``netsim.network`` and follows from one seed.

Round r lasts from r to r + 1 virtual seconds. What has not arrived when it ends is missing, and each exchange says what
that means to it. A lossy link breaks the connection under a request, or under its reply, with a given probability each.
"""

from __future__ import annotations

import abc
import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray

from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import open_sim_network
from p2p.codec import WireMessage
from p2p.errors import CallRefused, MalformedMessage, StreamBroken, TransportError
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, PeerRecord, ProtocolName, Transport

PROTOCOL = ProtocolName("/netsim/research/1")

ROUND_S = 1.0
"""Many times what a call takes on the simulated links."""

Vector: TypeAlias = NDArray[np.float64]
"""The values of one member, of shape (d,)."""

T = TypeVar("T")


class Message(WireMessage, frozen=True):
    """Base of what members say to each other."""


class Model(Message, frozen=True, kw_only=True):
    """The values of a member as they were when ``round`` began: fp64, little-endian."""

    round: int
    values: bytes


class Received(Message, frozen=True, kw_only=True):
    """Says that the other's message has arrived."""


class Seat:
    """What one member knows of the world: its number, how many there are, its dice, and wires to all of them."""

    def __init__(
        self, index: int, transport: Transport, others: Mapping[int, PeerRecord], *, seed: int, loss: float
    ) -> None:
        self.index = index
        self.seed = seed
        """Common to all members, for what they must draw alike."""
        self.rng = random.Random(f"{seed}/member/{index}")
        self.models_sent = 0
        self.lost = 0
        self._transport = transport
        self._records = others
        self._loss = loss
        self._luck = random.Random(f"{seed}/loss/{index}")

    @property
    def members(self) -> int:
        """n, oneself included."""
        return len(self._records) + 1

    @property
    def others(self) -> list[int]:
        """Everybody else, in order."""
        return list(self._records)

    def pack(self, values: Vector) -> bytes:
        """``values`` as they travel; counts as a model sent."""
        self.models_sent += 1
        return values.astype("<f8").tobytes()

    async def call(self, other: int, request: Message, reply_type: type[T]) -> T | None:
        """The reply of ``other``; None when the connection broke on the way there or on the way back."""
        record = self._records[other]
        try:
            self._endure()
            await self._transport.connect(record)
            reply = await call(self._transport, record.peer, PROTOCOL, request, reply_type, timeout_s=ROUND_S)
            self._endure()
        except TransportError:
            self.lost += 1
            return None
        return reply

    def _endure(self) -> None:
        if self._luck.random() < self._loss:
            raise StreamBroken("the link lost it")


class Member(abc.ABC):
    """One member's side of an exchange."""

    requests: ClassVar[Any]
    """The messages it answers."""

    def __init__(self, seat: Seat, values: Vector) -> None:
        self.seat = seat
        self.values = values
        """What it holds; changes between rounds only."""
        self.round = -1

    def begin(self, round_number: int) -> None:
        """A round begins, for all members at the same instant."""
        self.round = round_number

    @abc.abstractmethod
    async def talk(self) -> None:
        """Call others; cancelled when the round ends."""

    @abc.abstractmethod
    async def answer(self, sender: int, request: Any) -> Message:
        """The reply to a call of ``sender``. Raises CallRefused."""

    @abc.abstractmethod
    def end(self) -> None:
        """The round is over: what arrived goes into ``values``."""

    @property
    def estimate(self) -> Vector:
        """What it takes the average to be."""
        return self.values

    def check_round(self, round_number: int) -> None:
        """Refuse a call that belongs to another round."""
        if round_number != self.round:
            raise CallRefused("round", f"round {round_number} is over")


MemberFactory: TypeAlias = Callable[[Seat, Vector], Member]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a run came to."""

    estimates: NDArray[np.float64]
    """Of shape (rounds + 1, n, d): of every member, at the start and after each round."""
    models_sent: float
    """Per member and round."""
    lost: int
    """Calls without a reply."""

    @property
    def deviation(self) -> Vector:
        """Norm of the members' distance from their mean, as a share of that at the start; one for each round."""
        norms = np.linalg.norm(self.estimates - self.estimates.mean(axis=1, keepdims=True), axis=(1, 2))
        return np.asarray(norms / norms[0])

    @property
    def rho(self) -> float:
        """Contraction of the deviation per round, over all rounds; they must not reach the noise of rounding."""
        return float(self.deviation[-1] ** (1 / (len(self.estimates) - 1)))

    @property
    def drift(self) -> Vector:
        """Distance of the mean from that at the start, root mean square over elements, for each round.

        In standard deviations of the mean of n members that are as far apart as these were at the start.
        """
        means = self.estimates.mean(axis=1)
        unit = self.estimates[0].std(axis=0) / np.sqrt(self.estimates.shape[1])
        return np.asarray(np.sqrt((((means - means[0]) / unit) ** 2).mean(axis=1)))

    @property
    def error(self) -> Vector:
        """Norm of the members' distance from the initial mean, as a share of that at the start; one for each round."""
        norms = np.linalg.norm(self.estimates - self.estimates[0].mean(axis=0), axis=(1, 2))
        return np.asarray(norms / norms[0])


def run_lockstep(
    factory: MemberFactory, start: NDArray[np.float64], *, rounds: int, seed: int, loss: float = 0.0
) -> Outcome:
    """Run an exchange by itself, in virtual time. Member i begins with ``start[i]``, of shape (n, d)."""
    with deterministic_scheduling(seed):
        return trio.run(
            lambda: lockstep(factory, start, rounds=rounds, seed=seed, loss=loss), clock=SimClock()
        )


async def lockstep(
    factory: MemberFactory, start: NDArray[np.float64], *, rounds: int, seed: int, loss: float = 0.0
) -> Outcome:
    """Run an exchange within a simulation. ``loss`` is the chance of each message to be lost."""
    limits = Limits(peers_max=len(start))
    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(
            open_sim_network(random.Random(f"{seed}/network"), limits=limits)
        )
        hosts = [
            await stack.enter_async_context(network.open_host(PeerId(f"member-{index}")))
            for index in range(len(start))
        ]
        members = []
        for index, host in enumerate(hosts):
            others = {other: peer.local for other, peer in enumerate(hosts) if other != index}
            member = factory(Seat(index, host, others, seed=seed, loss=loss), start[index])
            _serve(host, member, limits)
            members.append(member)
        history = [np.stack([member.estimate for member in members])]
        began_s = trio.current_time()
        for number in range(rounds):
            ends_s = began_s + (number + 1) * ROUND_S
            for member in members:
                member.begin(number)
            with trio.move_on_at(ends_s):
                async with trio.open_nursery() as talks:
                    for member in members:
                        talks.start_soon(member.talk)
            await trio.sleep_until(ends_s)
            for member in members:
                member.end()
            history.append(np.stack([member.estimate for member in members]))
    return Outcome(
        estimates=np.stack(history),
        models_sent=sum(member.seat.models_sent for member in members) / (len(members) * rounds),
        lost=sum(member.seat.lost for member in members),
    )


def unpack(values: bytes) -> Vector:
    """What ``Seat.pack`` packed."""
    return np.frombuffer(values, dtype="<f8").astype(np.float64)


def mean_with(own: Vector, received: Mapping[int, Vector]) -> Vector:
    """The plain average of one's own values and those received, added in order of their senders."""
    return np.asarray(np.mean([own, *(received[sender] for sender in sorted(received))], axis=0))


def _serve(host: Transport, member: Member, limits: Limits) -> None:
    async def answer(peer: PeerId, request: Any) -> Message:
        return await member.answer(int(peer.removeprefix("member-")), request)

    def on_malformed(_: PeerId, error: MalformedMessage) -> None:
        raise error

    serve_calls(host, PROTOCOL, member.requests, answer, limits=limits, on_malformed=on_malformed)
