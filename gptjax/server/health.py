"""`GET /health`, `/metrics` and `/v1/models`."""

import datetime
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.service import Service
from gptjax.server.sse import json_response

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


async def models(request: Request) -> Response:
    """Lists the one model."""
    service: Service = request.app.state.service
    name = service.served.name
    ends = {"has_more": False, "first_id": name, "last_id": name}
    return json_response({"object": "list", "data": [_model(service)], **ends})


async def model(request: Request) -> Response:
    """The one model, by its name, which may contain slashes."""
    service: Service = request.app.state.service
    service.served.check_name(request.path_params["name"])
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    """The model, as OpenAI's clients, vLLM's and Anthropic's expect it."""
    served = service.served
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "gptjax",
        "max_model_len": served.max_length,
        "type": "model",
        "display_name": served.name,
        "created_at": datetime.datetime.fromtimestamp(served.created, datetime.UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": served.max_length,
        "max_tokens": served.max_length,
    }
