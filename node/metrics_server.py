"""The metrics endpoint: one page over HTTP, for a Prometheus server that comes and asks.

Owns the listening socket and what strangers may cost: connections, bytes, seconds and the rate of all of them are
bounded, and a newcomer takes the place of whoever has been connected for longest, so that idle connections keep nobody
out. One request for each connection. Never knows what is on the page (``node.metrics``).
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Awaitable, Callable

import h11
import structlog
import trio
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from node.config import parse_host_and_port
from p2p.errors import AddressError, PortInUse

PATH = b"/metrics"
CLIENTS_MAX = 16
CLIENT_S_MAX = 5.0
"""From being accepted to the last byte of the answer."""
REQUEST_BYTES_MAX = 8 << 10
RECEIVE_BYTES = 4 << 10
ACCEPT_PAUSE_S = 0.02
"""Between two connections: fifty a second, whatever comes; the others wait in the kernel's queue."""
BACKLOG = 64

Page = Callable[[], Awaitable[bytes]]

log = structlog.get_logger()


async def listen_for_metrics(address: str) -> trio.SocketListener:
    """A socket that listens on ``address``, such as ``127.0.0.1:9464``. Raises PortInUse or AddressError."""
    host, port = parse_host_and_port(address)
    try:
        (listener,) = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host}, where metrics are to be served, is taken",
                why="another program, or another node, is listening there",
                fix=f"stop it (ss -ltnp 'sport = :{port}' names it) or choose another port: --metrics-listen",
            ) from error
        raise AddressError(
            f"cannot serve metrics on {address}: {error.strerror}",
            why="the setting metrics_listen asks for it",
            fix="listen on an address of this machine and a port above 1023, for example 127.0.0.1:9464",
        ) from error
    return listener


async def serve_metrics(listener: trio.SocketListener, page: Page) -> None:
    """Answer ``GET /metrics`` with ``page()`` until cancelled."""
    clients: deque[trio.CancelScope] = deque()

    async def serve_client(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        with scope:
            async with stream:
                await _serve(stream, page)
        if scope in clients:
            clients.remove(scope)

    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                # No file descriptor is left: whoever waits goes on waiting, and training goes on.
                log.warning("metrics cannot be served", problem=error.strerror)
                await trio.sleep(CLIENT_S_MAX)
                continue
            if len(clients) == CLIENTS_MAX:
                clients.popleft().cancel()
            clients.append(trio.CancelScope(deadline=trio.current_time() + CLIENT_S_MAX))
            nursery.start_soon(serve_client, stream, clients[-1])
            await trio.sleep(ACCEPT_PAUSE_S)


async def _serve(stream: trio.SocketStream, page: Page) -> None:
    """One request and its answer. Whatever goes wrong costs this connection alone."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
    try:
        request = await _read_request(connection, stream)
        if request is not None:
            await _send(connection, stream, *await _answer(request, page))
    except h11.RemoteProtocolError as error:
        with contextlib.suppress(trio.BrokenResourceError):
            await _send(connection, stream, error.error_status_hint, b"not a request\n")
    except trio.BrokenResourceError:
        return
    except Exception:
        log.exception("metrics request failed")


async def _read_request(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """What is asked for; None when the client left without asking."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.receive_some(RECEIVE_BYTES))
    return event if isinstance(event, h11.Request) else None


async def _answer(request: h11.Request, page: Page) -> tuple[int, bytes]:
    if request.method != b"GET":
        return 405, b""
    if request.target.partition(b"?")[0] != PATH:
        return 404, b"metrics are at /metrics\n"
    return 200, await page()


async def _send(connection: h11.Connection, stream: trio.SocketStream, status: int, body: bytes) -> None:
    headers = [
        ("Content-Type", CONTENT_TYPE_PLAIN_0_0_4),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    response = h11.Response(status_code=status, headers=headers)
    events = (response, h11.Data(data=body), h11.EndOfMessage())
    await stream.send_all(b"".join(connection.send(event) or b"" for event in events))
