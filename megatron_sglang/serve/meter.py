"""What GET /metrics shows: a Prometheus registry of this endpoint's own."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client as prometheus

PREFIX = "megatron_sglang"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Meter:
    """Counts and times; the gauges are asked for when somebody looks."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self.requests = prometheus.Counter(
            f"{PREFIX}_requests", "Requests that were answered", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            f"{PREFIX}_request_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = prometheus.Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "From a request's head to the first sampled token; of streams",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = prometheus.Counter(
            f"{PREFIX}_tokens",
            "Tokens of prompts, and sampled ones, of complete answers",
            ["kind"],
            registry=self.registry,
        )
        self.ended = prometheus.Counter(
            f"{PREFIX}_ended_early",
            "Requests that ended without a complete answer: the client left, or was too slow to read; a stream broke",
            ["why"],
            registry=self.registry,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        prometheus.Gauge(f"{PREFIX}_{name}", text, registry=self.registry).set_function(value)

    def page(self) -> tuple[bytes, str]:
        """Body and content type."""
        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST
