"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server; `text` is what /metrics shows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self.calls = Histogram("tools_http_seconds", "HTTP calls", ["route", "status"], buckets=SECONDS, registry=r)
        self.tools = Counter("tools_answers", "answers of tools by status", ["tool", "status"], registry=r)
        self.batches = Histogram("tools_batch_frames", "frames in a call of a model", ["task"], buckets=FRAMES, registry=r)
        self.inference = Histogram("tools_inference_seconds", "calls of a model", ["task"], buckets=SECONDS, registry=r)
        self.lookups = Counter("tools_cache_lookups", "results looked up", ["tool", "found"], registry=r)
        self.upstream = Counter("tools_llm_tries", "tries to ask the language model", ["outcome"], registry=r)
        self.refused = Counter("tools_refused", "calls refused before any work", ["error"], registry=r)
        self._gauge = lambda name, text, read: Gauge(name, text, registry=r).set_function(read)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Shows the value that `read` gives when somebody looks."""
        self._gauge(name, text, read)

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self._registry)
