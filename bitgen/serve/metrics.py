"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bitgen.serve.worker import Job, Snapshot, Update

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts in a registry of its own; all methods are called in the event loop's thread."""

    def __init__(self, version: str, model: str, fingerprint: str) -> None:
        self._registry = registry = CollectorRegistry()
        build = Gauge("bitgen_build_info", "1", ("version", "model", "fingerprint"), registry=registry)
        build.labels(version, model, fingerprint).set(1)
        self._running = Gauge("bitgen_requests_running", "Texts that are being made", registry=registry)
        self._waiting = Gauge("bitgen_requests_waiting", "Texts that wait for a slot", registry=registry)
        self._positions = Gauge(
            "bitgen_kv_positions_used", "Positions of the KV cache of running texts", registry=registry
        )
        self._kv_bytes = Gauge(
            "bitgen_kv_bytes", "Bytes of keys and values, parked texts included", registry=registry
        )
        self._prompt = Counter(
            "bitgen_prompt_tokens", "Prompt tokens of texts that started", registry=registry
        )
        self._hits = Counter(
            "bitgen_prefix_tokens_hit", "Prompt tokens that the KV cache held", registry=registry
        )
        self._generated = Counter("bitgen_generated_tokens", "Tokens sampled", registry=registry)
        self._first = Histogram(
            "bitgen_time_to_first_token_seconds", "From arrival", registry=registry, buckets=_SECONDS
        )
        self._between = Histogram(
            "bitgen_inter_token_seconds", "Mean of a text", registry=registry, buckets=_SECONDS
        )
        self._queue = Histogram("bitgen_queue_seconds", "Until a slot", registry=registry, buckets=_SECONDS)
        self._whole = Histogram(
            "bitgen_request_seconds", "A whole text", ("finish",), registry=registry, buckets=_SECONDS
        )
        self._answers = Counter("bitgen_http_responses", "Responses", ("status",), registry=registry)
        self._steps = Gauge("bitgen_decode_seconds_sum", "Time in decode steps", registry=registry)
        self._prompts = Gauge("bitgen_prompt_seconds_sum", "Time in prompts", registry=registry)
        # Without a sensor these have no samples.
        by_phase = ("phase",)
        self._joules = Gauge("bitgen_energy_joules_sum", "By phase", by_phase, registry=registry)
        self._seconds = Gauge("bitgen_energy_seconds_sum", "Measured", by_phase, registry=registry)

    def responded(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def saw(self, update: Update) -> None:
        """Count what a step did."""
        job = update.job
        self._generated.inc(len(update.tokens))
        if update.first:
            self._started(job)
        if update.finish is not None and job.submitted is not None and job.ended is not None:
            self._whole.labels(update.finish).observe(job.ended - job.submitted)
            if job.first is not None and job.sampled > 1:
                self._between.observe((job.ended - job.first) / (job.sampled - 1))

    def _started(self, job: Job) -> None:
        self._prompt.inc(len(job.request.prompt))
        self._hits.inc(job.reused)
        if job.submitted is not None and job.started is not None and job.first is not None:
            self._first.observe(job.first - job.submitted)
            self._queue.observe(job.started - job.submitted)

    def text(self, now: Snapshot) -> bytes:
        """Prometheus' text format."""
        self._running.set(len(now.running))
        self._waiting.set(now.waiting)
        self._positions.set(sum(positions for _, positions, _ in now.running))
        self._kv_bytes.set(now.kv_bytes)
        self._steps.set(now.step_s)
        self._prompts.set(now.prompt_s)
        for phase, spent in now.spent.items():
            self._joules.labels(phase).set(spent.joules)
            self._seconds.labels(phase).set(spent.seconds)
        return generate_latest(self._registry)
