"""`outrider bench decode`: arms side by side in one run, checked against each other, then timed.

Repetitions are interleaved (A B C A B C), so that what else the machine does falls on all arms
alike. No speed is given unless every arm chose the same tokens. Knows arms by their calls only.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from ..runtime import memory
from ..runtime.errors import OutriderError, UsageError
from . import lineup, room
from .environment import environment
from .fence import Fence
from .lineup import Arm
from .records import Bandwidths, External, Measurement, Passage, Recording, Subject
from .roofline import lru_misses
from .rows import Runs, link_speed, make_row
from .worker import Worker
from .workload import BUILT_IN, make_passages, read_texts

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What to measure. `engine` are EngineConfig fields that all arms share.

    `is_cold` None measures both states of the caches, apart. `follows_text`: real text is decoded
    token by token; else the model continues its prompts greedily. Near `time_limit_s` fewer
    repetitions are made, at least 3 (or `repetitions`); rows say how many.
    `memory_limit` holds for every arm but resident ones, page cache included, once it has loaded:
    bytes, or "auto" (`room`); `link_bytes_per_s` throttles all
    their reads from disk (`throttle`; other systems' by `fence`). `llama` is a Python with
    llama-cpp-python and a GGUF file.
    """

    model: str | None = None
    budgets: tuple[str, ...] = ("25%",)
    arms: tuple[str, ...] = ("resident", "on-demand", "prefetch")
    engine: Mapping[str, Any] = field(default_factory=dict)
    store: str | None = None
    prompts: str = BUILT_IN
    num_passages: int = 2
    num_tokens: int = 24
    prompt_tokens: int = 16
    follows_text: bool = True
    repetitions: int = 5
    time_limit_s: float | None = None
    is_cold: bool | None = None
    num_threads: int | None = None
    seed: int = 0
    memory_limit: int | str | None = None
    link_bytes_per_s: int | None = None
    llama: tuple[str, str] | None = None


class MismatchError(OutriderError):
    """Arms chose different tokens, so their speeds say nothing."""


MIN_REPETITIONS = 3
# Another system rounds elsewhere, so some of its tokens differ; with fewer it runs another model.
LEAST_AGREEMENT = 0.5


