"""Configurations on this machine: their steps one by one, and the routing that they followed.

All are loaded at once and run in turns, so that what else the machine does falls on all alike.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from ...predictors.base import Predictor
from ...runtime.models import adapter
from ...runtime.request import GenerationRequest
from ..arm import EngineArm, FollowingSampler
from ..records import Passage, Subject
from ..routing import Routing
from .apart import CallTimes, Interruption, ReadTimes, call_times, interruption, read_times
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
    own. Measured apart between repetitions, on an engine of the same format: how long reads take,
    of the disk as it is, and how long a call of the experts' kernel; where all experts are
    resident, what a wait costs.
    """

    configuration: Configuration
    subject: Subject
    routing: Routing
    make_predictor: Callable[[], Predictor | None]
    repetitions: list[list[Step]]
    reads: ReadTimes
    calls: CallTimes
    interruption: Interruption | None = None

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each repetition."""
        return [len(steps) / sum(one.wall_s for one in steps) for steps in self.repetitions]


class Witness(EngineArm):
    """An arm of bench decode that also writes down each step and all router inputs."""

    def reads(self) -> ReadTimes:
        """Of experts, also behind a throttle those of the disk as it is; see `apart`."""
        return read_times(self._engine)

    def calls(self) -> CallTimes:
        """Of the experts' kernel; see `apart`."""
        return call_times(self._engine)

    def interruption(self, passages: list[Passage]) -> Interruption:
        """What a wait costs a token; of an engine that holds all its experts."""
        return interruption(
            self._engine,
            lambda: float(np.median([one.wall_s - one.stall_s for one in self.follow(passages)])),
        )

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
    configurations: Sequence[Configuration],
    passages: list[Passage],
    *,
    repetitions: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Observation]:
    """Run configurations of one model here: each once untimed, then all in turns, and between them
    what is measured apart. Blocks for minutes.
    """
    total = len(configurations) * (repetitions + 1)
    with ExitStack() as stack:
        arms, subjects, routings = [], [], []
        for index, one in enumerate(configurations):
            progress(index, total)
            arm = Witness(
                model=one.model,
                options=one.engine,
                link_bytes_per_s=one.throttle_bytes_per_s,
            )
            stack.callback(arm.close)
            subjects.append(arm.load())
            routings.append(arm.routing(passages))
            arm.follow(passages)
            arms.append(arm)
        apart = _Apart(configurations, arms)
        timed: list[list[list[Step]]] = [[] for _ in configurations]
        for place in range(repetitions):
            # Each round begins elsewhere: what comes first runs on what was measured apart before.
            first = place * len(arms) // repetitions
            for done, index in enumerate([*range(first, len(arms)), *range(first)]):
                progress(len(configurations) * (place + 1) + done, total)
                timed[index].append(arms[index].follow(passages))
            apart.measure(passages)
        progress(total, total)
        return [
            Observation(
                one, subject, routing, arm.make_predictor, steps, apart.reads(one),
                apart.calls(one), apart.interruption(one),
            )
            for one, subject, routing, arm, steps in zip(
                configurations, subjects, routings, arms, timed, strict=True
            )
        ]  # fmt: skip


class _Apart:
    """What is measured apart, of each format on the first arm that has it; medians of all times."""

    def __init__(self, configurations: Sequence[Configuration], arms: Sequence[Witness]) -> None:
        both = list(zip(configurations, arms, strict=True))
        self._arms = {one.format: arm for one, arm in reversed(both)}
        self._resident = [(one, arm) for one, arm in both if one.budget == "all"]
        self._reads: dict[str, list[ReadTimes]] = {name: [] for name in self._arms}
        self._calls: dict[str, list[CallTimes]] = {name: [] for name in self._arms}
        self._interruption: dict[Configuration, list[Interruption]] = {
            one: [] for one, _ in self._resident
        }

    def measure(self, passages: list[Passage]) -> None:
        """Once more of everything."""
        for name, arm in self._arms.items():
            self._reads[name].append(arm.reads())
            self._calls[name].append(arm.calls())
        for one, arm in self._resident:
            self._interruption[one].append(arm.interruption(passages[:1]))

    def reads(self, one: Configuration) -> ReadTimes:
        return ReadTimes(*_medians(self._reads[one.format]))

    def calls(self, one: Configuration) -> CallTimes:
        return CallTimes(*_medians(self._calls[one.format]))

    def interruption(self, one: Configuration) -> Interruption | None:
        found = self._interruption.get(one)
        return None if not found else Interruption(*_medians(found))


def _medians(values: Sequence[Any]) -> list[float]:
    """Of each field of some dataclasses."""
    return [float(one) for one in np.median([astuple(value) for value in values], axis=0)]
