"""What the daemon tells systemd, read from the socket that systemd would read it from."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from node.service_manager import STATUS_CHARS_MAX, TELL_EVERY_S, ServiceManager

PID = 4711


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def words(sock: socket.socket) -> Iterator[str]:
    """What has arrived, a datagram at a time."""
    while True:
        try:
            yield sock.recv(4096).decode()
        except BlockingIOError:
            return


async def told_for(seconds: float, environ: dict[str, str], status: str = "training") -> None:
    """Live for so long under the manager that ``environ`` names."""
    with trio.move_on_after(seconds):
        await ServiceManager(environ, pid=PID).keep_told(lambda: status)


async def test_ready_comes_first_and_once(manager_socket: socket.socket, autojump_clock: MockClock) -> None:
    environ = {"NOTIFY_SOCKET": manager_socket.getsockname()}
    await told_for(3.5 * TELL_EVERY_S, environ, "training, step 5\nof 10")
    first, *rest = words(manager_socket)
    assert first == "READY=1"
    assert rest == ["WATCHDOG=1\nSTATUS=training, step 5 of 10"] * 4


async def test_the_watchdog_is_fed_twice_in_its_time(
    manager_socket: socket.socket, autojump_clock: MockClock
) -> None:
    environ = {"NOTIFY_SOCKET": manager_socket.getsockname(), "WATCHDOG_USEC": "4000000"}
    await told_for(9, environ | {"WATCHDOG_PID": str(PID)})
    assert sum(word.startswith("WATCHDOG=1") for word in words(manager_socket)) == 5
    await told_for(9, environ | {"WATCHDOG_PID": str(PID + 1)})  # Somebody else's.
    assert sum(word.startswith("WATCHDOG=1") for word in words(manager_socket)) == 2


async def test_an_event_loop_that_stands_still_feeds_no_watchdog(manager_socket: socket.socket) -> None:
    """Real time: the manager would kill a daemon whose loop does not turn, and nothing feeds it behind its back."""
    environ = {"NOTIFY_SOCKET": manager_socket.getsockname(), "WATCHDOG_USEC": "100000"}
    manager = ServiceManager(environ, pid=PID)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.keep_told, lambda: "")
        await trio.sleep(0.02)
        before = list(words(manager_socket))
        manager_socket.setblocking(True)
        manager_socket.settimeout(0.3)  # This task keeps the loop.
        with pytest.raises(TimeoutError):
            manager_socket.recv(4096)
        nursery.cancel_scope.cancel()
    assert len(before) == 2


async def test_abstract_sockets_and_long_words(autojump_clock: MockClock) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # Linux picks an abstract name.
        sock.setblocking(False)
        name = sock.getsockname()
        await told_for(1, {"NOTIFY_SOCKET": "@" + name[1:].decode()}, "word " * 1000)
        _, told = words(sock)
    assert len(told.partition("STATUS=")[2]) == STATUS_CHARS_MAX


@pytest.mark.parametrize(
    "environ",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "/nowhere/at/all"}],
)
async def test_nobody_to_tell_is_no_trouble(environ: dict[str, str], autojump_clock: MockClock) -> None:
    await told_for(100, environ)


async def test_a_manager_that_does_not_read_holds_nothing_up(
    manager_socket: socket.socket, autojump_clock: MockClock
) -> None:
    environ = {"NOTIFY_SOCKET": manager_socket.getsockname(), "WATCHDOG_USEC": "2"}
    manager, told = ServiceManager(environ, pid=PID), itertools.count()
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.keep_told, lambda: str(next(told)))
            while next(told) < 20_000:
                await trio.sleep(1e-4)
            nursery.cancel_scope.cancel()
    assert next(told) >= 20_000
