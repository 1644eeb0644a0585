"""What Prometheus is told: a node's status and the health of its process, as one page of text.

Owns the metrics' names, which dashboards and alerts rely on, and the registry that holds them: one of our own, since
libp2p fills the global one. What is told of the node is read from its NodeStatus, the same that ``gossamer status``
shows; only what belongs to the process is measured here. Members are counted, never named: one series for each would
grow with the swarm.

Relies on: a status is a frozen snapshot, so that the page can be made of it in a worker thread while the event loop and
training go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import trio
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from node.status import PHASES, MergeReport, NodeStatus, RecordStatus, members_by_state

PAGE_S_MAX = 1.0
"""Whoever asks again within this time gets the same page, so that asking often costs a node nothing."""
LAG_PROBE_S = 0.25
LAG_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Read = Callable[[NodeStatus], float | None]
"""None where there is nothing to tell yet: a metric that is absent misleads nobody."""

# Steps and tokens fall back to the checkpoint after a crash. Prometheus would take a counter that falls for one that
# began at zero again, so these are gauges.
GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_uptime_seconds", "Since the node began.", lambda s: s.uptime_s),
    ("gossamer_step", "Steps taken since the run began.", lambda s: s.step),
    ("gossamer_steps_planned", "Steps that the run asks of every node.", lambda s: s.steps_total),
    ("gossamer_tokens", "Tokens, bytes or examples learned from since the run began.", lambda s: s.tokens),
    ("gossamer_tokens_per_second", "Learned from per second, smoothed.", lambda s: s.tokens_per_s),
    ("gossamer_loss", "Training loss in nats per token, byte or example, smoothed.", lambda s: s.loss),
    ("gossamer_problem", "1 while something stands in the way; status says what.", lambda s: bool(s.problem)),
    ("gossamer_connections", "Members connected to.", lambda s: sum(peer.connected for peer in s.peers)),
    (
        "gossamer_relayed_connections",
        "Members connected to through a relay.",
        lambda s: sum(peer.connected and peer.relay is not None for peer in s.peers),
    ),
    ("gossamer_sent_today_bytes", "Sent to peers since 00:00 UTC.", lambda s: s.bytes_sent_today),
    ("gossamer_received_today_bytes", "Received since 00:00 UTC.", lambda s: s.bytes_received_today),
    ("gossamer_disk_bytes", "Held on disk in the shard store.", lambda s: s.disk_bytes),
    ("gossamer_checkpoint_step", "The step that a restart would go on from.", lambda s: s.checkpoint_step),
)
COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_sent_bytes_total", "Sent to peers.", lambda s: s.bytes_sent),
    ("gossamer_received_bytes_total", "Received from peers.", lambda s: s.bytes_received),
)


def _of_merge(read: Callable[[MergeReport], float]) -> Read:
    return lambda status: None if status.last_merge is None else read(status.last_merge)


GOSSIP_GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_merge_height", "Place of the last merge in the chain.", _of_merge(lambda merge: merge.height)),
    ("gossamer_merge_age_seconds", "Since the last merge of this process.", lambda s: s.last_merge_s_ago),
    (
        "gossamer_merge_duration_seconds",
        "What the last merge took.",
        _of_merge(lambda merge: merge.duration_s),
    ),
    (
        "gossamer_merge_contributors",
        "Members whose weights are in the last merge.",
        _of_merge(lambda merge: len(merge.contributors)),
    ),
    (
        "gossamer_merge_contributed",
        "1 if this node's weights are in the last merge.",
        _of_merge(lambda merge: merge.contributed),
    ),
)
GOSSIP_COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_merges_total", "Merges whose anchor this process has taken.", lambda s: s.merges),
    ("gossamer_mixes_total", "Exchanges that were mixed in.", lambda s: s.mixes),
    ("gossamer_mixes_failed_total", "Exchanges of which nothing came.", lambda s: s.mixes_failed),
    (
        "gossamer_mixes_one_sided_total",
        "Meetings after which only the other may have stepped.",
        lambda s: s.mixes_one_sided,
    ),
)


def _of_records(read: Callable[[RecordStatus], float | None]) -> Read:
    return lambda status: None if status.records is None else read(status.records)


# A fork that is proven takes records back, so that these are gauges too.
RECORD_GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_records_applied", "Records that the weights hold.", _of_records(lambda r: r.applied)),
    ("gossamer_records_waiting", "Records that do not count yet.", _of_records(lambda r: r.waiting)),
    ("gossamer_records_unsent", "Our own that are in no batch yet.", _of_records(lambda r: r.unsent)),
    ("gossamer_logs", "Logs that are held.", _of_records(lambda r: r.logs)),
    ("gossamer_logs_forked", "Logs of which a fork is proven.", _of_records(lambda r: r.forked)),
    ("gossamer_members_agreeing", "Members with our records and weights.", _of_records(lambda r: r.agree)),
    (
        "gossamer_peers_ceiling",
        "Peers beyond which applying costs more than probing.",
        _of_records(lambda r: r.ceiling),
    ),
)
RECORD_COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("gossamer_duplicate_batches_total", "Pushed here although held.", _of_records(lambda r: r.duplicates)),
)


class MetricsPage:
    """The page, made anew from ``look()`` whenever it is asked for and older than PAGE_S_MAX."""

    def __init__(self, look: Callable[[], NodeStatus]) -> None:
        self._look = look
        self._node = _NodeCollector()
        self._registry = CollectorRegistry()
        self._registry.register(self._node)
        ProcessCollector(registry=self._registry)
        self._lag = Histogram(
            "gossamer_event_loop_lag_seconds",
            "How much later than asked for the event loop wakes a task.",
            buckets=LAG_BUCKETS_S,
            registry=self._registry,
        )
        self._making = trio.Lock()
        self._text = b""
        self._made_s = -PAGE_S_MAX

    async def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        async with self._making:
            if trio.current_time() - self._made_s >= PAGE_S_MAX:
                tasks = trio.lowlevel.current_statistics().tasks_living
                self._node.told = self._look(), tasks
                self._text = await trio.to_thread.run_sync(generate_latest, self._registry)
                self._made_s = trio.current_time()
            return self._text

    async def watch_lag(self) -> None:
        """Measure the event loop's lag until cancelled."""
        while True:
            due_s = trio.current_time() + LAG_PROBE_S
            await trio.sleep_until(due_s)
            self._lag.observe(trio.current_time() - due_s)


