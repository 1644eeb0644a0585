"""The port that the router is asked for: kept while it can be had, given back at the end, and what a router may do."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trio

from node import port_mapping
from node.port_mapping import (
    AGAIN_S,
    LEASE_S,
    PORTS_TRIED_MAX,
    TAKE_BACK_S_MAX,
    PortMapping,
    RouterError,
    UpnpRouter,
    mapped_address,
    worth_mapping,
)
from p2p.service import open_service_nursery
from tests.conftest import Entries

PORT = 4100
OUTSIDE = "45.3.0.1"
HERE = f"/ip4/{OUTSIDE}/tcp/{PORT}"


class FakeRouter:
    """Forwards what it is asked for, until the lease ends, unless it is told not to."""

    def __init__(self) -> None:
        self.there = True
        self.hangs = False
        self.external = OUTSIDE
        self.taken: set[int] = set()
        self.until_s: dict[int, float] = {}
        self.deleted: list[int] = []
        self.searches = 0
        self.heard: list[tuple[str, ...]] = []

    @contextlib.asynccontextmanager
    async def mapped(self) -> AsyncIterator[None]:
        """The port is kept mapped for the length of the block; ``heard`` is what was told of it."""
        mapping = PortMapping(self, PORT)
        mapping.on_change(lambda addresses: self.heard.append(tuple(addresses)))
        async with open_service_nursery() as nursery:
            nursery.start_soon(mapping.keep_mapped)
            await trio.sleep(1)
            yield

    async def discover(self) -> None:
        self.searches += 1
        await self._answer()

    async def add(self, external_port: int, port: int, lease_s: int) -> None:
        await self._answer()
        assert port == PORT
        if external_port in self.taken:
            raise RouterError("ConflictInMappingEntry")
        self.until_s[external_port] = trio.current_time() + lease_s

    async def delete(self, external_port: int) -> None:
        self.deleted.append(external_port)
        await self._answer()

    async def external_address(self) -> str:
        await self._answer()
        return self.external

    async def _answer(self) -> None:
        await (trio.sleep_forever() if self.hangs else trio.lowlevel.checkpoint())
        if not self.there:
            raise RouterError("no router answers")


async def test_a_port_is_forwarded_for_as_long_as_the_node_lives(autojump_clock: trio.abc.Clock) -> None:
    router = FakeRouter()
    async with router.mapped():
        for _ in range(10):
            await trio.sleep(LEASE_S / 3)
            assert router.until_s[PORT] - trio.current_time() >= LEASE_S / 2 - 1, "renewed after half of it"
        assert router.heard == [(), (HERE,)], "told once, not at each renewal"
        router.external = "45.3.0.2"
        await trio.sleep(LEASE_S)
        assert router.heard[2:] == [(f"/ip4/45.3.0.2/tcp/{PORT}",)]
        assert (router.searches, router.deleted) == (1, [])
    assert router.deleted == [PORT]


async def test_another_port_where_the_first_is_taken(autojump_clock: trio.abc.Clock) -> None:
    router = FakeRouter()
    router.taken = {PORT, PORT + 1}
    async with router.mapped():
        assert router.heard[-1] == (f"/ip4/{OUTSIDE}/tcp/{PORT + 2}",)
    assert router.deleted == [PORT + 2]


async def test_nothing_of_others_is_given_back(autojump_clock: trio.abc.Clock) -> None:
    router = FakeRouter()
    router.taken = set(range(PORT, PORT + PORTS_TRIED_MAX))
    async with router.mapped():
        pass
    assert (router.heard, router.until_s, router.deleted) == ([()], {}, [])


@pytest.mark.parametrize("external", ["192.168.0.7", "100.64.0.7", "0.0.0.0", "2001:db8::7", "\x1b[2J", ""])
async def test_an_address_that_is_not_of_the_internet_is_told_to_nobody(
    autojump_clock: trio.abc.Clock, told: Entries, external: str
) -> None:
    router = FakeRouter()
    router.external = external
    async with router.mapped():
        await trio.sleep(3 * LEASE_S)
        assert router.heard == [()]
        (entry,) = told
        assert "not on the internet" in entry["event"]
        assert str(entry["address"]).isprintable()
        router.external = OUTSIDE
        await trio.sleep(LEASE_S)
        assert router.heard[-1] == (HERE,)


async def test_a_router_goes_and_comes_back(autojump_clock: trio.abc.Clock, told: Entries) -> None:
    router = FakeRouter()
    router.there = False
    async with router.mapped():
        await trio.sleep(3 * AGAIN_S)
        assert len(told) == 1, "said once"
        for _ in range(2):
            router.there = True
            await trio.sleep(AGAIN_S)
            assert router.heard[-1] == (HERE,)
            router.there = False
            await trio.sleep(LEASE_S / 2)
            assert router.heard[-1] == ()
    assert not router.deleted, "another one may have taken its place"


async def test_a_router_that_hangs_delays_the_end_by_little(autojump_clock: trio.abc.Clock) -> None:
    router = FakeRouter()
    async with router.mapped():
        router.hangs = True
        began_s = trio.current_time()
    assert trio.current_time() - began_s == pytest.approx(TAKE_BACK_S_MAX)
    assert router.deleted == [PORT]


@pytest.mark.parametrize(
    ("listening", "own", "expected"),
    [
        (["/ip4/0.0.0.0/tcp/4100"], ["/ip4/192.168.1.7/tcp/4100"], ("0.0.0.0", 4100)),
        (["/ip6/::/tcp/9", "/ip4/127.0.0.1/tcp/8", "/ip4/10.0.0.7/tcp/7"], [], ("10.0.0.7", 7)),
        (["/ip4/127.0.0.1/tcp/4100"], ["/ip4/127.0.0.1/tcp/4100"], None),
        (["/ip6/::/tcp/4100"], ["/ip6/2001:db8::7/tcp/4100"], None),
        (["/ip4/0.0.0.0/tcp/4100"], ["/ip4/10.0.0.7/tcp/4100", "/ip4/45.3.0.7/tcp/4100"], None),
    ],
)
def test_the_router_is_asked_where_it_makes_sense(
    listening: list[str], own: list[str], expected: tuple[str, int] | None
) -> None:
    assert worth_mapping(listening, own) == expected


def test_nobody_is_sent_to_a_group() -> None:
    assert mapped_address("224.0.1.1", PORT) is None


# --- over the library and sockets -------------------------------------------------------------------------------------

GROUP = "239.255.255.250"
DEVICE = "<device><deviceType>urn:schemas-upnp-org:device:{}:1</deviceType>{}</device>"
SERVICE = (
    "<serviceList><service><serviceType>urn:schemas-upnp-org:service:{}:1</serviceType>"
    "<controlURL>{}</controlURL></service></serviceList>"
)
ANSWER = (
    '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
    '<u:{0}Response xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:1">{1}</u:{0}Response></s:Body></s:Envelope>'
)
FAULT = (
    '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><detail>'
    '<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>718</errorCode></UPnPError>'
    "</detail></s:Fault></s:Body></s:Envelope>"
)


class Gateway(ThreadingHTTPServer):
    """An internet gateway device on loopback, as much of one as is asked: found by SSDP, answers SOAP."""

    daemon_threads = True

    def __init__(self, control_host: str = "127.0.0.1") -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.control = f"http://{control_host}:{self.server_port}/control"
        self.mapped: dict[str, tuple[str, ...]] = {}
        self.taken = {"4100"}
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._group = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._group.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._group.bind((GROUP, 1900))
        member = socket.inet_aton(GROUP) + socket.inet_aton("127.0.0.1")
        self._group.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)

    def handle_error(self, *_: object) -> None:
        """Whoever asked has hung up."""

    @contextlib.contextmanager
    def answering(self) -> Iterator[Gateway]:
        for task in (self.serve_forever, self._be_found):
            threading.Thread(target=task, daemon=True).start()
        try:
            yield self
        finally:
            self.goes_on.set()
            self.shutdown()
            self.server_close()
            self._group.close()

    def _be_found(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, asker = self._group.recvfrom(2048)
                kind = re.search(rb"ST: *(\S+)", asked)
                location = f"http://127.0.0.1:{self.server_port}/root.xml"
                found = f"HTTP/1.1 200 OK\r\nST: {kind[1].decode()}\r\nUSN: uuid:1\r\nLOCATION: {location}\r\n\r\n"
                self._group.sendto(found.encode(), asker)


class _Answers(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        connection = DEVICE.format(
            "WANConnectionDevice", SERVICE.format("WANIPConnection", self.server.control)
        )
        common = SERVICE.format("WANCommonInterfaceConfig", "/common")
        wan = DEVICE.format("WANDevice", f"{common}<deviceList>{connection}</deviceList>")
        root = DEVICE.format("InternetGatewayDevice", f"<deviceList>{wan}</deviceList>")
        self._send(200, f'<root xmlns="urn:schemas-upnp-org:device-1-0">{root}</root>')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        told = dict(re.findall(r"<New(\w+)>([^<]*)</", body))
        action = self.headers["SOAPAction"].strip('"').partition("#")[2]
        self.server.goes_on.wait()
        match action:
            case "GetStatusInfo":
                self._say(
                    action, "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>1</NewUptime>"
                )
            case "GetExternalIPAddress":
                self._say(action, f"<NewExternalIPAddress>{OUTSIDE}</NewExternalIPAddress>")
            case "AddPortMapping" if told["ExternalPort"] in self.server.taken:
                self._send(500, FAULT)
            case "AddPortMapping":
                wanted = ("Protocol", "InternalClient", "InternalPort", "LeaseDuration", "RemoteHost")
                self.server.mapped[told["ExternalPort"]] = tuple(told[key] for key in wanted)
                self._say(action, "")
            case "DeletePortMapping":
                del self.server.mapped[told["ExternalPort"]]
                self._say(action, "")

    def _say(self, action: str, told: str) -> None:
        self._send(200, ANSWER.format(action, told))

    def _send(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


async def test_a_gateway_is_found_and_asked_in_its_own_language(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gateway().answering() as gateway:
        router = UpnpRouter("127.0.0.1")
        await router.discover()
        assert await router.external_address() == OUTSIDE
        with pytest.raises(RouterError, match="ConflictInMappingEntry"):
            await router.add(4100, PORT, LEASE_S)
        await router.add(4101, PORT, LEASE_S)
        assert gateway.mapped == {"4101": ("TCP", "127.0.0.1", "4100", "3600", "")}
        monkeypatch.setattr(port_mapping, "CALL_S_MAX", 0.1)
        gateway.goes_on.clear()
        with pytest.raises(RouterError, match="in time"):
            await router.add(4102, PORT, LEASE_S)
        monkeypatch.undo()
        async with trio.open_nursery() as nursery:
            # It waits its turn: what nobody waits for any more is still under way, and comes first.
            nursery.start_soon(router.delete, 4102)
            await trio.sleep(0.1)
            gateway.goes_on.set()
        await router.delete(4101)
        assert not gateway.mapped


async def test_who_sends_us_elsewhere_is_no_router() -> None:
    with (
        Gateway(control_host="localhost").answering(),
        pytest.raises(RouterError, match="not on the local network: 'localhost'"),
    ):
        await UpnpRouter("127.0.0.1").discover()


async def test_no_router_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_mapping, "SEARCH_S_MAX", 0.1)
    with pytest.raises(RouterError):
        await UpnpRouter("127.0.0.1").discover()


async def test_without_a_way_to_the_local_network_nothing_is_sent(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RouterError, match="no local network"):
        await UpnpRouter("203.0.113.9").discover()  # no interface of ours has this address
    assert capfd.readouterr().err == ""
