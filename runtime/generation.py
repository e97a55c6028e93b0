"""What a generation gives back: a chunk at a time while it runs, a result when it has ended."""

from dataclasses import dataclass

from .sampler import SampledToken
from .sequence import Sequence
from .stats import GenerationStats


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one pass added to a stream; `finish_reason` is set on the last chunk only."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation; `tokens` carries log-probabilities where they were asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[SampledToken, ...]
    text: str
    finish_reason: str
    stats: GenerationStats

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, with the names of the OpenAI API."""
        return {
            "prompt_tokens": len(self.prompt_token_ids),
            "completion_tokens": len(self.token_ids),
        }

    @classmethod
    def of(cls, sequence: Sequence) -> "GenerationResult":
        """The result of a finished sequence."""
        assert sequence.finish_reason is not None, "the sequence is still running"
        return cls(
            prompt_token_ids=tuple(sequence.prompt_token_ids),
            token_ids=tuple(sequence.token_ids),
            tokens=tuple(sequence.tokens),
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats,
        )
