"""`GET /v1/models`: the one model, by any of its names."""

import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.generation.service import Service
from gptjax.server.http.sse import json_response


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
