"""The metrics endpoint on real sockets: what it answers, and that no client costs the node more than a connection."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node import metrics_server
from node.metrics_server import CLIENTS_MAX, REQUEST_BYTES_MAX, listen_for_metrics, serve_metrics
from p2p.errors import AddressError, PortInUse

TEXT = b"gossamer_step 7.0\n"
GET = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"

Open = Callable[[], Awaitable[trio.SocketStream]]


async def page() -> bytes:
    return TEXT


@asynccontextmanager
async def serving(page: metrics_server.Page = page) -> AsyncIterator[Open]:
    """An endpoint that serves ``page``; yields how to connect to it."""
    listener = await listen_for_metrics("127.0.0.1:0")
    host, port = listener.socket.getsockname()
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve_metrics, listener, page)
        yield lambda: trio.open_tcp_stream(host, port)
        nursery.cancel_scope.cancel()


async def ask(open_stream: Open, request: bytes = GET) -> tuple[int, bytes]:
    """The status and the body of the answer to ``request``."""
    with trio.fail_after(10):
        async with await open_stream() as stream:
            await stream.send_all(request)
            answer = await read_to_end(stream)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    received = b""
    try:
        async for chunk in stream:
            received += chunk
    except trio.BrokenResourceError:
        pass
    return received


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (GET, 200, TEXT),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", 200, TEXT),
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", 404, b"metrics are at /metrics\n"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: here\r\n\r\n", 405, b""),
        (b"POST /metrics HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabc", 405, b""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS greeting\r\n\r\n", 400, b"not a request\n"),
        (b"GET /metrics HTTP/1.1\r\nHost: here\r\nContent-Length: 1, 2\r\n\r\n", 400, b"not a request\n"),
    ],
)
async def test_what_is_answered(request_: bytes, status: int, body: bytes) -> None:
    async with serving() as open_stream:
        assert await ask(open_stream, request_) == (status, body)


@given(head=st.sampled_from([b"", b"GET /metrics HTTP/1.1\r\n", GET[:-2]]), rest=st.binary(max_size=200))
def test_whatever_comes_is_answered(head: bytes, rest: bytes) -> None:
    async def serve() -> bytes:
        theirs, ours = trio.testing.memory_stream_pair()
        await theirs.send_all(head + rest)
        await theirs.send_eof()
        async with ours:
            await metrics_server._serve(ours, page)
        return await read_to_end(theirs)

    # What ends in an exception gets no answer; who said nothing gets none either.
    assert trio.run(serve).startswith(b"HTTP/1.1 ") or not (head + rest).strip()


async def test_a_request_that_arrives_byte_by_byte() -> None:
    async with serving() as open_stream, await open_stream() as stream:
        for byte in GET:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.002)
        assert (await read_to_end(stream)).endswith(TEXT)


async def test_an_endless_request_is_cut_off() -> None:
    async with serving() as open_stream:
        async with await open_stream() as stream:
            sent = 0

            async def send_without_end() -> None:
                nonlocal sent
                await stream.send_all(b"GET /metrics HTTP/1.1\r\n")
                while True:
                    await stream.send_all(b"X-More: " + b"x" * 4096 + b"\r\n")
                    sent += 4096
                    await trio.sleep(0.005)

            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await send_without_end()
        # What is above the bound is what was already on its way.
        assert REQUEST_BYTES_MAX <= sent < 64 * REQUEST_BYTES_MAX
        assert await ask(open_stream) == (200, TEXT)


async def test_idle_connections_keep_nobody_out() -> None:
    async with serving() as open_stream, trio.open_nursery() as nursery:
        idle = [await open_stream() for _ in range(3 * CLIENTS_MAX)]
        for stream in idle:
            await stream.send_all(GET[:-1])
        began_s = trio.current_time()
        assert await ask(open_stream) == (200, TEXT)
        assert trio.current_time() - began_s < 3

        # Who came first has made room for who came last.
        closed = 0

        async def wait_closed(stream: trio.SocketStream) -> None:
            nonlocal closed
            assert await read_to_end(stream) == b""
            closed += 1

        for stream in idle:
            nursery.start_soon(wait_closed, stream)
        await trio.sleep(0.5)
        assert 2 * CLIENTS_MAX <= closed < 3 * CLIENTS_MAX
        nursery.cancel_scope.cancel()


async def test_an_idle_connection_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "CLIENT_S_MAX", 0.2)
    async with serving() as open_stream, await open_stream() as stream:
        with trio.fail_after(5):
            assert await read_to_end(stream) == b""


async def test_who_does_not_read_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "CLIENT_S_MAX", 0.3)

    async def long_page() -> bytes:
        return bytes(64 << 20)

    async with serving(long_page) as open_stream, await open_stream() as stream:
        await stream.send_all(GET)
        await trio.sleep(0.6)
        with trio.fail_after(5):
            assert len(await read_to_end(stream)) < 64 << 20


async def test_a_page_that_fails_costs_one_connection() -> None:
    failures = [ZeroDivisionError("a bug")]

    async def broken_once() -> bytes:
        if failures:
            raise failures.pop()
        return TEXT

    async with serving(broken_once) as open_stream:
        async with await open_stream() as stream:
            await stream.send_all(GET)
            assert await read_to_end(stream) == b""
        assert await ask(open_stream) == (200, TEXT)


async def test_running_out_of_files_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "CLIENT_S_MAX", 0.1)
    accept, failures = trio.SocketListener.accept, [OSError(errno.EMFILE, "Too many open files")]

    async def exhausted_once(listener: trio.SocketListener) -> trio.SocketStream:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", exhausted_once)
    async with serving() as open_stream:
        assert await ask(open_stream) == (200, TEXT)
    assert not failures


async def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1") as refused:
            await listen_for_metrics(f"127.0.0.1:{port}")
    assert "--metrics-listen" in refused.value.fix


async def test_an_address_of_another_machine() -> None:
    with pytest.raises(AddressError, match=r"192\.0\.2\.1:9464") as refused:
        await listen_for_metrics("192.0.2.1:9464")
    assert "127.0.0.1:9464" in refused.value.fix
