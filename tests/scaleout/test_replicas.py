"""`outrider serve --replicas` on a real Ray cluster, asked by OpenAI's own client."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import psutil
import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

MAIN = "from outrider.runtime.cli import main; main()"
ENGINE = "outrider.runtime.scaleout.engine_process"
TOKENS = 300


class Fleet:
    """The command in a process group of its own, with its log read as far as needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = (folder / "log").open("w+")
        environment = os.environ | {"TMPDIR": str(folder), "OUTRIDER_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", MAIN, "serve", "nano", "--replicas", "2", "--http",
                "127.0.0.1:0", "--max-running", "1", "--shutdown-timeout", "10",
            ],
            env=environment, stderr=self._log, stdout=self._log, start_new_session=True,
        )  # fmt: skip

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def url(self) -> str:
        """Where it listens, once it does."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.log().splitlines():
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    return json.loads(line)["url"] + "/v1"
            time.sleep(0.2)
        raise AssertionError(self.log())

    def engines(self) -> list[psutil.Process]:
        """The engines' processes, oldest first."""
        found = [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if ENGINE in _words(one)
        ]
        # The raylet starts workers in sessions of their own, but as its children.
        return sorted(found, key=lambda one: one.create_time())

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._log.close()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def fleet():
    # Short: Ray puts sockets into it, whose paths may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="o-", ignore_cleanup_errors=True) as folder:
        made = Fleet(Path(folder))
        try:
            yield made
        finally:
            made.stop()


async def _stream(client, number, texts=None):
    """The text, and the error it ended with if it did; what has come so far is in `texts`."""
    text = ""
    try:
        events = await client.completions.create(
            model="nano", prompt=f"The number {number} is", max_tokens=TOKENS, temperature=0,
            stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for event in events:
            text += event.choices[0].text
            if texts is not None and text:
                texts[number] = text
        return text, None
    except openai.APIError as error:
        return text, error


async def _load_with_a_death(url, kill):
    """Six requests on two replicas that run one at a time; one dies while both are at work.

    Both are once two requests stream, neither near its end: until then the second may be starting.
    """
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=240) as client:
        calm = [await _stream(client, number) for number in range(6)]
        assert all(error is None and text for text, error in calm)
        for _ in range(20):
            texts: dict[int, str] = {}
            tasks = [asyncio.create_task(_stream(client, number, texts)) for number in range(6)]
            while not all(task.done() for task in tasks):
                running = {
                    number
                    for number, text in texts.items()
                    if not tasks[number].done() and len(text) < len(calm[number][0]) / 2
                }
                if len(running) == 2:
                    kill()
                    return calm, await asyncio.gather(*tasks)
                await asyncio.sleep(0.01)
        raise AssertionError("two requests never streamed at once")


def _await_engines(fleet, count, *, without):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        engines = [one for one in fleet.engines() if one.pid not in without]
        if len(engines) == count:
            return engines
        time.sleep(0.2)
    raise AssertionError(fleet.log())


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_a_killed_replica_costs_the_request_that_streams_from_it_and_no_other(fleet, victim):
    url = fleet.url()
    lost = 0
    for _ in range(5):
        engine = _await_engines(fleet, 2, without=())[0]
        target = engine if victim == "engine" else engine.parent()
        lost += _lost_with(url, target)
        # The engine goes with its replica, and another pair comes in their place.
        psutil.wait_procs([engine], timeout=20)
        assert not engine.is_running()
        _await_engines(fleet, 2, without={engine.pid})
        if lost:
            return
    raise AssertionError("each time the victim had sent all of what it ran")


def _lost_with(url, target):
    """How many of six requests end with an error when `target` dies; all else is as it was."""
    calm, after = asyncio.run(_load_with_a_death(url, lambda: os.kill(target.pid, signal.SIGKILL)))
    failed = {number for number, (_, error) in enumerate(after) if error is not None}
    # What runs on the victim, and what had ended there but was still on its way to the client;
    # or nothing, where the client is so far behind that all had been sent.
    assert len(failed) <= 2
    for number in failed:
        text, error = after[number]
        # Of what had not begun to stream, nothing is lost: it began again elsewhere.
        assert text and calm[number][0].startswith(text)
        assert "the replica that ran this request ended; send it again" in str(error)
    for number in set(range(6)) - failed:
        assert after[number] == calm[number]
    return len(failed)


def test_figures_are_those_of_both_replicas_the_dead_ones_included(fleet):
    import httpx2

    base = fleet.url().removesuffix("/v1")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if httpx2.get(f"{base}/ready", trust_env=False).status_code == 200:
            break
        time.sleep(0.2)
    lines = httpx2.get(f"{base}/metrics", trust_env=False).text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    assert figures["outrider_up"] == figures["outrider_ready"] == "1.0"
    # At least the calm requests of the two tests before, some of them on replicas now dead.
    assert float(figures['outrider_requests_total{finish_reason="length"}']) >= 12
    assert httpx2.get(f"{base}/stats", trust_env=False).json()["residency"] is None


def test_it_ends_in_order_and_leaves_nothing(fleet):
    fleet.url()
    family = psutil.Process(fleet.process.pid).children(recursive=True)
    assert fleet.stop() == 0, fleet.log()[-2000:]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not list(fleet.folder.glob("outrider-*"))
