"""`make soak`: one server under a crowd that streams, cancels, dies, dawdles and sends rubbish.

Afterwards nothing may be lost or held: each stream had its own tokens, the server's counters agree
with what its clients saw, and memory, descriptors and threads are flat by their slope.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import served_double
import wire as by_hand
import zmq
import zmq.asyncio
from served_double import PATIENT, answer

from outrider.runtime.request import GenerationRequest
from outrider.runtime.serving.client import AsyncClient
from outrider.runtime.serving.conversation import ServerError
from outrider.runtime.serving.messages import Chunk, Done

# What may be gained over the whole run, by the slope of its second half.
MAX_GAIN = {"rss_bytes": 16 << 20, "fds": 8, "threads": 1}
SAMPLE_S = 1.0


class Crowd:
    """Clients of many habits. `seen` counts how requests ended for those who stayed to see it."""

    def __init__(self, address: str, *, seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._address = address
        self._random = random.Random(seed)
        self._number = 0

    async def one(self, ends_s: float) -> None:
        """A client that comes again and again, with a new connection at times."""
        while time.monotonic() < ends_s:
            async with AsyncClient(self._address, timeout_s=600, options=PATIENT) as client:
                for _ in range(self._random.randint(1, 12)):
                    if time.monotonic() >= ends_s:
                        return
                    await self._request(client)
            # Its connection is cut here: what the server still had for it has no reader.

    async def _request(self, client: AsyncClient) -> None:
        self._number += 1
        pick = self._random.random()
        prompt = f"request {self._number}"
        num_tokens = self._random.choice([1, 5, 20, 60, 200])
        deadline_ms = 1 if pick > 0.97 else None
        leaves_after = self._random.randint(1, num_tokens) if pick < 0.3 else None
        pause_s = 0.05 if 0.3 < pick < 0.33 else 0.0
        request = GenerationRequest(
            # A prompt beyond the context is refused by the server, not by the client.
            prompt="x" * 9000 if 0.94 < pick < 0.97 else prompt,
            max_tokens=num_tokens,
            stream=pick < 0.9,
            deadline_ms=deadline_ms,
        )
        tokens = b""
        try:
            async with aclosing(client.generate(request)) as stream:
                async for item in stream:
                    if isinstance(item, Chunk):
                        tokens += bytes(item.token_ids)
                        if pause_s:
                            await asyncio.sleep(pause_s)
                        if leaves_after is not None and len(tokens) >= leaves_after:
                            self.seen["left"] += 1
                            break
                    elif isinstance(item, Done):
                        self.seen[item.finish_reason] += 1
                        if len(tokens) != num_tokens:
                            self.wrong.append(f"{prompt}: {len(tokens)} of {num_tokens} tokens")
        except ServerError as error:
            self.seen[error.code] += 1
            if error.code == "overloaded":
                await asyncio.sleep((error.retry_after_ms or 100) / 1000)
        if tokens != answer(request.prompt or "", num_tokens)[: len(tokens)]:
            self.wrong.append(f"{prompt}: other tokens than its own")


async def rubbish(address: str, ends_s: float, seed: int) -> int:
    """Messages that are none, from connections that come and go."""
    chosen, num_sent = random.Random(seed), 0
    context = zmq.asyncio.Context()
    while time.monotonic() < ends_s:
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.connect(address)
        for _ in range(20):
            frames = [chosen.randbytes(chosen.randint(0, 60)) for _ in range(chosen.randint(1, 5))]
            await socket.send_multipart(frames)
            num_sent += 1
        await asyncio.sleep(0.2)
        socket.close(linger=0)
    context.term()
    return num_sent


async def killed(address: str, ends_s: float, seed: int) -> int:
    """Processes that are killed in the middle of their streams."""
    chosen, num_killed = random.Random(seed), 0
    while time.monotonic() < ends_s:
        process = await asyncio.create_subprocess_exec(
            sys.executable, by_hand.__file__, address, "killed", "8000",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await process.stdout.readline()
        await asyncio.sleep(chosen.random())
        process.kill()
        await process.wait()
        num_killed += 1
        await asyncio.sleep(2)
    return num_killed


async def watched(process: psutil.Process, ends_s: float) -> list[dict[str, float]]:
    """What the server holds, once a second."""
    samples = []
    while time.monotonic() < ends_s:
        with process.oneshot():
            samples.append(
                {
                    "time_s": time.monotonic(),
                    "rss_bytes": process.memory_info().rss,
                    "fds": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )
        await asyncio.sleep(SAMPLE_S)
    return samples


def gain(samples: list[dict[str, float]], name: str) -> float:
    """What the least-squares line through the second half gains over all of the run."""
    half = samples[len(samples) // 2 :]
    times = np.array([one["time_s"] for one in half])
    values = np.array([one[name] for one in half])
    slope = float(np.polyfit(times - times[0], values, 1)[0])
    return slope * (samples[-1]["time_s"] - samples[0]["time_s"])


async def crowd_of(
    server: served_double.ServerProcess, *, seconds: float, num_clients: int, seed: int
) -> dict[str, Any]:
    """Run them all, and what came of it."""
    ends_s = time.monotonic() + seconds
    crowd = Crowd(server.address, seed=seed)
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(watched(psutil.Process(server.process.pid), ends_s))
        sending = group.create_task(rubbish(server.address, ends_s, seed))
        killing = group.create_task(killed(server.address, ends_s, seed))
        for _ in range(num_clients):
            group.create_task(crowd.one(ends_s))
    return {
        "seen": dict(crowd.seen),
        "wrong": crowd.wrong,
        "rubbish": sending.result(),
        "killed": killing.result(),
        "samples": sampling.result(),
    }


def soak(*, seconds: float, num_clients: int = 200, seed: int = 1) -> dict[str, Any]:
    """One run; "failures" says what did not hold."""
    with tempfile.TemporaryDirectory() as folder:
        server = served_double.start(
            Path(folder),
            step_s=0.001,
            max_running=16,
            options={"max_waiting": 150},
            link={"heartbeat_s": 2, "heartbeat_timeout_s": 60},
        )
        try:
            found = asyncio.run(
                crowd_of(server, seconds=seconds, num_clients=num_clients, seed=seed)
            )
            with by_hand.wire(server.address) as after:
                stats = after.settle()
            server.process.terminate()
            code = server.wait()
        finally:
            server.kill()
    samples = found.pop("samples")
    seen = Counter(found["seen"])
    gains = {name: gain(samples, name) for name in MAX_GAIN}
    # Whoever left saw no end, and a stream may have ended by itself while its client left.
    checks = {
        "every stream had its own tokens": not found["wrong"],
        "nothing is held": stats["expert_cache_bytes"] == 0,
        "all that began ended": stats["requests_started_total"]
        == sum(stats["requests_total"].values()),
        "no end was lost": stats["requests_total"]["length"]
        >= seen["length"] >= stats["requests_total"]["length"] - seen["left"] - found["killed"],
        "errors agree": all(
            stats["errors_total"].get(name, 0) == seen[name]
            for name in ("invalid_request", "deadline_exceeded", "slow_consumer")
        ),
        # Those who were killed may have been refused as well, and told nobody.
        "refusals agree": 0
        <= stats["rejected_total"].get("overloaded", 0) - seen["overloaded"]
        <= found["killed"],
        "killed clients were noticed": stats["errors_total"]["client_gone"] >= found["killed"],
        "rubbish was refused": stats["rejected_total"].get("invalid_request", 0) > 0,
        "the server ended in order": code == 0,
        **{f"{name} is flat": gains[name] <= limit for name, limit in MAX_GAIN.items()},
    }  # fmt: skip
    return {
        "seconds": seconds,
        "clients": num_clients,
        "requests": stats["requests_started_total"],
        "requests_total": stats["requests_total"],
        "errors_total": stats["errors_total"],
        "rejected_total": stats["rejected_total"],
        "gained_over_the_run": gains,
        "last": samples[-1],
        **found,
        "failures": [name for name, holds in checks.items() if not holds],
    }


def main() -> int:
    """Soak, and say what came of it as one JSON document; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    report = soak(seconds=given.seconds, num_clients=given.clients, seed=given.seed)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
