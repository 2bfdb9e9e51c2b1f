"""`GET` and `DELETE /v1/responses/{id}`, and `GET /v1/responses/{id}/input_items`."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.errors import as_json, bad_request
from gptjax.server.generation.response_store import Stored
from gptjax.server.generation.service import Service
from gptjax.server.http.sse import encode, json_response
from gptjax.server.openai.responses.memory import not_found

_FEWEST, _USUAL, _MOST = 1, 20, 100  # items of a page
_ORDERS: Final = ("asc", "desc")


async def respond(request: Request) -> Response:
    """Returns a stored response, or deletes it."""
    response_id, service = _asked(request)
    if request.method == "DELETE":
        if not service.stored.remove(response_id):
            raise not_found(response_id, service.stored)
        return json_response({"id": response_id, "object": "response", "deleted": True})
    if request.query_params.get("stream", "false") != "false" or "starting_after" in request.query_params:
        raise bad_request("a stored response is returned in one piece: leave stream and starting_after out", "stream")
    return Response(_stored(request).response, media_type="application/json")


async def input_items(request: Request) -> Response:
    """Lists the items that a stored response was the answer to."""
    stored, query = _stored(request), request.query_params
    limit, order, after = query.get("limit", str(_USUAL)), query.get("order", _ORDERS[-1]), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and _FEWEST <= int(limit) <= _MOST):
        raise bad_request(f"limit must be a whole number from {_FEWEST} to {_MOST}, found {as_json(limit)}", "limit")
    if order not in _ORDERS:
        raise bad_request(f"order is {as_json(order)}; expected {' or '.join(_ORDERS)}", "order")
    items = stored.given if order == "asc" else stored.given[::-1]
    if after is not None:
        place = next((index for index, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise bad_request(f"after is {as_json(after)}, which is not the id of an item of this response", "after")
        items = items[place + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {"first_id": None, "last_id": None}
    head = encode({"object": "list", **ends, "has_more": len(page) < len(items)})
    # The items are JSON already: parsing megabytes would hold up everyone else.
    data = b"".join((head[:-1], b',"data":[', b",".join([item.data for item in page]), b"]}"))
    return Response(data, media_type="application/json")


def _asked(request: Request) -> tuple[str, Service]:
    return request.path_params["response_id"], request.app.state.service


def _stored(request: Request) -> Stored:
    response_id, service = _asked(request)
    stored = service.stored.get(response_id)
    if stored is None:
        raise not_found(response_id, service.stored)
    return stored
