"""The bodies of OpenAI's API that are accepted, and what they ask the engine for.

Closed: a field that is not listed is refused by its name, and so is a value that would have to be
ignored to go on. Knows no connection and no reply.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ...errors import UsageError
from ...request import ChatMessage, GenerationRequest, SamplingParams
from .refusal import Refusal


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, understood. `num_logprobs` None: none wanted; 0: the chosen token's only."""

    request: GenerationRequest
    model: str | None
    is_stream: bool
    include_usage: bool
    num_logprobs: int | None


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    # Random padding against observers of encrypted lengths; none is added.
    include_obfuscation: bool = False


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds share: OpenAI's names, then those that vLLM's users know."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None
    n: Any = None
    logit_bias: Any = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    deadline_ms: int | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart]
    name: str | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_Turn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    store: Any = None
    metadata: Any = None


# What may stand in a field whose other values are not supported.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "store": (None, False),
}


def parse_completion(raw: bytes) -> Asked:
    """The body of POST /v1/completions. Raises Refusal (400) naming the field at fault."""
    body = _decode(raw, _CompletionBody)
    return _asked(body, num_logprobs=body.logprobs, names={}, **_prompt(body.prompt))


def parse_chat(raw: bytes) -> Asked:
    """The body of POST /v1/chat/completions. Raises Refusal (400) naming the field at fault."""
    body = _decode(raw, _ChatBody)
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        raise _refuse("max_tokens", "max_tokens and max_completion_tokens are one: give one")
    if body.top_logprobs is not None and not body.logprobs:
        raise _refuse("top_logprobs", "top_logprobs needs logprobs to be true")
    messages = [
        ChatMessage(role="system" if turn.role == "developer" else turn.role, content=_text(turn))
        for turn in body.messages
    ]
    names = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _asked(body, num_logprobs=num_logprobs, names=names, messages=messages)


def _decode(raw: bytes, kind: Any) -> Any:
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    for field, accepted in _ONLY.items():
        value = getattr(body, field, None)
        # True equals 1, but is no number of choices.
        if not any(value == one and type(value) is type(one) for one in accepted):
            shown = " or ".join(repr(one) for one in accepted[1:])
            raise _refuse(field, f"{field}: only {shown} is supported", code="unsupported_value")
    if body.stream_options is not None and not body.stream:
        raise _refuse("stream_options", "stream_options needs stream to be true")
    return body


def _asked(body: _Body, *, num_logprobs: int | None, names: dict[str, str], **prompt: Any) -> Asked:
    values = {
        name: value
        for name in SamplingParams.__struct_fields__
        if name != "logprobs" and (value := getattr(body, name, None)) is not None
    }
    try:
        request = GenerationRequest(
            **values,
            **prompt,
            logprobs=num_logprobs,
            stream=bool(body.stream),
            deadline_ms=body.deadline_ms,
        )
    except UsageError as error:
        raise Refusal.of(error, names=names) from None
    return Asked(
        request=request,
        model=body.model,
        is_stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        num_logprobs=num_logprobs,
    )


def _prompt(prompt: str | list[Any]) -> dict[str, Any]:
    """A text, token ids, or a list of exactly one of these."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and all(isinstance(item, int) for item in prompt):
        return {"prompt_token_ids": prompt}
    if len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        kind = "prompt" if isinstance(prompt[0], str) else "prompt_token_ids"
        return {kind: prompt[0]}
    raise _refuse(
        "prompt",
        f"prompt is a list of {len(prompt)}: accepted are a string, a list of token ids, or a list "
        "that holds one of these; send several prompts as several requests",
    )


def _text(turn: _Turn) -> str:
    if isinstance(turn.content, str):
        return turn.content
    return "".join(part.text for part in turn.content)


def _invalid(message: str, kind: Any) -> Refusal:
    if unknown := re.search(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", message):
        where = f"{unknown[2]}.{unknown[1]}" if unknown[2] else unknown[1]
        accepted = ""
        if not unknown[2]:
            accepted = f": accepted are {', '.join(kind.__struct_fields__)}"
        return _refuse(where, f"{where!r} is not supported{accepted}", code="unknown_field")
    if missing := re.search(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", message):
        where = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return _refuse(where, f"{where} is missing", code="missing_field")
    path = re.search(r"`\$\.([^`]+)`", message)
    return _refuse(path[1] if path else None, f"the body is refused: {message}")


def _refuse(field: str | None, message: str, *, code: str = "invalid_value") -> Refusal:
    return Refusal(400, message, code=code, param=field)
