"""A program for test_lan: announces 300 members of a run that are none, until it is killed."""

import threading

from blake3 import blake3
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from node.lan import SERVICE, LanNames
from p2p.identity import Identity

RUN = bytes(32)
LIES = 300

zeroconf = Zeroconf(interfaces=["10.77.0.1"], ip_version=IPVersion.V4Only)
for number in range(LIES):
    tag = blake3(str(number).encode()).hexdigest()[:16]
    info = ServiceInfo(
        SERVICE,
        f"{LanNames(RUN, None).tag}-{tag}.{SERVICE}",
        port=4100,
        properties={"peer": Identity.generate().peer},
        server=f"{tag}.local.",
        parsed_addresses=["10.77.0.1", "127.0.0.1"] if number % 2 else ["192.0.2.1"],
    )
    zeroconf.registry.async_add(info)
    zeroconf.send(zeroconf.generate_service_broadcast(info, None))
threading.Event().wait()
