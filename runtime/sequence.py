"""One text being generated: its tokens, how far they are in the KV cache, and how it ended."""

import time
from dataclasses import dataclass, field

from ..predictors.base import Predictor
from .detokenizer import Detokenizer
from .models.attention import SequenceKv
from .request import SamplingParams
from .sampler import SampledToken, Sampler, SamplerState
from .stats import GenerationStats


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request, owned by the engine; the scheduler reads lengths only.

    `num_computed` tokens are in the KV cache; a sequence decodes when all but its newest token are.
    The first `num_cached_tokens` of its prompt were there already, computed for another request.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    sampler_state: SamplerState
    detokenizer: Detokenizer | None
    predictor: Predictor | None
    stats: GenerationStats
    end_token_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    kv: SequenceKv = field(default_factory=SequenceKv)
    num_computed: int = 0
    num_cached_tokens: int = 0
    step: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None
    began_s: float = field(default_factory=time.perf_counter)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the KV cache yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_prefill(self) -> bool:
        """Whether the next pass runs prompt tokens."""
        return self.num_computed < len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether a finish reason is set."""
        return self.finish_reason is not None

    def pending_token_ids(self, num_tokens: int) -> list[int]:
        """The next `num_tokens` ids to run."""
        if self.is_prefill:
            return self.prompt_token_ids[self.num_computed : self.num_computed + num_tokens]
        return self.token_ids[-num_tokens:]

    def accept(self, token: SampledToken) -> str:
        """Take a sampled token; returns the text that is safe to show, sets `finish_reason`."""
        self.token_ids.append(token.token_id)
        self.tokens.append(token)
        is_end = not self.params.ignore_eos and token.token_id in self.end_token_ids
        if is_end or token.token_id in self.params.stop_token_ids:
            return self._finish("stop")
        piece = self._push(token.token_id)
        if self.detokenizer is not None and self.detokenizer.stopped:
            self.finish_reason = "stop"
            return piece
        if len(self.token_ids) >= self.params.max_tokens:
            return piece + self._finish("length")
        return piece

    def cancel(self, reason: str) -> str:
        """End without another token; returns the text that was still held back."""
        return self._finish(reason)

    def _push(self, token_id: int) -> str:
        if self.detokenizer is None:
            return ""
        piece = self.detokenizer.push(token_id)
        self.text += piece
        return piece

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        if self.detokenizer is None:
            return ""
        piece = self.detokenizer.finish()
        self.text += piece
        # The text held back can complete a stop string.
        if self.detokenizer.stopped:
            self.finish_reason = "stop"
        return piece