class _NodeCollector(Collector):
    """What ``told`` says, the status and the number of trio tasks, as metrics."""

    def __init__(self) -> None:
        self.told: tuple[NodeStatus, int] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.told is None:  # asked for its names by the registry
            return
        status, tasks = self.told
        gauges, counters = (
            (GOSSIP_GAUGES, GOSSIP_COUNTERS) if status.records is None else (RECORD_GAUGES, RECORD_COUNTERS)
        )
        for family, figures in (
            (GaugeMetricFamily, GAUGES + gauges),
            (CounterMetricFamily, COUNTERS + counters),
        ):
            for name, about, read in figures:
                if (value := read(status)) is not None:
                    yield family(name, about, value=value)
        yield GaugeMetricFamily("gossamer_trio_tasks", "Tasks of the event loop.", value=tasks)
        yield _labelled(
            GaugeMetricFamily("gossamer_phase", "1 for the phase it is in.", labels=["phase"]),
            {phase: phase == status.phase for phase in PHASES},
        )
        yield _labelled(
            GaugeMetricFamily("gossamer_members", "Other members, by state.", labels=["state"]),
            members_by_state(status),
        )
        yield _labelled(
            CounterMetricFamily("gossamer_refusals_total", "What peers were refused for.", labels=["reason"]),
            status.refusals,
        )
        identity = {
            "peer": status.peer,
            "name": status.name,
            "version": status.version,
            "run_id": status.run_id,
            "run": status.run_name,
            "device": status.device,
            "unit": status.unit,
        }
        yield InfoMetricFamily("gossamer_node", "Which node this is.", value=identity)


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
