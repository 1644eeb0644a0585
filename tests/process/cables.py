"""Cables: the links between node processes of one machine, so that a test can pull the cable of one of them.

Owns a forwarder for each node, which is the only address that others are told of, and the flows through them. While a
node is cut off, nothing passes on any flow from or to it, and nothing is closed either: as when a cable is pulled, only
the missing signs of life tell. A flow belongs to the process that dialled it, which the kernel knows by its two ports.
A flow whose dialler cannot be told is not carried, or it might pass a cable that is pulled.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import trio

from cli.node_commands import prepare_home
from cli.node_process import NodeProcess

CHUNK_BYTES_MAX = 1 << 16
LOOKS_MAX = 3
"""The kernel's table of connections is not read at one moment, so one that is there can be missing from it."""


class Cables:
    """Forwards between nodes."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._nodes: dict[str, NodeProcess] = {}
        self._addresses: dict[str, str] = {}
        self._mended: dict[str, trio.Event] = {}
        self.carried_bytes: dict[str, int] = {}
        """By node: what all flows have brought it."""

    async def plug_in(self, node: NodeProcess, port: int) -> None:
        """Let others find ``node``, which listens on ``port`` and was not started yet, through a forwarder only."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ours = listeners[0].socket.getsockname()[1]
        peer, _, _ = prepare_home(node.home)
        node.home.config_file.write_text(f'announce = ["/ip4/127.0.0.1/tcp/{ours}"]\n')
        self._nodes[node.name] = node
        self._addresses[node.name] = f"/ip4/127.0.0.1/tcp/{ours}/p2p/{peer}"
        self.carried_bytes[node.name] = 0

        async def forward(inbound: trio.SocketStream) -> None:
            await self._forward(inbound, node.name, port, dialled=ours)

        self._nursery.start_soon(trio.serve_listeners, forward, listeners)

    def address(self, node: NodeProcess) -> str:
        """Where others reach ``node``."""
        return self._addresses[node.name]

    def cut(self, node: NodeProcess) -> None:
        """Pull its cable."""
        self._mended[node.name] = trio.Event()

    def mend(self, node: NodeProcess) -> None:
        """Put its cable back; what was on its way goes on, if anybody still waits for it."""
        self._mended.pop(node.name).set()

    async def _forward(self, inbound: trio.SocketStream, target: str, port: int, *, dialled: int) -> None:
        with contextlib.suppress(OSError):  # It does not listen.
            async with inbound:
                dialler = self._owner(inbound.socket.getpeername()[1], dialled)
                if dialler is None:
                    return
                ends = (dialler, target)
                await self._intact(ends)
                outbound = await trio.open_tcp_stream("127.0.0.1", port)
                async with outbound, trio.open_nursery() as both:
                    both.start_soon(self._pump, inbound, outbound, ends, target, both.cancel_scope)
                    both.start_soon(self._pump, outbound, inbound, ends, dialler, both.cancel_scope)

    async def _pump(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        ends: tuple[str, str],
        receiver: str,
        flow: trio.CancelScope,
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # An end that was killed.
            while data := await source.receive_some(CHUNK_BYTES_MAX):
                await self._intact(ends)
                await sink.send_all(data)
                self.carried_bytes[receiver] += len(data)
        flow.cancel()

    async def _intact(self, ends: tuple[str, str]) -> None:
        """Wait until neither end is cut off."""
        while broken := [self._mended[name] for name in ends if name in self._mended]:
            await broken[0].wait()

    def _owner(self, port: int, dialled: int) -> str | None:
        """Who dialled from ``port`` to ``dialled``; in another process the same port may lead elsewhere."""
        for _ in range(LOOKS_MAX):
            for name, node in self._nodes.items():
                pid = node.row().pid
                if pid is None:
                    continue
                try:
                    held = psutil.Process(pid).net_connections(kind="tcp4")
                except psutil.Error:
                    continue
                if any(c.laddr.port == port and c.raddr and c.raddr.port == dialled for c in held):
                    return name
        return None


@asynccontextmanager
async def open_cables() -> AsyncIterator[Cables]:
    """Cables for as long as the block lasts."""
    async with trio.open_nursery() as nursery:
        yield Cables(nursery)
        nursery.cancel_scope.cancel()
