"""What a request is refused with: one exception, one JSON shape, that of OpenAI's API."""

import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from ...errors import FieldError, UsageError

# Field names of ours that HTTP clients know under another one.
_HTTP_NAMES = {"prompt_token_ids": "prompt"}


class Refusal(Exception):
    """A request ends with `status` and an error object; raised anywhere below an endpoint.

    `code` is for programs, `param` names the field at fault. `retry_after_s` becomes a header;
    `is_final` tells OpenAI's client not to try the same request again by itself.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        is_final: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        if is_final:
            self.headers["x-should-retry"] = "false"

    @classmethod
    def of(cls, error: UsageError, *, names: Mapping[str, str] | None = None) -> "Refusal":
        """What a field out of range is answered with; `names` maps our field names to theirs."""
        field = error.field if isinstance(error, FieldError) else None
        if field is not None:
            field = (names or {}).get(field, _HTTP_NAMES.get(field, field))
        return cls(400, str(error), code="invalid_value", param=field)

    @property
    def document(self) -> dict[str, object]:
        """The body: `{"error": {message, type, param, code}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> Response:
        """The same as an HTTP response."""
        return JsonResponse(self.document, status=self.status, headers=self.headers)


class JsonResponse(Response):
    """A JSON document that no cache keeps."""

    media_type = "application/json"

    def __init__(
        self, document: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        content = msgspec.json.encode(document)
        super().__init__(
            content, status_code=status, headers={"cache-control": "no-store", **(headers or {})}
        )
