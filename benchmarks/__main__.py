"""``make bench``: every figure the project promises, measured one after the other; exit 1 when a bar is missed."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

import trio

from benchmarks import (
    codecs,
    global_merge,
    mixing_kernel,
    one_byte_cost,
    overlap,
    private_swarm,
    record_traffic,
    shard_transfer,
    simulation,
    training_under_load,
)
from benchmarks.harness import Figure

BENCHMARKS: dict[str, Callable[[], Awaitable[list[Figure]]]] = {
    "shard-transfer": shard_transfer.measure,
    "training-under-load": training_under_load.measure,
    "mixing-kernel": mixing_kernel.measure,
    "codecs": codecs.measure,
    "global-merge": global_merge.measure,
    "overlap": overlap.measure,
    "private-swarm": private_swarm.measure,
    "one-byte-cost": one_byte_cost.measure,
    "record-traffic": record_traffic.measure,
    "simulation": simulation.measure,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; returns the exit code."""
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
        return 2
    print(f"{'figure':<58} {'median':>10} {'unit':<8} {'least .. most':>18}   bar")
    met = True
    for name in names or BENCHMARKS:
        for figure in trio.run(BENCHMARKS[name]):
            print(figure.line(), flush=True)
            met = met and figure.met is not False
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
