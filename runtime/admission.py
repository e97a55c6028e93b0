"""What a request may come to hold in the KV cache, and how much of that there is.

Bounds that depend on the model and on the memory left over; the scheduler keeps to them.
"""

from dataclasses import replace

from . import memory
from .errors import FieldError
from .models import adapter
from .models.loading import LoadedModel
from .scheduler import BatchLimits, saturating_tokens
from .tier import RESERVE_BYTES, RESERVED_TOKENS

# Keys and values are kept in blocks of this many tokens; a request reserves whole ones.
KV_BLOCK_TOKENS = 256


def settled(limits: BatchLimits, loaded: LoadedModel) -> BatchLimits:
    """The limits with what was left open: the KV cache gets the memory that is free now.

    It never gets less than `--expert-memory auto` has left for it.
    """
    if limits.max_kv_tokens is None:
        free, _ = memory.device_bytes(loaded.device.type, loaded.device.index)
        token_bytes = adapter.kv_bytes_per_token(loaded.config, loaded.dtype)
        tokens = max(RESERVED_TOKENS, (free - RESERVE_BYTES) // token_bytes)
        limits = replace(limits, max_kv_tokens=tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS)
    if not limits.min_piece_tokens:
        rest = saturating_tokens(loaded.shape.num_experts, loaded.shape.top_k)
        limits = replace(limits, min_piece_tokens=rest)
    return limits


def reserved_tokens(num_prompt: int, max_tokens: int, *, limits: BatchLimits) -> int:
    """Tokens of KV memory that a request may come to fill.

    Raises FieldError if that is more than all there is, however long it waited.
    """
    num_tokens = -(-(num_prompt + max_tokens) // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    if limits.max_kv_tokens is not None and num_tokens > limits.max_kv_tokens:
        raise FieldError(
            "max_tokens",
            f"max_tokens is {max_tokens} after a prompt of {num_prompt} tokens, and memory is left "
            f"for the keys and values of {limits.max_kv_tokens} tokens in all: ask for less, or "
            "give the experts less memory",
        )
    return num_tokens
