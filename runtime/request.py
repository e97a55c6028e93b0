"""What a client asks for: sampling values and one request, checked before anything is allocated.

The command line, the Python API, the ZeroMQ server and the gateway share these definitions.
Knows neither model nor tokenizer; `validate_against` is told the two numbers it needs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from .errors import FieldError, UsageError
from .limits import (
    LIMITS,
    Limit,
    check_bool,
    check_integer,
    check_integers,
    check_length,
    check_number,
    check_text,
    refusal,
)


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One turn of a conversation, for the model's own chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str

    def __post_init__(self) -> None:
        roles = ("system", "user", "assistant", "tool")
        if self.role not in roles:
            raise refusal("messages.role", self.role, f"one of {', '.join(roles)}")
        check_text("messages.content", self.content)


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the next token is chosen and when generation ends.

    Names, defaults and meaning follow vLLM: `temperature` 1.0 samples from the model's own
    distribution, 0 is greedy; `top_k` 0 and `min_p` 0 are off; penalties 0, 0 and 1 are off.
    `logprobs` n asks for the sampled token's log probability and the n largest. `max_tokens` 0 is
    refused. `stop` may be one string or several; it is a tuple of strings afterwards.

    Raises `FieldError`, naming the field, the value and the accepted range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for field in ("max_tokens", "top_k"):
            _set(self, field, check_integer(field, getattr(self, field)))
        for field in ("seed", "logprobs"):
            if getattr(self, field) is not None:
                _set(self, field, check_integer(field, getattr(self, field)))
        for field in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            _set(self, field, check_number(field, getattr(self, field)))
        check_bool("ignore_eos", self.ignore_eos)
        _set(self, "stop", _stop_strings(self.stop))
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one, so that no random number is drawn."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, typed as what it is once it has been checked."""
        return tuple(self.stop)


class GenerationRequest(SamplingParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request as it travels: the sampling values and exactly one kind of prompt, in one level.

    Raises `FieldError` on construction; see `validate_against` for what depends on the model.
    """

    prompt: str | None = None
    messages: Sequence[ChatMessage] | None = None
    prompt_token_ids: Sequence[int] | None = None
    stream: bool = False
    deadline_ms: int | None = None

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        check_bool("stream", self.stream)
        if self.deadline_ms is not None:
            _set(self, "deadline_ms", check_integer("deadline_ms", self.deadline_ms))
        kinds = ("prompt", "messages", "prompt_token_ids")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise FieldError(
                given[1] if given else "prompt",
                f"exactly one of {', '.join(kinds)} is accepted, given: "
                f"{', '.join(given) or 'none'}",
            )
        if self.prompt is not None:
            check_text("prompt", self.prompt)
            check_length("prompt", len(self.prompt), "prompt_chars", unit="characters")
        if self.messages is not None:
            _set(self, "messages", _messages(self.messages))
        if self.prompt_token_ids is not None:
            ids = _token_ids("prompt_token_ids", self.prompt_token_ids)
            _set(self, "prompt_token_ids", ids)

    @classmethod
    def from_params(
        cls,
        params: SamplingParams,
        *,
        prompt: str | None = None,
        messages: Sequence[ChatMessage] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        stream: bool = False,
        deadline_ms: int | None = None,
    ) -> "GenerationRequest":
        """The request that asks for one prompt under `params`."""
        values = {name: getattr(params, name) for name in SamplingParams.__struct_fields__}
        return cls(
            **values,
            prompt=prompt,
            messages=messages,
            prompt_token_ids=prompt_token_ids,
            stream=stream,
            deadline_ms=deadline_ms,
        )

    def validate_against(
        self,
        vocab_size: int,
        max_length: int,
        *,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Check the tokenised prompt against the model's vocabulary and context, both in tokens.

        `prompt_token_ids` are the ids after tokenisation; left out, the request's own. Raises
        `FieldError`; to be called before the first tensor is made of these ids.
        """
        ids = self.prompt_token_ids if prompt_token_ids is None else prompt_token_ids
        if not ids:
            raise FieldError("prompt", "the prompt is empty: at least one token is needed")
        for field, checked in (("prompt_token_ids", ids), ("stop_token_ids", self.stop_token_ids)):
            accepted = Limit(0, vocab_size - 1)
            check_integers(field, checked, limit=accepted)
        if len(ids) >= max_length:
            raise FieldError(
                "prompt",
                f"the prompt has {len(ids)} tokens and the context {max_length}: "
                f"at most {max_length - 1} leave room for an answer",
            )
        if len(ids) + self.max_tokens > max_length:
            raise FieldError(
                "max_tokens",
                f"max_tokens is {self.max_tokens} after a prompt of {len(ids)} tokens, "
                f"{len(ids) + self.max_tokens} in all, and the context holds {max_length}: "
                f"at most {max_length - len(ids)} is accepted for this prompt",
            )


def parse_request(fields: Mapping[str, object]) -> GenerationRequest:
    """Make a request of untyped fields, as a JSON body gives them.

    Raises `UsageError` for an unknown field, a wrong type (with its path) or a value out of range.
    """
    try:
        return msgspec.convert(dict(fields), GenerationRequest)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, FieldError):
            raise error.__cause__ from None
        raise _decode_refusal(str(error)) from None
    except UnicodeEncodeError as error:
        raise UsageError(
            f"invalid request: a string holds a lone surrogate, {error.object[error.start]!r}"
        ) from None


def _decode_refusal(message: str) -> UsageError:
    if unknown := re.search(r"unknown field `([^`]*)`", message):
        accepted = ", ".join(GenerationRequest.__struct_fields__)
        return FieldError(unknown[1], f"{unknown[1]!r} is not a request field: accepted {accepted}")
    if path := re.search(r"`\$\.([A-Za-z_]+)", message):
        return FieldError(path[1], f"invalid request: {message}")
    return UsageError(f"invalid request: {message}")


def _set(struct: msgspec.Struct, field: str, value: Any) -> None:
    # Only while the struct is being made: a list or a numpy scalar becomes the plain immutable.
    msgspec.structs.force_setattr(struct, field, value)


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise refusal("stop", value, "a string or a list of strings")
    check_length("stop", len(value), "num_stop", unit="strings")
    for position, text in enumerate(value):
        check_text("stop", text)
        if len(text) not in LIMITS["stop_chars"]:
            raise FieldError(
                "stop",
                f"stop[{position}] has {len(text)} characters: accepted are {LIMITS['stop_chars']}",
            )
    return tuple(value)


def _token_ids(field: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not hasattr(value, "__getitem__"):
        raise refusal(field, value, "a list of token ids")
    check_length(field, len(value), f"num_{field}", unit="token ids")
    return check_integers(field, value, limit=LIMITS["token_id"])


def _messages(value: Any) -> tuple[ChatMessage, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise refusal("messages", value, "a list of {role, content}")
    check_length("messages", len(value), "num_messages", unit="messages")
    for message in value:
        if not isinstance(message, ChatMessage):
            raise refusal("messages", message, "ChatMessage(role=..., content=...)")
    num_chars = sum(len(message.content) for message in value)
    check_length("messages", num_chars, "prompt_chars", unit="characters")
    return tuple(value)
