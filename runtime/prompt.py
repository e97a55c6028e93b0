"""From what a user gives as a prompt to token ids."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from .errors import UsageError
from .request import ChatMessage

# Text, token ids, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer's files ask for.

    Raises UsageError for text that is not Unicode, and for messages where the model has no chat
    template.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"prompt: not valid Unicode text at character {error.start} (a lone surrogate)"
            ) from error
        return [int(token_id) for token_id in tokenizer(prompt)["input_ids"]]
    if prompt and isinstance(prompt[0], ChatMessage):
        return _encode_chat(tokenizer, prompt)
    return [_checked_id(token_id) for token_id in prompt]


def _encode_chat(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "messages: this model's tokenizer has no chat template; give a plain prompt instead"
        )
    encoded = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        return_dict=True,
    )
    return [int(token_id) for token_id in encoded["input_ids"]]


def _checked_id(token_id: object) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, int):
        raise UsageError(f"prompt_token_ids: {token_id!r} is not an integer")
    return token_id
