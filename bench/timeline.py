"""One token in time: what the processor did, and what the link carried meanwhile.

Of a replay here, and simulated as every time of one; `witness` has those of the engine. Written as
Chrome's trace events, which Perfetto opens too:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..collect.durable import durable_write
from ..collect.schema import ExpertKey
from ..runtime.errors import OutriderError
from ..runtime.experts.cache import Kind, Slot
from ..runtime.experts.transfer import Transfer
from .link import VirtualCopy, VirtualLink
from .replay import Arm, Replay, Schedule

PROCESSOR, LINK = "processor", "link"
Span = tuple[str, str, float, float]
"""Lane, name, and the seconds of one clock from and to which it lasted."""

NUM_SEQUENCES = 6
"""Replayed before the token that is shown, so that slots are filled as they usually are."""


def timeline(schedule: Schedule, arm: Arm, *, name: str) -> dict[str, Any]:
    """The last token of the last sequence: `events` with lane, name, start and seconds.

    Starts count from the token's own; what the link was busy with before is cut off there.
    """
    replay = _Watched(schedule, arm)
    last = schedule.num_sequences - 1
    for sequence in range(max(0, last - NUM_SEQUENCES), last + 1):
        replay.run([sequence])
    spans = [*replay.work, *replay.copies()]
    return line_of(name, spans, token=replay.token, is_simulated=True)


def line_of(
    arm: str, spans: Iterable[Span], *, token: tuple[float, float], is_simulated: bool
) -> dict[str, Any]:
    """The document of one token: what of each span (lane, name, from, to) lies within it."""
    began, ended = token
    events = [
        {"lane": lane, "name": what, "start_s": max(start, began) - began,
         "seconds": min(end, ended) - max(start, began)}
        for lane, what, start, end in spans
        if min(end, ended) > max(start, began)
    ]  # fmt: skip
    return {
        "arm": arm,
        "simulated": is_simulated,
        "seconds": ended - began,
        "events": sorted(events, key=lambda one: (one["lane"], one["start_s"])),
    }


def write_trace(lines: list[dict[str, Any]], folder: Path) -> Path:
    """Write `timeline.json` into `folder`, a process an arm; returns the file.

    OutriderError where it cannot be written.
    """
    events: list[dict[str, Any]] = []
    for process, line in enumerate(lines):
        title = f"{'simulated' if line['simulated'] else 'measured'}: {line['arm']}"
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}})
        for thread, lane in enumerate((PROCESSOR, LINK)):
            common = {"pid": process, "tid": thread}
            events.append({"ph": "M", **common, "name": "thread_name", "args": {"name": lane}})
            events += [
                {"ph": "X", **common, "name": one["name"], "cat": lane,
                 "ts": 1e6 * one["start_s"], "dur": 1e6 * one["seconds"]}
                for one in line["events"]
                if one["lane"] == lane
            ]  # fmt: skip
    path = folder / "timeline.json"
    is_simulated = str(any(line["simulated"] for line in lines)).lower()
    other = {"simulated": is_simulated}
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with durable_write(path) as file:
            file.write(json.dumps(document).encode())
    except OSError as error:
        raise OutriderError(
            f"profile: {str(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    return path


class _Watched(Replay):
    """A replay that keeps the times of its last token; always the executor's way."""

    def __init__(self, schedule: Schedule, arm: Arm) -> None:
        super().__init__(schedule, arm)
        self.work: list[tuple[str, str, float, float]] = []
        self.token = (0.0, 0.0)
        self._submitted: list[VirtualCopy] = []
        self._submit = self.link.submit
        self.link.submit = self._note  # type: ignore[method-assign]

    def copies(self) -> list[tuple[str, str, float, float]]:
        """Copies that began before the token ended, as events."""
        ended = self.token[1]
        return [
            (LINK, f"{one.kind.value} {one.key.layer_idx}/{one.key.expert_idx}", one.began_s,
             one.ended_s if one.is_done else ended)
            for one in self._submitted
            if one.is_started and not one.is_cancelled
        ]  # fmt: skip

    def _note(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        copy = self._submit(key, slot, kind)
        assert isinstance(copy, VirtualCopy) and isinstance(self.link, VirtualLink)
        self._submitted.append(copy)
        return copy

    def _reading_ahead(self, layers: Any, **given: Any) -> float:
        self.work = []
        self._submitted = [one for one in self._submitted if not one.is_done]
        began = self._clock.now
        stall_s = super()._reading_ahead(layers, **given)
        self.token = (began, self._clock.now)
        return stall_s

    def _on_demand(self, layers: Any, **given: Any) -> float:
        return self._reading_ahead(layers, **given)

    def _spend(self, what: str, seconds: float) -> None:
        began = self._clock.now
        super()._spend(what, seconds)
        if seconds > 0.0:
            self.work.append((PROCESSOR, what, began, self._clock.now))
