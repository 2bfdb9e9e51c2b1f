"""The metrics for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptjax.engine.output import Completion
from gptjax.server.errors import ApiError
from gptjax.server.ipc.events import State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_MILLISECONDS = (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, state: Callable[[], State], memory_in_use: Callable[[], int]) -> None:
        """`state` is the worker's, `memory_in_use` in bytes on the device; both are read at every scrape."""
        self.registry = own = CollectorRegistry()
        self.requests = Counter("gptjax_http_requests", "HTTP requests answered", ["route", "status"], registry=own)
        self.answer = Histogram(
            "gptjax_http_answer_seconds",
            "From a request being read to the first byte of its answer",
            ["route", "status"],
            buckets=_SECONDS,
            registry=own,
        )
        self.errors = Counter("gptjax_errors", "Errors sent to clients, by code", ["code"], registry=own)
        self.duration = Histogram(
            "worker_inference_duration_ms",
            "From a prompt's submission to its last token, in milliseconds",
            buckets=_MILLISECONDS,
            registry=own,
        )
        self.tokens = Counter("worker_tokens_generated", "Tokens generated, as they come", registry=own)
        self.prompt_tokens = Counter("gptjax_prompt_tokens", "Tokens of prompts", registry=own)
        self.cached_tokens = Counter(
            "gptjax_cached_prompt_tokens", "Tokens of prompts found in the cache", registry=own
        )
        self.first_token = Histogram(
            "gptjax_time_to_first_token_seconds", "From submission, queueing included", buckets=_SECONDS, registry=own
        )
        self.per_token = Histogram(
            "gptjax_time_per_output_token_seconds", "After the first", buckets=_TOKEN_SECONDS, registry=own
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "worker_vram_bytes": ("Bytes in use on the device", memory_in_use),
            "gptjax_ready": ("1 when the model is ready", lambda: state().ready and state().alive),
            "gptjax_queue_length": ("Prompts waiting for a slot", lambda: state().queued),
            "gptjax_slots": ("Number of slots", lambda: state().slots),
            "gptjax_slots_busy": ("Slots with a request", lambda: state().busy),
            "gptjax_cache_used_ratio": ("Share of the cache's positions in use", lambda: state().cache_used),
            "gptjax_heartbeat_age_seconds": ("Since the worker's last turn", lambda: state().heartbeat_age),
            "gptjax_device_failures": ("Failures after which open requests were resumed", lambda: state().losses),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=self.registry).set_function(read)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an HTTP answer, begun `seconds` after its request was read."""
        self.requests.labels(route, status).inc()
        self.answer.labels(route, status).observe(seconds)

    def completed(self, completion: Completion) -> None:
        """Counts a prompt whose output is complete."""
        timings, count = completion.timings, completion.usage.completion_tokens
        self.prompt_tokens.inc(completion.usage.prompt_tokens)
        self.duration.observe(1000 * (timings.time_to_first_token + timings.decode))
        self.first_token.observe(timings.time_to_first_token)
        if count > 1:
            self.per_token.observe(timings.decode / (count - 1))

    def failed(self, error: ApiError) -> None:
        """Counts an error sent to a client."""
        self.errors.labels(error.code or error.kind).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self.registry)
