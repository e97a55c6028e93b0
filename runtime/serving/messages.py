"""The wire protocol: every message that may travel, its limits, and its one encoding.

Frames are [version, type] (two bytes), the request's id, and a msgpack map. Knows no socket.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from ..errors import FieldError, OutriderError
from ..limits import Limit, check_integer, shown
from ..request import GenerationRequest

PROTOCOL_VERSION = 1
SUPPORTED_VERSIONS = (PROTOCOL_VERSION,)

# What one message may be, in one table; a request's own fields are bounded by runtime.limits.
LIMITS: dict[str, Limit] = {
    "message_bytes": Limit(0, 4 << 20),
    "request_id_bytes": Limit(0, 32),
    "credit": Limit(1, 1_000_000),
    "client_chars": Limit(0, 128),
}
# A server's answer may carry the log-probabilities of many tokens.
MAX_REPLY_BYTES = 64 << 20
NUM_FRAMES = 3

ErrorCode: TypeAlias = Literal[
    "deadline_exceeded",
    "duplicate_id",
    "engine_dead",
    "expert_unavailable",
    "internal",
    "invalid_request",
    "overloaded",
    "shutting_down",
    "slow_consumer",
    "unsupported_version",
]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
ServerState: TypeAlias = Literal["ready", "stalled", "failing", "draining", "dead"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A body: a msgpack map with these fields and no others."""


class Hello(Message, frozen=True):
    """A client says who it is; READY answers. May be sent again at any time."""

    client: str = ""

    def __post_init__(self) -> None:
        if len(self.client) not in LIMITS["client_chars"]:
            accepted = LIMITS["client_chars"]
            raise FieldError("client", f"client is {shown(self.client)}: accepted are {accepted}")


