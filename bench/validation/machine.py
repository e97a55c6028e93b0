"""One configuration on this machine: its steps one by one, and the routing that they followed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...collect.schema import ExpertKey
from ...predictors.base import Predictor
from ...runtime.experts.pieces import split_extents
from ...runtime.experts.thread_transfer import PIECE_BYTES
from ...runtime.models import adapter
from ...runtime.request import GenerationRequest
from ..arm import EngineArm, FollowingSampler
from ..records import Passage, Subject
from ..routing import Routing
from .configurations import Configuration


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: seconds in all and waiting, look-ups that missed, prefetches issued."""

    wall_s: float
    stall_s: float
    misses: int
    issued: int


@dataclass(frozen=True, slots=True)
class Observation:
    """What one configuration did: decode steps by repetition, and what was routed.

    `routing` holds all router inputs, for a predictor to follow; `make_predictor` is the engine's
    own. `num_pieces` is how many reads bring one expert.
    """

    configuration: Configuration
    subject: Subject
    routing: Routing
    make_predictor: Callable[[], Predictor | None]
    repetitions: list[list[Step]]
    num_pieces: int = 1

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each repetition."""
        return [len(steps) / sum(one.wall_s for one in steps) for steps in self.repetitions]


class Witness(EngineArm):
    """An arm of bench decode that also writes down each step and all router inputs."""

    @property
    def num_pieces(self) -> int:
        """Reads that one expert is brought with."""
        layout = self._engine.tier.source.layout(ExpertKey(0, 0))
        return len(split_extents(layout.extents, PIECE_BYTES))

    @property
    def make_predictor(self) -> Callable[[], Predictor | None]:
        """The engine's own way to make a predictor for a sequence."""
        return self._engine.tier.make_predictor

    def follow(self, passages: list[Passage]) -> list[Step]:
        """Decode the passages' own text, warm as the run before left the slots."""
        steps: list[Step] = []
        for passage in passages:
            self._follow(passage, steps)
        return steps

    def routing(self, passages: list[Passage]) -> Routing:
        """The same, untimed, with what every router was given and chose."""
        loaded, tier = self._engine.loaded, self._engine.tier
        witness = _RouterWitness(tier.executor.forward, tier.source.shape.num_moe_layers)
        adapter.install(loaded.model, loaded.layers, witness.forward)
        try:
            for passage in passages:
                self._follow(passage, [])
        finally:
            adapter.install(loaded.model, loaded.layers, tier.executor.forward)
        lengths = [len(one.prompt_ids) + one.num_tokens - 1 for one in passages]
        tokens = [[*one.prompt_ids, *one.text_ids][:length]
                  for one, length in zip(passages, lengths, strict=True)]  # fmt: skip
        ids = np.stack([np.concatenate(one) for one in witness.topk_ids], axis=1)
        weights = np.stack([np.concatenate(one) for one in witness.topk_weights], axis=1)
        order = np.argsort(-weights, axis=2, kind="stable")
        return Routing(
            shape=tier.source.shape,
            offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            document=np.arange(len(passages), dtype=np.uint64),
            token_id=np.concatenate(tokens).astype(np.int64),
            topk_ids=np.take_along_axis(ids, order, axis=2).astype(np.int32),
            topk_weights=np.take_along_axis(weights, order, axis=2).astype(np.float32),
            hidden={layer_idx: np.concatenate(one) for layer_idx, one in enumerate(witness.hidden)},
        )

    def _follow(self, passage: Passage, steps: list[Step]) -> None:
        engine = self._engine
        sequence = engine.submit(
            GenerationRequest(
                prompt_token_ids=passage.prompt_ids,
                max_tokens=passage.num_tokens,
                temperature=0.0,
                ignore_eos=True,
            )
        )
        sequence.sampler = FollowingSampler(  # type: ignore[assignment]
            sequence.sampler, passage.text_ids, digest=None
        )
        counters = engine.tier.executor.cache.counters
        while not sequence.is_finished:
            is_decode = bool(sequence.token_ids)
            stats = sequence.stats
            stall_s, misses = stats.timings.stall_s, stats.experts.decode.misses
            issued, began = counters.prefetch_issued, time.perf_counter()
            engine.step()
            wall_s = time.perf_counter() - began
            if is_decode:
                steps.append(
                    Step(
                        wall_s,
                        stats.timings.stall_s - stall_s,
                        stats.experts.decode.misses - misses,
                        counters.prefetch_issued - issued,
                    )
                )
        if sequence.error is not None:
            raise sequence.error


class _RouterWitness:
    """Stands before the executor and keeps what it is given."""

    def __init__(self, forward: Any, num_layers: int) -> None:
        self._forward = forward
        self.topk_ids: list[list[np.ndarray]] = [[] for _ in range(num_layers)]
        self.topk_weights: list[list[np.ndarray]] = [[] for _ in range(num_layers)]
        self.hidden: list[list[np.ndarray]] = [[] for _ in range(num_layers)]

    def forward(
        self,
        layer_idx: int,
        module: Any,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        self.topk_ids[layer_idx].append(topk_ids.numpy().copy())
        self.topk_weights[layer_idx].append(topk_weights.float().numpy().copy())
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.hidden[layer_idx].append(rows.float().numpy().copy())
        return self._forward(layer_idx, module, hidden_states, topk_ids, topk_weights)


def observe(
    configuration: Configuration, passages: list[Passage], *, repetitions: int
) -> Observation:
    """Run one configuration here: once untimed, then `repetitions` times. Blocks for seconds."""
    arm = Witness(
        model=configuration.model,
        options=configuration.engine,
        link_bytes_per_s=configuration.throttle_bytes_per_s,
    )
    try:
        subject = arm.load()
        routing = arm.routing(passages)
        arm.follow(passages)
        timed = [arm.follow(passages) for _ in range(repetitions)]
        make = arm.make_predictor
        return Observation(configuration, subject, routing, make, timed, arm.num_pieces)
    finally:
        arm.close()
