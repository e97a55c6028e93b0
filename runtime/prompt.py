"""From what a user gives as a prompt to token ids."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

from .errors import UsageError
from .request import ChatMessage, GenerationRequest, SamplingParams

# Text, token ids, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]


def is_one(prompts: Any) -> bool:
    """Whether this is a single prompt and not a series of them."""
    if isinstance(prompts, str):
        return True
    first = next(iter(prompts), None) if hasattr(prompts, "__getitem__") else None
    return isinstance(first, (Integral, ChatMessage))


def request_of(prompt: Prompt, params: SamplingParams) -> GenerationRequest:
    """The request for one prompt, all of it checked that can be without a tokenizer or a model.

    Raises UsageError: nothing out of bounds is tokenised.
    """
    if isinstance(prompt, str):
        return GenerationRequest.from_params(params, prompt=prompt)
    if len(prompt) and isinstance(prompt[0], ChatMessage):
        return GenerationRequest.from_params(params, messages=prompt)  # type: ignore[arg-type]
    return GenerationRequest.from_params(params, prompt_token_ids=prompt)  # type: ignore[arg-type]


def encode(tokenizer: Any, request: GenerationRequest) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer's files ask for.

    Raises UsageError for messages where the model has no chat template, or one that fails on them.
    """
    if request.prompt is not None:
        return encode_text(tokenizer, request.prompt)
    if request.messages is not None:
        return _encode_chat(tokenizer, request.messages)
    return list(request.prompt_token_ids or ())


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself, of any length."""
    return [int(token_id) for token_id in tokenizer(text)["input_ids"]]


def _encode_chat(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "messages: this model's tokenizer has no chat template; give a plain prompt instead"
        )
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=True,
            return_dict=True,
        )
    except Exception as error:  # a template is a program of the model's maker
        raise UsageError(
            f"messages: the model's chat template fails on them: {' '.join(str(error).split())}"
        ) from error
    return [int(token_id) for token_id in encoded["input_ids"]]