class Generate(GenerationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request and the number of CHUNKs its client is ready to take.

    With `stream` false all tokens come in as few CHUNKs as will hold them, at the end.
    """

    credit: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("credit", self.credit, limit=LIMITS["credit"])

    @classmethod
    def of(cls, request: GenerationRequest, *, credit: int) -> "Generate":
        """A request as it travels."""
        names = GenerationRequest.__struct_fields__
        return cls(**{name: getattr(request, name) for name in names}, credit=credit)


class Credit(Message, frozen=True):
    """The client takes `chunks` more CHUNKs of this request."""

    chunks: int

    def __post_init__(self) -> None:
        check_integer("chunks", self.chunks, limit=LIMITS["credit"])


class Cancel(Message, frozen=True):
    """End this request: DONE with `cancelled`, or PONG if there is nothing to end."""


class Ping(Message, frozen=True):
    """PONG answers, from the socket's thread, whatever the engine does."""


class GetStats(Message, frozen=True):
    """STATS answers."""


class Limits(Message, frozen=True):
    """What this server accepts."""

    message_bytes: int
    request_id_bytes: int
    credit: int
    prompt_chars: int
    context_tokens: int
    requests_running: int
    requests_waiting: int
    requests_per_client: int


class Model(Message, frozen=True):
    """What is served; `num_slots` experts are resident at most."""

    name: str
    fingerprint: str
    vocab_size: int
    context_tokens: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    num_slots: int
    format: str
    predictor: str
    has_chat_template: bool


class Ready(Message, frozen=True):
    """Answer to HELLO. `instance` is another one after each start of the server."""

    protocol: int
    server: str
    instance: str
    is_ready: bool
    state: ServerState
    model: Model
    limits: Limits


class Candidate(Message, frozen=True):
    """A token, its own text, and its log probability in nats under the model's distribution."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(Message, frozen=True):
    """The token chosen and, most likely first, as many others as were asked for."""

    chosen: Candidate
    top: tuple[Candidate, ...]


class Chunk(Message, frozen=True):
    """The next tokens of a request; `seq` counts its CHUNKs from 0. `text` may lag behind."""

    seq: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None


class Usage(Message, frozen=True):
    """Token counts, with the names of the OpenAI API.

    `cached_tokens` of the prompt's were computed for an earlier request that began alike.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Done(Message, frozen=True):
    """Last message of a request that did not fail; `num_chunks` were sent before it.

    `timings` and `experts` are the objects of `generate --json`.
    """

    finish_reason: FinishReason
    usage: Usage
    num_chunks: int
    timings: dict[str, float | None]
    experts: dict[str, int | dict[str, int]]


class Error(Message, frozen=True):
    """A refusal or failure. Ends its request, but for `duplicate_id`: the first one goes on.

    `retry_after_ms` comes with `overloaded`, `supported` with `unsupported_version`.
    """

    code: ErrorCode
    message: str
    field: str | None = None
    retry_after_ms: int | None = None
    supported: tuple[int, ...] | None = None


class Pong(Message, frozen=True):
    """Answer to PING and to a CANCEL of nothing.

    `is_open`: a request with this message's id, from this client, has not ended.
    """

    instance: str
    is_open: bool
    state: ServerState


class Histogram(Message, frozen=True):
    """Observations in seconds; `counts[i]` were at most `bounds[i]` and above the bound before.

    The last count, one more than there are bounds, is of those above all bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    count: int


class Stats(Message, frozen=True):
    """Everything counted since the start; names as the metrics have, without `outrider_`.

    started = sum(requests_total) + running + waiting. `residency` is a map of num_moe_layers x
    num_experts bytes, layer by layer: 0 absent, 1 loading, 2 resident, 3 came since the last STATS.
    """

    state: ServerState
    is_ready: bool
    instance: str
    uptime_seconds: float
    requests_running: int
    requests_waiting: int
    requests_started_total: int
    requests_total: dict[str, int]
    prompt_tokens_total: int
    generation_tokens_total: int
    time_to_first_token_seconds: Histogram
    inter_token_latency_seconds: Histogram
    e2e_request_latency_seconds: Histogram
    expert_lookups_total: dict[str, int]
    expert_prefetch_total: dict[str, int]
    expert_transfer_bytes_total: dict[str, int]
    expert_stall_seconds_total: float
    expert_cache_bytes: int
    degraded: bool
    errors_total: dict[str, int]
    rejected_total: dict[str, int]
    connections_total: dict[str, int]
    num_moe_layers: int
    num_experts: int
    residency: bytes
    prompt_tokens_cached_total: int = 0


ClientMessage: TypeAlias = Hello | Generate | Credit | Cancel | Ping | GetStats
ServerMessage: TypeAlias = Ready | Chunk | Done | Error | Pong | Stats

# The second byte of the first frame.
CLIENT_TYPES: dict[int, type] = {
    0x01: Hello,
    0x02: Generate,
    0x03: Credit,
    0x04: Cancel,
    0x05: Ping,
    0x06: GetStats,
}
SERVER_TYPES: dict[int, type] = {
    0x81: Ready,
    0x82: Chunk,
    0x83: Done,
    0x84: Error,
    0x85: Pong,
    0x86: Stats,
}
_HEADERS = {
    kind: bytes([PROTOCOL_VERSION, code]) for code, kind in (CLIENT_TYPES | SERVER_TYPES).items()
}
_DECODERS = {code: msgspec.msgpack.Decoder(kind) for code, kind in CLIENT_TYPES.items()} | {
    code: msgspec.msgpack.Decoder(kind) for code, kind in SERVER_TYPES.items()
}
_ENCODER = msgspec.msgpack.Encoder()
_MAP = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_MAPS = msgspec.msgpack.Decoder(list[dict[str, msgspec.Raw]])


class ProtocolError(OutriderError):
    """A message that cannot be accepted; `error` says it on the wire, `request_id` of which."""

    def __init__(self, error: Error, *, request_id: bytes = b"") -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id


def encode(message: Message | Generate, request_id: bytes) -> list[bytes]:
    """The three frames of a message."""
    return [_HEADERS[type(message)], request_id, _ENCODER.encode(message)]


def decode_client(frames: Sequence[bytes]) -> tuple[bytes, ClientMessage]:
    """(request id, message) of what a client sent, identity frame taken off.

    Raises ProtocolError for anything else, whatever it is.
    """
    return _decode(frames, CLIENT_TYPES, max_bytes=int(LIMITS["message_bytes"].maximum))


def decode_server(frames: Sequence[bytes]) -> tuple[bytes, ServerMessage]:
    """(request id, message) of what a server sent. Raises ProtocolError for anything else."""
    return _decode(frames, SERVER_TYPES, max_bytes=MAX_REPLY_BYTES)


def _decode(frames: Sequence[bytes], types: dict[int, type], *, max_bytes: int) -> Any:
    if len(frames) != NUM_FRAMES:
        raise _invalid(f"a message has {NUM_FRAMES} frames, this one has {len(frames)}")
    header, request_id, body = frames
    if len(request_id) not in LIMITS["request_id_bytes"]:
        accepted = LIMITS["request_id_bytes"]
        raise _invalid(f"the request id has {len(request_id)} bytes: accepted are {accepted}")
    if len(header) != 2 or header[0] not in SUPPORTED_VERSIONS or header[1] not in types:
        raise _unsupported(header, types, request_id=request_id)
    if len(body) > max_bytes:
        raise _invalid(
            f"the body has {len(body)} bytes: accepted are {max_bytes}", request_id=request_id
        )
    try:
        message = _DECODERS[header[1]].decode(body)
        _refuse_repeated_keys(body, message)
    except ProtocolError as error:
        raise ProtocolError(error.error, request_id=request_id) from None
    # Whatever a decoder can be made to raise costs one message, never the loop that reads them.
    except Exception as error:
        raise _undecodable(error, request_id=request_id) from None
    return request_id, message


def _undecodable(error: Exception, *, request_id: bytes) -> ProtocolError:
    cause = error.__cause__
    if isinstance(cause, FieldError):
        return _invalid(str(cause), field=cause.field, request_id=request_id)
    text = str(error)
    found = re.search(r"unknown field `([^`]*)`|missing required field `([^`]*)`", text)
    path = re.search(r"`\$\.([A-Za-z_]+)", text)
    field = (found[1] or found[2]) if found else path[1] if path else None
    kind = "" if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: "
    return _invalid(f"undecodable body: {kind}{shown(text)}", field=field, request_id=request_id)


def _refuse_repeated_keys(body: bytes, message: Any) -> None:
    """A decoder takes the last of equal keys, another one might take the first."""
    fields = _MAP.decode(body)
    _check_count(body, len(fields), "the body")
    if isinstance(message, Generate) and message.messages is not None:
        raw = fields["messages"]
        turns = _MAPS.decode(raw)
        pieces = msgspec.msgpack.decode(raw, type=list[msgspec.Raw])
        for position, (turn, piece) in enumerate(zip(turns, pieces, strict=True)):
            _check_count(bytes(piece), len(turn), f"messages[{position}]")


def _check_count(body: bytes, num_keys: int, what: str) -> None:
    kind = body[0]
    # https://github.com/msgpack/msgpack/blob/master/spec.md#map-format-family
    if kind & 0xF0 == 0x80:
        num_written = kind & 0x0F
    else:
        num_written = int.from_bytes(body[1 : 3 if kind == 0xDE else 5], "big")
    if num_written != num_keys:
        raise _invalid(f"{what} has {num_written} keys, {num_written - num_keys} of them repeated")


def _unsupported(header: bytes, types: dict[int, type], *, request_id: bytes) -> ProtocolError:
    known = ", ".join(f"{code:#04x} {kind.__name__}" for code, kind in types.items())
    versions = ", ".join(str(version) for version in SUPPORTED_VERSIONS)
    message = (
        f"the first frame is {shown(header)}: accepted is a version byte ({versions}) and a "
        f"type byte ({known})"
    )
    error = Error(code="unsupported_version", message=message, supported=SUPPORTED_VERSIONS)
    return ProtocolError(error, request_id=request_id)


def _invalid(message: str, *, field: str | None = None, request_id: bytes = b"") -> ProtocolError:
    error = Error(code="invalid_request", message=message, field=field)
    return ProtocolError(error, request_id=request_id)
