"""What a person may ask of a running node: the handlers behind the control socket.

Owns the translation between control requests (``node.control``) and the node's parts. Every handler either answers
or raises a GossamerError that says what to do; none of them can stop training for longer than one slice, except
``evaluate`` and ``sample``, which need the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
from torch import Tensor

from node.answers import make_advert, make_invite, show_spec, tell_adverts
from node.control import (
    Evaluate,
    Export,
    ForetellMerge,
    GetAdverts,
    GetLogs,
    GetSpec,
    GetStatus,
    Handler,
    HandOver,
    MakeAdvert,
    MakeInvite,
    MergeNow,
    Sample,
    Stop,
    VerifyLogs,
)
from node.describe import describe, describe_logs
from node.gossip_node import GossipNode
from node.node import Node, Weights
from node.one_byte_node import OneByteNode
from node.status import Foretold, LogStatus, MergeReport, NodeStatus, Verification
from p2p.errors import GossamerError
from training.evaluation import held_out_loss
from training.export import export_safetensors
from training.tasks import Task
from training.token_task import TokenTask

T = TypeVar("T")

MERGE_NOW_TIMEOUT_S = 120.0


class Commands:
    """The handlers of one node that learns ``task``. ``name`` is what people call it; ``stop_now`` ends it at once."""

    def __init__(self, node: Node, *, task: Task, name: str, stop_now: Callable[[], None]) -> None:
        self._node = node
        self._task = task
        self._name = name
        self._stop_now = stop_now
        self.handed_over = False
        """Whether somebody asked for the node to be stopped so that another process goes on."""

    def handlers(self) -> dict[str, Handler]:
        """By method name, for ``serve_control``."""
        return {
            "status": self.status,
            "stop": self.stop,
            "hand_over": self.hand_over,
            "merge_now": self.merge_now,
            "foretell_merge": self.foretell_merge,
            "export": self.export,
            "evaluate": self.evaluate,
            "sample": self.sample,
            "invite": self.invite,
            "advert": self.advert,
            "adverts": self.adverts,
            "spec": self.spec,
            "logs": self.logs,
            "verify_logs": self.verify_logs,
        }

    async def status(self, _: GetStatus) -> NodeStatus:
        """One snapshot of everything."""
        return self.snapshot()

    def snapshot(self) -> NodeStatus:
        """The same, for who asks from inside."""
        model = self._task.model
        parameters = list(model.parameters())
        return describe(
            self._node,
            device=str(parameters[0].device),
            parameters=sum(parameter.numel() for parameter in parameters),
            unit=self._task.unit,
            name=self._name,
        )

    async def stop(self, request: Stop) -> dict[str, Any]:
        """Begin to stop; the answer comes before the end."""
        if request.now:
            self._stop_now()
        else:
            self._node.stop()
        return {}

    async def hand_over(self, request: HandOver) -> dict[str, Any]:
        """Stop at a good moment, for another process to go on; the answer comes once that moment is there."""
        with trio.move_on_after(request.wait_s) as waiting:
            await self._node.wait_settled()
        self.handed_over = True
        self._node.stop()
        return {"settled": not waiting.cancelled_caught}

    async def merge_now(self, _: MergeNow) -> MergeReport:
        """Merge with whoever is alive, at once."""
        return await self._gossip_node().merges.merge_now(MERGE_NOW_TIMEOUT_S)

    async def foretell_merge(self, request: ForetellMerge) -> Foretold:
        """What that would come to."""
        return await self._gossip_node().foretell(request.bytes_max)

    def _gossip_node(self) -> GossipNode:
        if isinstance(self._node, GossipNode):
            return self._node
        raise GossamerError(
            "there is nothing to merge in one-byte mode",
            why="nodes that hold the same records hold the same weights at every moment",
            fix="see who holds what: gossamer status",
        )

    async def export(self, request: Export) -> dict[str, Any]:
        """Write the weights as a safetensors file that any program can load; a Hugging Face model's config and
        tokenizer beside it."""
        weights = await self._node.weights(request.which)

        out = Path(request.path)
        beside = self._task.pretrained.files() if isinstance(self._task, TokenTask) else {}

        def write() -> int:
            for name, data in beside.items():
                _write_beside(out.parent / name, data)
            data = export_safetensors(
                weights.tensors,
                self._node.spec,
                dtype=request.dtype,
                metadata={"run": self._node.run_id.hex(), "weights": weights.hash.hex()},
            )
            out.write_bytes(data)
            return len(data)

        try:
            size = await trio.to_thread.run_sync(write)
        except OSError as error:
            raise GossamerError(
                f"cannot write {request.path}: {error.strerror}",
                why="the node writes the file itself, as the user it runs as",
                fix="name another place: gossamer export --out PATH",
            ) from error
        return {"path": request.path, "bytes": size, "weights_hash": weights.hash.hex()}

    async def evaluate(self, request: Evaluate) -> dict[str, Any]:
        """Held-out loss of the live weights or the anchor."""
        weights = await self._node.weights(request.which)
        loss = await self._in_lane(
            partial(held_out_loss, self._task, self._on_device(weights), request.bytes_max)
        )
        held_out_bytes = self._task.held_out_bytes
        return {
            "loss": loss,
            "unit": self._task.unit,
            "held_out_bytes": min(held_out_bytes, request.bytes_max or held_out_bytes),
            "held_out_digest": self._task.held_out_digest.hex(),
        }

    async def sample(self, request: Sample) -> dict[str, Any]:
        """Text the model writes after a prompt; bytes that are not UTF-8 are replaced."""
        weights = await self._node.weights(request.which)
        written = await self._in_lane(
            partial(
                self._task.sample,
                self._on_device(weights),
                request.prompt.encode(),
                request.count,
                request.temperature,
            )
        )
        return {"text": written.decode(errors="replace")}

    async def logs(self, _: GetLogs) -> list[LogStatus]:
        """Every log that this node holds."""
        return describe_logs(self._one_byte_node())

    async def verify_logs(self, _: VerifyLogs) -> Verification:
        """Check all batches again, and that the weights are what they say."""
        return await self._one_byte_node().keeper.verify()

    def _one_byte_node(self) -> OneByteNode:
        if isinstance(self._node, OneByteNode):
            return self._node
        raise GossamerError(
            "this run has no logs of records",
            why="its nodes exchange weights and merge them (gossip mode)",
            fix="see its merges: gossamer status",
        )

    def _on_device(self, weights: Weights) -> dict[str, Tensor]:
        device = next(self._task.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in weights.tensors.items()}

    async def _in_lane(self, work: Callable[[], T]) -> T:
        runtime = self._node.runtime
        return await runtime.compute.run(work, lane="train", cost_s=runtime.costs.evaluate_s)

    async def invite(self, request: MakeInvite) -> dict[str, Any]:
        """One line that lets others join: the run, and addresses of this node and of peers it can vouch for."""
        return make_invite(self._node, request, self._node.runtime.wall_time_s)

    async def advert(self, request: MakeAdvert) -> dict[str, Any]:
        """A signed line for a list of swarms."""
        return make_advert(self._node, request, self._node.runtime.wall_time_s)

    async def adverts(self, _: GetAdverts) -> dict[str, Any]:
        """Which swarms it knows of."""
        return tell_adverts(self._node)

    async def spec(self, _: GetSpec) -> dict[str, Any]:
        """The run spec as TOML, and the hash of its canonical bytes."""
        return show_spec(self._node)


def _write_beside(file: Path, data: bytes) -> None:
    """Write ``file`` unless it is there. Raises GossamerError when another model's is."""
    if not file.exists():
        file.write_bytes(data)
    elif file.read_bytes() != data:
        raise GossamerError(
            f"{file} belongs to another model",
            why="the weights are of no use without their own, which is written beside them",
            fix="name a new folder, which exists: gossamer export --out FOLDER/model.safetensors",
        )
