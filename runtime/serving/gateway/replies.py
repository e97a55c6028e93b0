"""The objects of OpenAI's API that a generation is answered with, whole and in chunks.

Knows nothing of transport, and of the engine only token ids, text, log probabilities and counts.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from ..messages import Candidate, TokenLogprob


class Reply(Protocol):
    """The documents of one answer. `finish_reason` and usage are OpenAI's words."""

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, before any text; None if with nothing."""
        ...

    def chunk(
        self, text: str, *, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """A part of a stream; the last one has a `finish_reason`."""
        ...

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event after the last part that carries the usage, where it was asked for."""
        ...

    def whole(
        self,
        text: str,
        *,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        """The one document of an answer that is not streamed."""
        ...


def usage_of(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int) -> dict[str, Any]:
    """The "usage" object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class _Answer:
    """What both kinds share: one id, one time, one model's name in every document."""

    def __init__(self, model: str, *, prefix: str, kind: str, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._kind = kind
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._model = model
        self._created = int(time.time())

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        document = self._document(self._kind, choices)
        return document | {"usage": None} if self._include_usage else document

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._document(self._kind, []) | {"usage": usage}


class CompletionReply(_Answer):
    """/v1/completions. A token that is no whole character counts one where offsets are counted."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        super().__init__(model, prefix="cmpl", kind="text_completion", include_usage=include_usage)
        self._num_chars = 0

    def opening(self) -> dict[str, Any] | None:
        return None

    def chunk(
        self, text: str, *, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return self._part([self._choice(text, logprobs, finish_reason)])

    def whole(
        self,
        text: str,
        *,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        choices = [self._choice(text, logprobs, finish_reason)]
        return self._document(self._kind, choices) | {"usage": usage}

    def _choice(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in logprobs:
            offsets.append(self._num_chars)
            self._num_chars += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in logprobs],
            "token_logprobs": [token.chosen.logprob for token in logprobs],
            "top_logprobs": [_by_text(token.top) for token in logprobs],
            "text_offset": offsets,
        }


class ChatReply(_Answer):
    """/v1/chat/completions."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        super().__init__(
            model, prefix="chatcmpl", kind="chat.completion.chunk", include_usage=include_usage
        )

    def opening(self) -> dict[str, Any] | None:
        return self._delta({"role": "assistant", "content": ""}, logprobs=None, finish_reason=None)

    def chunk(
        self, text: str, *, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text or finish_reason is None else {}
        return self._delta(delta, logprobs=logprobs, finish_reason=finish_reason)

    def whole(
        self,
        text: str,
        *,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return self._document("chat.completion", [choice]) | {"usage": usage}

    def _delta(
        self,
        delta: dict[str, str],
        *,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _chat_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return self._part([choice])


def _by_text(tokens: Sequence[Candidate]) -> dict[str, float]:
    """Tokens of equal text are one key: the likeliest is kept."""
    found: dict[str, float] = {}
    for token in tokens:
        found.setdefault(token.text, token.logprob)
    return found


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None

    return {
        "content": [
            _chat_token(token.chosen) | {"top_logprobs": [_chat_token(one) for one in token.top]}
            for token in logprobs
        ],
        "refusal": None,
    }


def _chat_token(token: Candidate) -> dict[str, Any]:
    # Part of a character shows as U+FFFD, whose bytes are not the token's.
    is_whole = "\ufffd" not in token.text
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()) if is_whole else None,
    }