def bench_decode(options: DecodeOptions, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and return the `bench decode` document of INTERFACES section 1. Blocks for minutes.

    `progress(what, done, total)`. Raises UsageError for options that cannot be, MismatchError
    before any speed is known if arms disagree, and what an arm raises.
    """
    _check(options)
    before = environment()
    bench = _Bench(options, progress or (lambda what, done, total: None))
    with ExitStack() as stack:
        bench.probe = stack.enter_context(Worker("probe", {}, num_threads=options.num_threads))
        kept: dict[str, Worker] = {}
        for budget in options.budgets:
            with ExitStack() as block:
                bench.open(budget, kept, across=stack, block=block)
                bench.measure(budget)
    workload = bench.workload()
    stamp = {"workload": workload, "seed": options.seed, **before.stamp()}
    return {
        "environment": before.ended().as_dict(),
        "workload": workload,
        "rows": [make_row(stamp=stamp, **arguments) for arguments in bench.rows],
        "timelines": bench.timelines,
    }


def _check(options: DecodeOptions) -> None:
    lineup.check(options.arms, has_llama=options.llama is not None)
    for name, given, least in (
        ("repetitions", options.repetitions, 1),
        ("tokens", options.num_tokens, 2),
        ("prompt-tokens", options.prompt_tokens, 1),
        ("passages", options.num_passages, 1),
    ):
        if given < least:
            raise UsageError(f"{name}: {given}; at least {least} is needed")
    if len(set(options.arms)) != len(options.arms) or not options.budgets:
        raise UsageError("each arm is named once, and at least one --expert-memory is needed")


class _Bench:
    """The state of one run: passages and the reference's choices, once they are known."""

    probe: Worker

    def __init__(self, options: DecodeOptions, tell: Progress) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self._tell = tell
        self._passages: list[Passage] = []
        self._subjects: dict[Worker, Subject] = {}
        self._recordings: dict[Worker, Recording] = {}
        self._reference: tuple[str, Recording] | None = None
        self._arms: dict[str, Worker] = {}
        self._budget = ""
        self._limits: dict[str, int | None] = {}
        self._fenced: dict[str, str] = {}
        self._agreement: dict[str, float] = {}
        limit_s = options.time_limit_s
        self._ends = None if limit_s is None else time.monotonic() + limit_s
        self._num_timings_left = len(options.budgets) * len(self._states)
        self.timelines: list[dict[str, Any]] = []
        self._available_bytes = memory.available_bytes()

    @property
    def _states(self) -> tuple[bool, ...]:
        return (False, True) if self.options.is_cold is None else (self.options.is_cold,)

    def open(
        self, budget: str, kept: dict[str, Worker], *, across: ExitStack, block: ExitStack
    ) -> None:
        """Start the arms of one budget, check their tokens, and close the fences around them.

        Arms in `kept` run already; those that serve every budget join it and end with `across`.
        """
        names, self._arms, self._budget = self.options.arms, {}, budget
        fences: dict[str, Fence] = {}

        def start(name: str, arm: Arm, **more: Any) -> None:
            stack = across if arm.is_resident else block
            fence = lineup.fence(name, arm, self.options, within=stack)
            if fence is not None:
                fences[name] = fence
            arguments = {**arm.arguments, **more}
            threads = self.options.num_threads
            worker = Worker(arm.kind, arguments, num_threads=threads, fence=fence)
            self._arms[name] = stack.enter_context(worker)
            worker.ask("load")
            if arm.is_resident:
                kept[name] = worker

        # The first is what the others are held to, so those that round otherwise come later.
        ordered = sorted(names, key=lineup.rounds_otherwise)
        arms = {name: lineup.arm(name, budget, self.options) for name in ordered}
        own = [name for name, arm in arms.items() if name in kept or not arm.is_external]
        self._tell(f"{budget}: loading and checking arms", 0, len(names))
        if not self._subjects:
            # The smallest one tells how large the others will be, before they take anything.
            first = min(own, key=lineup.is_resident)
            start(first, arms[first])
            self._subjects[self._arms[first]] = self._arms[first].answer(Subject)
            self._require_room()
        for name in own:
            if name in kept:
                self._arms[name] = kept[name]
            elif name not in self._arms:
                start(name, arms[name])
        for done, name in enumerate(own):
            self._tell(f"{budget}: loading and checking arms", done, len(names))
            worker = self._arms[name]
            if worker not in self._subjects:
                self._subjects[worker] = worker.answer(Subject)
            if worker not in self._recordings:
                self._check_tokens(name, worker)
        like = self._like(budget)
        limit = self._limits[budget] = room.memory_limit(self.options.memory_limit, like)
        for name, fence in fences.items():
            self._limited(name, fence, limit)
        for name, arm in arms.items():
            if arm.is_external and name not in kept:
                self._tell(f"{budget}: loading and checking arms", len(self._arms), len(names))
                start(name, arm, **lineup.external_arguments(arm, like, limit))
                worker = self._arms[name]
                self._subjects[worker] = lineup.subject(name, worker.answer(External), like)
                if name in fences:
                    self._limited(name, fences[name], limit)
                    worker.call("prepare", True, kind=float)
                self._check_tokens(name, worker)
        self._arms = {name: self._arms[name] for name in names}
        self._tell(f"{budget}: loading and checking arms", len(names), len(names))

    def _require_room(self) -> None:
        """Whether the arms of each budget fit side by side, from the one that has been loaded."""
        options = self.options
        for budget in options.budgets:
            room.require(
                {name: lineup.arm(name, budget, options) for name in options.arms},
                budget,
                self._like(budget),
                limit=options.memory_limit,
                available_bytes=self._available_bytes,
            )

    def _like(self, budget: str) -> Subject:
        """What an arm of ours is at a budget: one of the budget's, or another one brought to it."""
        own = [name for name in self._arms if self._arms[name] in self._subjects]
        name = min(own, key=lineup.is_resident)
        subject = self._subjects[self._arms[name]]
        if budget == self._budget and not lineup.is_resident(name):
            return subject
        return room.at_budget(subject, budget, available_bytes=self._available_bytes)

    def _limited(self, name: str, fence: Fence, limit: int | None) -> None:
        if limit is not None:
            fence.limit_memory(limit)
            self._fenced[name] = fence.kind

    def measure(self, budget: str) -> None:
        """Time the arms of one budget in both states of the caches; watch a token of the first."""
        for is_cold in self._states:
            self._time(budget, self._arms, is_cold=is_cold)
        if budget != self.options.budgets[0]:
            return
        for done, (name, worker) in enumerate(self._arms.items()):
            self._tell(f"{budget}: one token in time", done, len(self._arms))
            if not lineup.is_external(name):
                title = name if lineup.is_resident(name) else f"{name}, {budget}"
                shown = worker.call("timeline", self._passages, title, kind=dict)
                self.timelines.append(shown)
        self._tell(f"{budget}: one token in time", len(self._arms), len(self._arms))

    def workload(self) -> dict[str, Any]:
        """What was decoded."""
        options = self.options
        return {
            "kind": "text" if options.follows_text else "greedy",
            "prompts": options.prompts,
            "passages": [passage.name for passage in self._passages],
            "prompt_tokens": [len(passage.prompt_ids) for passage in self._passages],
            "tokens": options.num_tokens,
        }

    def _check_tokens(self, name: str, worker: Worker) -> None:
        """Record the arm, which warms it up too, and compare it with the first one."""
        if not self._passages:
            self._passages = make_passages(
                read_texts(self.options.prompts, self.options.num_passages),
                lambda texts: worker.call("encode", texts, kind=list[list[int]]),
                num_tokens=self.options.num_tokens,
                prompt_tokens=self.options.prompt_tokens,
                follows_text=self.options.follows_text,
            )
        recording = worker.call("record", self._passages, kind=Recording)
        self._recordings[worker] = recording
        if self._reference is None:
            self._reference = (name, recording)
        self._compare(name, recording.token_ids)

    def _compare(self, name: str, token_ids: list[list[int]]) -> None:
        assert self._reference is not None
        reference, recording = self._reference
        if lineup.rounds_otherwise(name):
            pairs = zip(chain(*token_ids), chain(*recording.token_ids), strict=True)
            same = [found == expected for found, expected in pairs]
            self._agreement[name] = agreement = sum(same) / len(same)
            if agreement < LEAST_AGREEMENT:
                raise MismatchError(
                    f"arm {name!r} agrees with {reference!r} on {100 * agreement:.0f} % of the "
                    "tokens, so it does not run the same model; no speed is reported"
                )
            return
        for passage, found, expected in zip(
            self._passages, token_ids, recording.token_ids, strict=True
        ):
            if found != expected:
                place = next(
                    (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                    min(len(found), len(expected)),
                )
                raise MismatchError(
                    f"arm {name!r} chose other tokens than {reference!r} in passage "
                    f"{passage.name!r}, the first at position {place}: "
                    f"{found[place : place + 3]} where {expected[place : place + 3]} was expected; "
                    "no speed is reported for wrong results"
                )

    def _time(self, budget: str, arms: dict[str, Worker], *, is_cold: bool) -> None:
        what = f"{budget}: timing, {'cold' if is_cold else 'warm'}"
        total = self.options.repetitions * len(arms)
        measured: dict[str, list[Measurement]] = {name: [] for name in arms}
        pages_kept = dict.fromkeys(arms, 0.0)
        bandwidths: list[Bandwidths] = []
        first = self._subjects[next(iter(arms.values()))]
        began = time.monotonic()
        share_s = math.inf if self._ends is None else (self._ends - began) / self._num_timings_left
        self._num_timings_left -= 1
        for repetition in range(self.options.repetitions):
            taken_s = time.monotonic() - began
            if repetition >= MIN_REPETITIONS and taken_s * (1 + 1 / repetition) > share_s:
                break
            seed = self.options.seed + repetition
            bandwidths.append(self._probed(first, seed))
            for position, (name, worker) in enumerate(arms.items()):
                self._tell(what, repetition * len(arms) + position, total)
                is_emptied = is_cold and name != lineup.LLAMA_RESIDENT
                kept = worker.call("prepare", is_emptied, kind=float)
                pages_kept[name] = max(pages_kept[name], kept)
                measurement = worker.call("run", self._passages, kind=Measurement)
                self._compare(name, measurement.token_ids)
                measured[name].append(measurement)
        self._tell(what, total, total)
        runs = {
            name: Runs(
                arm=name,
                budget="all" if lineup.is_resident(name) else budget,
                is_cold=is_cold,
                subject=self._subjects[worker],
                measurements=measured[name],
                pages_kept=pages_kept[name],
                has_identical_logits=self._has_reference_logits(worker),
                memory_limit_bytes=self._limits[budget] if name in self._fenced else None,
                fence=self._fenced.get(name, "none"),
                agreement=self._agreement.get(name, 1.0),
                link_limit_bytes_per_s=(
                    None if lineup.is_resident(name) else self.options.link_bytes_per_s
                ),
            )
            for name, worker in arms.items()
        }
        link = link_speed(bandwidths, list(runs.values()))
        paired = runs.get("on-demand") or next(iter(runs.values()))
        for one in runs.values():
            self.rows.append(
                {
                    "runs": one,
                    "missed_per_token": self._missed_per_token(one),
                    "bandwidths": bandwidths,
                    "link_bytes_per_s": link,
                    "reference": paired,
                }
            )

    def _probed(self, subject: Subject, seed: int) -> Bandwidths:
        found: Bandwidths = self.probe.call(
            "measure", subject.files, subject.device, seed, kind=Bandwidths
        )
        limit = self.options.link_bytes_per_s
        if limit is None:
            return found
        return replace(found, link_bytes_per_s=min(found.link_bytes_per_s, limit))

    def _has_reference_logits(self, worker: Worker) -> bool:
        assert self._reference is not None
        checksum = self._reference[1].logits_checksum
        return self._recordings[worker].logits_checksum == checksum

    def _missed_per_token(self, runs: Runs) -> float:
        if lineup.is_resident(runs.arm):
            return 0.0
        assert self._reference is not None
        passes = self._reference[1].passes
        misses = lru_misses(
            passes,
            num_slots=runs.subject.num_slots,
            num_experts=runs.subject.num_experts,
            is_warm=not runs.is_cold,
        )
        return misses / sum(one.is_decode for one in passes)
