"""One request while it is served: what it was granted, what was sent, how it ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..errors import FieldError, OutriderError, TransferError, UsageError
from .backend import SampledToken, Stream
from .messages import Candidate, Chunk, Done, Error, Generate, TokenLogprob, Usage

# Tokens that one CHUNK of a request that does not stream may hold.
MAX_CHUNK_TOKENS = 1024

Outcome = Literal["stop", "length", "cancelled", "error"]


class Key(NamedTuple):
    """A request's identity: ids are its client's own, so no client can name another's request.

    A client may use an id again once its request has ended; `serial` tells the two apart.
    """

    client: bytes
    request_id: bytes
    serial: int


class Ending(NamedTuple):
    """How a request is to end: the ERROR its client is sent, or None for DONE(cancelled).

    With `is_silent` nobody is left to be told.
    """

    error: Error | None = None
    is_silent: bool = False


class Event(NamedTuple):
    """A message for a request's client; with an `outcome` it is the last one.

    `message` None: the client has gone. `summary` is what the log says of a request that ended.
    """

    key: Key
    message: Chunk | Done | Error | None
    outcome: Outcome | None = None
    summary: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class Work:
    """A request on the engine's thread. Times are time.monotonic() in seconds."""

    key: Key
    request: Generate
    received_s: float
    credit: int
    deadline_s: float | None
    stream: Stream | None = None
    num_sent: int = 0
    num_counted: int = 0
    num_chunks: int = 0
    text: str = ""
    first_s: float | None = None
    last_s: float = 0.0
    paused_at_s: float | None = None

    @classmethod
    def of(cls, key: Key, request: Generate, received_s: float) -> "Work":
        """A request as it came in."""
        deadline_ms = request.deadline_ms
        deadline_s = None if deadline_ms is None else received_s + deadline_ms / 1000
        return cls(key, request, received_s, request.credit, deadline_s)

    def is_chunk_due(self) -> bool:
        """Whether tokens are to be sent now rather than gathered."""
        assert self.stream is not None
        num_tokens = len(self.stream.token_ids) - self.num_sent
        if not num_tokens and not self.text:
            return False
        is_last = self.stream.finish_reason is not None
        return self.request.stream or is_last or num_tokens >= MAX_CHUNK_TOKENS

    def chunk(self, text_of: Any) -> Chunk:
        """Everything not sent yet, as one CHUNK; uses one credit."""
        assert self.stream is not None
        token_ids = tuple(self.stream.token_ids[self.num_sent :])
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = tuple(
                _logprob(token, text_of) for token in self.stream.tokens[self.num_sent :]
            )
        chunk = Chunk(seq=self.num_chunks, token_ids=token_ids, text=self.text, logprobs=logprobs)
        self.num_sent += len(token_ids)
        self.num_chunks += 1
        self.credit -= 1
        self.text = ""
        return chunk

    def done(self, finish_reason: Literal["stop", "length", "cancelled"]) -> Done:
        """The last message of a request that did not fail."""
        statistics: dict[str, Any] = {} if self.stream is None else self.stream.stats.as_dict()
        return Done(
            finish_reason=finish_reason,
            usage=Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=self.num_tokens,
                cached_tokens=self.num_cached_tokens,
            ),
            num_chunks=self.num_chunks,
            timings=statistics.get("timings", {}),
            experts=statistics.get("experts", {}),
        )

    @property
    def num_prompt_tokens(self) -> int:
        """0 while the prompt has not been encoded."""
        return 0 if self.stream is None else len(self.stream.prompt_token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that need not be run."""
        return 0 if self.stream is None else self.stream.num_cached_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return 0 if self.stream is None else len(self.stream.token_ids)

    def summary(self, now_s: float) -> dict[str, Any]:
        """What a log says of it: counts and times, no text."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "chunks": self.num_chunks,
            "ttft_s": None if self.first_s is None else round(self.first_s - self.received_s, 6),
            "e2e_s": round(now_s - self.received_s, 6),
        }


def error_of(error: Exception | None) -> Error:
    """The ERROR that a failed request's client is sent."""
    if isinstance(error, TransferError):
        return Error(code="expert_unavailable", message=str(error))
    if isinstance(error, UsageError):
        field = error.field if isinstance(error, FieldError) else None
        return Error(code="invalid_request", message=str(error), field=field)
    if isinstance(error, OutriderError):
        return Error(code="internal", message=str(error))
    # The error itself goes to the log: it may hold what another client must not see.
    return Error(code="internal", message="the request failed; the server's log says how")


def _logprob(token: SampledToken, text_of: Any) -> TokenLogprob:
    def candidate(token_id: int, logprob: float) -> Candidate:
        return Candidate(token_id=token_id, text=text_of(token_id), logprob=logprob)

    assert token.logprob is not None
    return TokenLogprob(
        chosen=candidate(token.token_id, token.logprob),
        top=tuple(candidate(*pair) for pair in token.top_logprobs),
    )
