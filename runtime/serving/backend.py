"""What a server needs of whatever generates, and the engine as that.

One thread, the driver's, calls everything but `encode` and `progress`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...collect.schema import ExpertKey
from ..errors import UsageError
from ..request import GenerationRequest, SamplingParams
from .messages import Model

if TYPE_CHECKING:
    from ..engine import Engine

# A prompt this many times longer than its longest possible tokens is refused without being read.
_LENGTH_SLACK = 4


class SampledToken(Protocol):
    """One sampled token, as runtime.sampler has it."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> Sequence[tuple[int, float]]: ...


class Documented(Protocol):
    """Statistics that can say themselves as the "timings" and "experts" objects."""

    def as_dict(self) -> dict[str, Any]: ...


class Stream(Protocol):
    """One request that a backend runs; `finish_reason` is None until it has ended."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def tokens(self) -> Sequence[SampledToken]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def error(self) -> Exception | None: ...
    @property
    def stats(self) -> Documented: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTotals:
    """Look-ups, bytes and residency since the start; see `messages.Stats`."""

    lookups: Mapping[str, int]
    prefetch: Mapping[str, int]
    transfer_bytes: Mapping[str, int]
    stall_s: float
    cache_bytes: int
    is_degraded: bool
    residency: bytes


class Backend(Protocol):
    """Continuous batching behind five verbs; `max_running` requests share a pass."""

    model: Model
    max_running: int

    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_failures(self) -> int:
        """Passes in a row that failed."""
        ...

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the prompt, checked against the model. Any one thread. UsageError."""
        ...

    def submit(self, request: SamplingParams, token_ids: list[int], *, owner: str) -> Stream: ...
    def step(self) -> Mapping[Any, str]:
        """One pass: the text that each stream gained."""
        ...

    def cancel(self, stream: Any) -> None: ...
    def pause(self, stream: Any) -> None: ...
    def resume(self, stream: Any) -> None: ...
    def token_text(self, token_id: int) -> str: ...
    def totals(self) -> ExpertTotals: ...
    def progress(self) -> object:
        """A value that changes while work gets done, within a pass too. Any thread."""
        ...

    def close(self) -> None: ...


class EngineBackend:
    """The true engine. `name` is what clients are told the model is."""

    def __init__(self, engine: "Engine", *, name: str) -> None:
        from ..models.loading import load_tokenizer

        self._engine = engine
        # Prompts are encoded beside the engine's own thread, which decodes at the same time: one
        # tokenizer may not do both.
        self._tokenizer = load_tokenizer(engine.loaded.folder)
        shape = engine.loaded.shape
        self.max_running = engine.limits.max_num_seqs
        self.model = Model(
            name=name,
            fingerprint=shape.fingerprint,
            vocab_size=engine.vocab_size,
            context_tokens=engine.max_length,
            num_moe_layers=shape.num_moe_layers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            num_slots=engine.tier.num_slots,
            format=engine.tier.source.format,
            predictor=engine.tier.predictor_name,
            has_chat_template=bool(getattr(self._tokenizer, "chat_template", None)),
        )
        longest = max((len(token) for token in self._tokenizer.get_vocab()), default=1)
        self._max_chars = _LENGTH_SLACK * longest * engine.max_length
        self._resident: frozenset[Any] = frozenset()

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    @property
    def num_running(self) -> int:
        return self._engine.num_running

    @property
    def num_failures(self) -> int:
        return self._engine.num_failures

    def encode(self, request: GenerationRequest) -> list[int]:
        from ..prompt import encode

        num_chars = len(request.prompt or "")
        if num_chars > self._max_chars:
            raise UsageError(
                f"the prompt has {num_chars} characters, far more than the context's "
                f"{self._engine.max_length} tokens can hold"
            )
        token_ids = encode(self._tokenizer, request)
        request.validate_against(
            self._engine.vocab_size, self._engine.max_length, prompt_token_ids=token_ids
        )
        return token_ids

    def submit(self, request: Any, token_ids: list[int], *, owner: str) -> Any:
        return self._engine.submit(request, owner=owner, prompt_token_ids=token_ids)

    def step(self) -> Mapping[Any, str]:
        return self._engine.step()

    def cancel(self, stream: Any) -> None:
        self._engine.cancel(stream)

    def pause(self, stream: Any) -> None:
        self._engine.pause(stream)

    def resume(self, stream: Any) -> None:
        self._engine.resume(stream)

    def token_text(self, token_id: int) -> str:
        return self._engine.tokenizer.decode([token_id], skip_special_tokens=False)

    def totals(self) -> ExpertTotals:
        traffic, tier = self._engine.traffic, self._engine.tier
        return ExpertTotals(
            lookups={
                "hit": traffic.hits_resident + traffic.hits_prefetched,
                "late": traffic.late_hits,
                "miss": traffic.misses,
            },
            prefetch={
                "used": traffic.prefetch_used,
                "wasted": traffic.prefetch_wasted,
                "cancelled": traffic.prefetch_cancelled,
            },
            transfer_bytes={
                "on_demand": traffic.bytes_on_demand,
                "prefetch": traffic.bytes_prefetched,
            },
            stall_s=self._engine.stall_s,
            cache_bytes=tier.executor.cache.num_ready * tier.source.nbytes,
            is_degraded=tier.executor.is_degraded,
            residency=self._residency(),
        )

    def progress(self) -> object:
        return self._engine.tier.executor.cache.counters.uses

    def close(self) -> None:
        self._engine.close()

    def _residency(self) -> bytes:
        from ..experts.cache import SlotState

        cache, num_experts = self._engine.tier.executor.cache, self.model.num_experts
        found = bytearray(self.model.num_moe_layers * num_experts)
        resident = frozenset(cache.resident())
        for key in resident:
            place = key.layer_idx * num_experts + key.expert_idx
            found[place] = 2 if key in self._resident else 3
        self._resident = resident
        if cache.num_loading:
            for place in range(len(found)):
                if cache.state(ExpertKey(*divmod(place, num_experts))) is SlotState.LOADING:
                    found[place] = 1
        return bytes(found)
