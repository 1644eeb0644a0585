"""What a global merge would come to now, measured without one: nothing is adopted, and nobody else is asked to act.

Owns the order of it: the live weights of everybody alive are pulled as for an exchange, and their average and each of
them are measured on the same held-out data. Whether members have drifted too far apart to be merged shows here, long
before a merge would ruin the model (arXiv 2507.06542, mergeability). It costs a download of every member's model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
import trio

from node.runtime import Runtime
from node.snapshot_pulls import SnapshotPuller
from node.status import Foretold
from p2p.errors import GossamerError
from p2p.transport import PeerId
from training.learner import Learner
from training.merge_math import weighted_average

AT_ONCE_MAX = 4
"""Members pulled from at the same time."""


async def foretell(
    *,
    local: PeerId,
    runtime: Runtime,
    trainer: Learner,
    puller: SnapshotPuller,
    alive: Sequence[PeerId],
    bytes_max: int,
) -> Foretold:
    """The held-out loss of the average of all models that can be had, and the mean of theirs; at most ``bytes_max`` of
    text is read for each. Raises GossamerError where there is nobody to average with.
    """
    own = await runtime.compute.run(trainer.read, lane="side", cost_s=runtime.costs.copy_s)
    models = {local: own}
    limiter = trio.CapacityLimiter(AT_ONCE_MAX)

    async def pull(peer: PeerId) -> None:
        parts: list[torch.Tensor] = []
        async with limiter:
            for fragment in range(trainer.layout.fragments):
                part = await puller.pull(peer, fragment, trainer.layout.cut(own, fragment), beginner=False)
                if part is None:
                    return
                parts.append(part)
        models[peer] = trainer.layout.join(parts)

    async with trio.open_nursery() as nursery:
        for peer in alive:
            if peer != local:
                nursery.start_soon(pull, peer)
    if len(models) == 1:
        raise GossamerError(
            "nobody's weights could be had",
            why="what a merge would come to takes at least two models",
            fix="see who is alive: gossamer peers",
        )

    async def measured(values: torch.Tensor) -> float:
        evaluate = partial(trainer.evaluate, values, bytes_max=bytes_max)
        return await runtime.compute.run(evaluate, lane="train", cost_s=runtime.costs.evaluate_s)

    ordered = [models[peer] for peer in sorted(models)]
    merged = await measured(weighted_average([(values, 1) for values in ordered]))
    losses = {peer: await measured(models[peer]) for peer in sorted(models)}
    return Foretold(
        losses={str(peer): loss for peer, loss in losses.items()},
        merged=merged,
        local=statistics.fmean(losses.values()),
    )
