"""What a refused request is told, in the words that its client reads: FastAPI's, or OpenAI's below ``/v1``."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_SHOWN, _MOST = 200, 8
_CODES = {404: "model_not_found", 413: "input_too_large", 429: "rate_limit_exceeded"}
_SERVER = 500


def refusal(
    path: str,
    status: int,
    detail: Any,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
) -> JSONResponse:
    """An answer that says why there is none.

    Args:
        path: what was asked.
        status: of the answer.
        detail: the reason, or several.
        headers: of the answer.
        param: the field of the body that cannot be used, for clients of OpenAI.
    """
    if not path.startswith("/v1/"):
        return JSONResponse({"detail": detail}, status, headers)
    words = "; ".join(map(str, detail)) if isinstance(detail, list) else str(detail)
    kind = "invalid_request_error" if status < _SERVER else "server_error"
    error = {"message": words, "type": kind, "param": param, "code": _CODES.get(status)}
    return JSONResponse({"error": error}, status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """For what a handler, or the router, raises."""
    if not isinstance(error, HTTPException):
        raise error
    headers = error.headers
    return refusal(request.url.path, error.status_code, error.detail, headers, _param_of(error))


async def malformed(request: Request, error: Exception) -> Response:
    """FastAPI repeats the input, which may be large, or hold what no answer can (NaN, surrogates)."""
    found = error.errors() if isinstance(error, RequestValidationError) else ()
    details = [str(entry["msg"])[:_SHOWN] for entry in found[:_MOST]]
    places = [entry["loc"] for entry in found[:1]]
    param = next((str(place[1])[:_SHOWN] for place in places if len(place) > 1), None)
    return refusal(request.url.path, 422, details, param=param)


class FieldError(HTTPException):
    """A field of a body that cannot be used, and which one."""

    def __init__(self, status: int, detail: str, param: str) -> None:
        super().__init__(status, detail)
        self.param = param


def _param_of(error: HTTPException) -> str | None:
    return error.param if isinstance(error, FieldError) else None
