"""What a listener does with streams whose protocol it does not speak. Virtual time, raw frames."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2p.protocols import Protocols
from p2p.transport import PeerId
from p2p.yamux import ACK, DATA, FIN, PING, RST, SYN, WINDOW_UPDATE
from tests.p2p.test_yamux import LIMITS, Wire

PEER = PeerId("them")
REFUSED = b"\x13/multistream/1.0.0\n" + b"\x03/x\n"


class Listener(Wire):
    """Serves nothing on the session at the other end of the wire."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.protocols = Protocols(LIMITS, nursery)
        nursery.start_soon(self._accept)

    async def _accept(self) -> None:
        while True:
            stream = await self.session.accept_stream()
            assert self.protocols.admit(PEER)
            self.protocols.answer(PEER, stream)

    async def refuse(self, ahead: bytes) -> None:
        """Have a proposal and what was sent ``ahead`` refused: "na", then the end of the stream, and no reset."""
        data = REFUSED + ahead
        await self.send(DATA, SYN, 1, len(data), data)
        said = [(await self.receive())[:2] for _ in range(4)]
        assert said == [(WINDOW_UPDATE, ACK), (DATA, 0), (DATA, 0), (WINDOW_UPDATE, FIN)]

    def slots_free(self) -> int:
        """Streams that the peer may still open; takes them."""
        count = 0
        while self.protocols.admit(PEER):
            count += 1
        return count


@pytest.fixture
def listener(autojump_clock: object, nursery: trio.Nursery) -> Listener:
    return Listener(nursery)


async def test_a_dialler_that_hears_a_refusal_leaves_in_peace(
    autojump_clock: object, listener: Listener
) -> None:
    await listener.refuse(b"\0\0\0\5hello")
    await listener.send(DATA, 0, 1, 5, b"there")
    await listener.send(WINDOW_UPDATE, FIN, 1, 0)
    await trio.testing.wait_all_tasks_blocked()
    await listener.send(WINDOW_UPDATE, SYN, 3, 0)
    assert (await listener.receive())[1:3] == (ACK, 3), "nothing more about the first stream"
    assert listener.session.streams_open == 1
    assert listener.slots_free() == LIMITS.streams_per_peer_max - 1


async def test_a_refused_dialler_that_goes_on_is_cut_off_after_one_window(
    autojump_clock: object, listener: Listener
) -> None:
    await listener.refuse(b"\0")
    quarter = LIMITS.receive_window_bytes // 4
    frames: list[int] = []
    started = trio.current_time()
    for _ in range(6):
        await listener.send(DATA, 0, 1, quarter, bytes(quarter))
        await trio.testing.wait_all_tasks_blocked()
        if not listener.session.streams_open:
            break
    while not frames or not frames[-1] & RST:
        frames.append((await listener.receive())[1])
    assert trio.current_time() == started
    assert len(frames) <= 3, "a window granted again, at most"
    assert not listener.session.reason
    assert listener.slots_free() == LIMITS.streams_per_peer_max


async def test_a_refused_dialler_that_stays_is_let_go_of_in_time(
    autojump_clock: object, listener: Listener
) -> None:
    started = trio.current_time()
    await listener.refuse(b"\0")
    while listener.session.streams_open:
        await listener.send(PING, ACK, 0, 0)
        await trio.sleep(1)
    assert trio.current_time() - started <= LIMITS.stream_timeout_s + 1
    assert (await listener.receive())[1] == RST
    await trio.testing.wait_all_tasks_blocked()
    assert listener.slots_free() == LIMITS.streams_per_peer_max
