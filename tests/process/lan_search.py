"""A program for test_lan: searches for so many seconds, and prints each candidate as a line of JSON."""

import json
import sys

import trio

from node.lan import LanSearch
from p2p.identity import Identity

RUN = bytes(32)


async def search(seconds: float) -> None:
    lan = LanSearch(run=RUN, peer=Identity.generate().peer, listening=["/ip4/0.0.0.0/tcp/4100"])
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lan.run)
            async for record in lan.found:
                sys.stdout.write(json.dumps({"peer": record.peer, "addresses": record.addresses}) + "\n")


trio.run(search, float(sys.argv[1]))
