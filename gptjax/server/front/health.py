"""`GET /health` and `/metrics`."""

import time
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.generation.service import Service
from gptjax.server.http.sse import json_response

HEALTHY: Final = "healthy"


async def health(request: Request) -> Response:
    """200 if requests are served, else 503: starting, draining, dead, or silent for too long."""
    service: Service = request.app.state.service
    state, served = service.worker.state, service.served
    status = status_of(service)
    body = {
        "status": status,
        "model": served.name,
        "resident": status == HEALTHY,  # the weights are on the device, and answer
        "quant_kind": served.quant_kind,
        "vram_bytes_used": served.memory_in_use(),
        "tokenizer_kind": served.tokenizer_kind,
        "tokenizer_model": None if served.tokenizer is None else served.tokenizer.kind,
        "vocab_size": served.vocab_size,
        "context_length": served.max_length,
        "uptime_seconds": round(time.monotonic() - service.began, 3),
        "slots": state.slots,
        "busy": state.busy,
        "queued": state.queued,
        "error": state.error,
    }
    return json_response(body, 200 if status == HEALTHY else 503)


def status_of(service: Service) -> str:
    """ "healthy", "starting", "draining", "hung" or "dead"."""
    state = service.worker.state
    if state.error is not None:
        return "dead"
    if not state.ready:
        return "draining" if service.draining.is_set() else "starting"
    if not state.alive:
        return "dead"
    return "hung" if state.heartbeat_age > service.limits.heartbeat_seconds else HEALTHY


async def metrics(request: Request) -> Response:
    """The metrics, for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
