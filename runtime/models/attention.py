"""Attention over a ragged batch: rows of several sequences side by side, each with its own cache.

The model runs on one row of tokens, [1, T]; every sequence's rows attend to that sequence's keys
alone, with the shapes it would have if it were alone. So there is no padding, a prompt can be
prefilled in pieces next to running streams, and no mask is built for single tokens. Plugs into
transformers' attention, mask and cache interfaces and knows nothing of experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError

ATTENTION_IMPLEMENTATION = "outrider"
_GROWTH_TOKENS = 256
# What stands for a mask is its sliding window; this stands for none.
_NO_WINDOW = -1
# What attention functions are handed and what this one does; anything else would change the result.
_HARMLESS_ARGUMENTS = frozenset(
    {"position_ids", "is_causal", "output_attentions", "use_cache", "cache_position"}
    | {"sliding_window", "past_key_values"}
    | {"output_router_logits", "output_hidden_states", "return_dict", "logits_to_keep"}
)


class SequenceKv:
    """Keys and values of one sequence, per attention layer [1, heads, length, head_dim].

    Grows in steps of 256 tokens; `nbytes` is what it holds. Not thread-safe.
    """

    def __init__(self) -> None:
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._addresses: np.ndarray | None = None  # as `room` returns them, until a layer grows
        self._capacity = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values over all layers."""
        buffers = [*self._keys.values(), *self._values.values()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    @property
    def capacity(self) -> int:
        """Tokens that memory is held for."""
        return max((buffer.shape[2] for buffer in self._keys.values()), default=0)

    @torch.inference_mode()
    def copied(self, num_tokens: int) -> "SequenceKv":
        """Another sequence's keys and values that begin as the first `num_tokens` of these."""
        copy = SequenceKv()
        for mine, its in ((self._keys, copy._keys), (self._values, copy._values)):
            for layer_idx, rows in mine.items():
                room = copy._room(its, layer_idx, rows, total=num_tokens)
                room[:, :, :num_tokens] = rows[:, :, :num_tokens]
        copy.length = num_tokens
        return copy

    def append(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one layer's new rows [1, heads, n, dim]; returns views of all rows so far.

        The views are valid until the next append to the same layer. `advance` ends the step.
        """
        total = self.length + keys.shape[2]
        all_keys = self._room(self._keys, layer_idx, keys, total=total)
        all_values = self._room(self._values, layer_idx, values, total=total)
        all_keys[:, :, self.length : total] = keys
        all_values[:, :, self.length : total] = values
        return all_keys[:, :, :total], all_values[:, :, :total]

    def room(
        self, num_tokens: int, *, num_layers: int, like: torch.Tensor
    ) -> tuple[np.ndarray, int]:
        """Have room for so many more rows in layers 0 to `num_layers`; where it is.

        The addresses [layers, 2] of each layer's keys and values, [heads, capacity, dim], and the
        capacity. Whoever fills the rows from `length` on calls `advance` at the end of the step.
        `like` [1, heads, 0, dim] has their sizes and dtype. Valid until a layer grows.
        """
        total = self.length + num_tokens
        if self._addresses is None or total > self._capacity:
            # One capacity for all, also after growing has failed half-way.
            buffers = [*self._keys.values(), *self._values.values()]
            total = max(total, *(buffer.shape[2] for buffer in buffers), 0)
            rooms = [
                (
                    self._room(self._keys, layer_idx, like, total=total),
                    self._room(self._values, layer_idx, like, total=total),
                )
                for layer_idx in range(num_layers)
            ]
            self._addresses = np.array(
                [(keys.data_ptr(), values.data_ptr()) for keys, values in rooms], dtype=np.int64
            )
            self._capacity = rooms[0][0].shape[2]
        return self._addresses, self._capacity

    def advance(self, num_tokens: int) -> None:
        """Every layer has appended `num_tokens` rows: they are part of the past from now on."""
        self.length += num_tokens

    def _room(
        self, buffers: dict[int, torch.Tensor], layer_idx: int, rows: torch.Tensor, *, total: int
    ) -> torch.Tensor:
        buffer = buffers.get(layer_idx)
        if buffer is None or buffer.shape[2] < total:
            capacity = -(-total // _GROWTH_TOKENS) * _GROWTH_TOKENS
            grown = rows.new_empty(1, rows.shape[1], capacity, rows.shape[3])
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffers[layer_idx] = buffer = grown
            self._addresses = None
        return buffer


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, end) of the step's token row belong to the sequence of `kv`."""

    kv: SequenceKv
    start: int
    end: int


class NoOtherState:
    """What a model is given as its cache: keys and values pass through, anything else is refused.

    A layer with a state of its own (recurrent, compressed, an index of keys) would otherwise run
    without its past and be silently wrong.
    """

    is_sliding = ()
    is_linear = ()
    is_compileable = False

    def __init__(self, family: str) -> None:
        self._family = family

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows as they are: `SequenceKv` keeps them, in the attention function."""
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """0: positions are handed to the model."""
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """0, for a mask that is not built."""
        return 0

    def get_mask_sizes(self, num_queries: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Keys and their offset, for a mask that is not built."""
        return num_queries, 0

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModelError(
            f"{self._family!r}: a layer keeps its past by {name!r}; outrider keeps keys and values "
            "only, so layers with another kind of state are not supported"
        )


class RaggedAttention:
    """The attention function of one model; `over(spans)` says whose rows a forward pass holds.

    `past` is what the model is to be given as `past_key_values`.
    """

    def __init__(self, model: Any) -> None:
        self.past = NoOtherState(model.config.model_type)
        self._spans: Sequence[Span] = ()
        self._num_calls = 0
        self._num_layers = model.config.num_hidden_layers
        self._family = model.config.model_type
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.outrider_attention = self
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, _dispatch)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, _window_of_mask)
        # Assigned on the config since `set_attn_implementation` first tries to find a hub kernel.
        model.config._attn_implementation = ATTENTION_IMPLEMENTATION

    @contextmanager
    def over(self, spans: Sequence[Span]) -> Iterator[None]:
        """Run one forward pass inside; afterwards each sequence's cache has advanced.

        Raises UnsupportedModelError if some layer kept its past elsewhere (recurrent layers).
        """
        self._spans, self._num_calls = spans, 0
        try:
            yield
        finally:
            self._spans = ()
        if self._num_calls != self._num_layers:
            raise UnsupportedModelError(
                f"{self._family!r}: {self._num_calls} of {self._num_layers} layers use attention "
                "with a key-value cache; layers with another kind of state are not supported"
            )
        for span in spans:
            span.kv.advance(span.end - span.start)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[1, heads, T, dim] queries and new keys and values -> [1, T, heads, dim]."""
        self._num_calls += 1
        num_rows = self._spans[-1].end
        if not query.shape[2] == key.shape[2] == value.shape[2] == num_rows:
            raise UnsupportedModelError(
                f"{self._family!r}: attention of {query.shape[2]} queries over {key.shape[2]} new "
                f"keys in a pass of {num_rows} tokens, which outrider's attention does not do"
            )
        rows = [
            _attend_one(
                query[:, :, span.start : span.end],
                *span.kv.append(
                    module.layer_idx,
                    key[:, :, span.start : span.end],
                    value[:, :, span.start : span.end],
                ),
                scaling=scaling,
                sliding_window=sliding_window,
                sinks=sinks,
            )
            for span in self._spans
        ]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
        return joined.transpose(1, 2).contiguous()


def _window_of_mask(
    *, config: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> torch.Tensor:
    """Called in place of building a mask: [1, 1, 1, 1], the sliding window of the layers it is for.

    The window is taken from here and not from what attention functions are handed, since some
    families say it in the mask alone.
    """
    is_plain = not use_vmap and "allow_is_bidirectional_skip" not in kwargs
    if not is_plain or getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(
            f"{config.model_type!r}: its attention masks are neither causal nor causal within a "
            "sliding window, which outrider's attention does not do"
        )
    # Four dimensions, so that a family that slices its mask reaches the refusals below.
    return torch.tensor([[[[_NO_WINDOW if local_size is None else local_size]]]])


def _window(mask: torch.Tensor | None) -> int | None:
    """What `_window_of_mask` made of a mask; None for a mask that it did not make."""
    if mask is None or mask.numel() != 1 or mask.dtype != torch.int64:
        return None
    return int(mask)


def _dispatch(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = sorted(
        name
        for name, argument in kwargs.items()
        if argument is not None and name not in _HARMLESS_ARGUMENTS
    )
    window = _window(attention_mask)
    if unknown or window is None or dropout:
        raise UnsupportedModelError(
            f"{module.config.model_type!r}: its attention wants "
            f"{unknown or 'a mask of its own or dropout'}, which outrider's attention does not do"
        )
    attention: RaggedAttention = module.outrider_attention
    return attention.attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        sliding_window=None if window == _NO_WINDOW else window,
        sinks=s_aux if s_aux is not None else sinks,
    ), None


def _attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    num_queries = query.shape[2]
    if num_queries == 1 and sliding_window is not None:
        keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
    mask = None
    if num_queries > 1 and (num_queries != keys.shape[2] or sliding_window is not None):
        mask = _causal_mask(query, keys.shape[2], sliding_window=sliding_window)
    if sinks is not None:
        return _attend_with_sinks(query, keys, values, scaling=scaling, mask=mask, sinks=sinks)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1 and num_queries == 1:
        # The heads of a group share keys, so they can be the rows of one product: no copy of keys.
        grouped = query.reshape(1, keys.shape[1], groups, query.shape[3])
        output = functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
        return output.reshape(1, query.shape[1], 1, values.shape[3])
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        scale=scaling,
        is_causal=mask is None and num_queries > 1,
    )


def _causal_mask(query: torch.Tensor, num_keys: int, *, sliding_window: int | None) -> torch.Tensor:
    num_queries = query.shape[2]
    positions = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    columns = torch.arange(num_keys, device=query.device)[None, :]
    mask = columns <= positions
    if sliding_window is not None:
        mask &= columns > positions - sliding_window
    return mask  # [queries, keys], True = seen


def _attend_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    # gpt_oss: one learned logit a head joins the softmax and is dropped from its result.
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    logits = query @ keys.transpose(2, 3) * scale  # [1, heads, queries, keys]
    if mask is None and query.shape[2] > 1:
        mask = _causal_mask(query, keys.shape[2], sliding_window=None)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    sink = sinks.reshape(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
    combined = torch.cat([logits, sink.to(logits.dtype)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probabilities = functional.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    return probabilities.to(values.dtype) @ values
