"""Asking a metrics endpoint as Prometheus does, over HTTP, and reading the answer with Prometheus' own parser."""

from urllib.request import urlopen

import trio
from prometheus_client.parser import text_string_to_metric_families

SCRAPE_S_MAX = 10.0


async def scrape(port: int) -> dict[str, float]:
    """What the endpoint on ``port`` says, by name and by the values of the labels, as ``gossamer_members alive``."""

    def ask() -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_S_MAX) as answer:
            return answer.read().decode()

    text = await trio.to_thread.run_sync(ask)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
    }
