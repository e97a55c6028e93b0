"""`outrider serve` on the built-in model, through the commands and by hand: one server a module."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import served_double
import wire as by_hand
from wire import CHUNK, DONE, ERROR, GENERATE, HELLO

from outrider.kernels import native

OUTRIDER = Path(sys.executable).with_name("outrider")
# In fp32 no near tie is tipped by the sums of a batch of another size.
FP32 = ("--dtype", "fp32")
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    command = [str(OUTRIDER), "serve", "nano", "--bind", f"ipc://{folder}/s"]
    command += ["--expert-memory", "25%", "--max-running", "4", "--log-level", "debug", *FP32]
    server = served_double.start(folder, arguments=command)
    assert server.address, server.log_file.read_text()
    yield server
    server.kill()


@pytest.fixture
def wire(server):
    with by_hand.wire(server.address) as one:
        yield one
        stats = one.settle()
        assert stats["requests_started_total"] == sum(stats["requests_total"].values())


def outrider(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OUTRIDER, *arguments], capture_output=True, text=True, timeout=280, env=os.environ
    )


def test_ask_gets_what_generate_says(server):
    options = ["--prompt", "The film was", "--max-tokens", "12", "--temperature", "0", "--json"]
    asked = outrider("ask", "--connect", server.address, *options)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    alone = json.loads(outrider("generate", "--prefetch", "off", *FP32, *options).stdout)
    for field in ("token_ids", "text", "finish_reason", "usage"):
        assert answer[field] == alone[field]
    assert answer["timings"].keys() == alone["timings"].keys()
    assert answer["experts"].keys() == alone["experts"].keys()
    assert answer["experts"]["decode"]["lookups"] > 0


def test_ask_streams_text_and_refuses_in_one_line(server):
    done = outrider("ask", "--connect", server.address, "--prompt", "A", "--max-tokens", "3")
    assert done.returncode == 0 and done.stdout.endswith("\n")
    assert "3 tokens" in done.stderr
    refused = outrider("ask", "--connect", server.address, "--prompt", "A", "--max-tokens", "9999")
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr.startswith("outrider: invalid_request: ") and refused.stderr.count("\n") == 1
    )


def test_a_prompt_that_begins_as_an_earlier_one_is_not_run_again(wire):
    prompt = "Once upon a time there was a king who had three sons, " * 4
    before = wire.stats()["prompt_tokens_cached_total"]
    seen = []
    for number in range(2):
        request_id = b"again%d" % number
        wire.generate(request_id, prompt, 6, temperature=0.0)
        seen.append(wire.gather(request_id))
    assert seen[0][0] == seen[1][0]
    first, second = (one[3]["usage"] for one in seen)
    assert first["prompt_tokens"] == second["prompt_tokens"] > 33
    assert first["cached_tokens"] == 0
    # Nothing is kept where prompts run through transformers, as without the native library.
    if native.is_available():
        assert 0 < second["cached_tokens"] < second["prompt_tokens"]
    gained = wire.stats()["prompt_tokens_cached_total"] - before
    assert gained == second["cached_tokens"]


def test_a_request_gets_its_tokens_whatever_runs_beside_it(wire):
    """Greedy, one at a time and then among others that come, leave and are cancelled."""
    prompts = ["The film was", "In the beginning", "She opened the door", "def main():"]
    alone = {}
    for prompt in prompts:
        wire.generate(b"a", prompt, 24, temperature=0, ignore_eos=True)
        alone[prompt] = wire.gather(b"a")[:2]
    for place, prompt in enumerate(prompts):
        wire.generate(b"%d" % place, prompt, 24, temperature=0, ignore_eos=True)
    wire.generate(b"left", "cancelled", 200, temperature=0)
    got = {b"%d" % place: ([], "") for place in range(len(prompts))}
    num_ended = 0
    while num_ended < len(prompts):
        kind, request_id, body = wire.receive()
        if request_id == b"left":
            continue
        if kind == CHUNK:
            tokens, text = got[request_id]
            got[request_id] = tokens + body["token_ids"], text + body["text"]
            if len(tokens) == 3 and request_id == b"0":
                wire.send(by_hand.CANCEL, b"left")
        else:
            assert kind == DONE, body
            num_ended += 1
    assert {prompt: got[b"%d" % place] for place, prompt in enumerate(prompts)} == alone


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "word " * 1100}, "prompt"),
        ({"prompt": "a" * 2**20}, "prompt"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [10**6]}, "prompt_token_ids"),
        ({"prompt": "p", "max_tokens": 2000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "hello"}]}, None),
    ],
)
def test_what_the_model_cannot_take_is_refused_and_the_engine_lives(wire, fields, field):
    wire.send(GENERATE, b"a", {"max_tokens": 1} | fields)
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "invalid_request")
    assert field is None or error["field"] in (field, None)
    wire.generate(b"b", "goes on", 3)
    assert wire.gather(b"b")[2] == DONE


def test_special_and_control_characters_have_a_defined_result(wire):
    for prompt in ("\0", "\u202e\ufeff", "<|endoftext|>", "\U0001f9ff" * 5):
        wire.generate(b"a", prompt, 3, temperature=0)
        assert wire.gather(b"a")[2] == DONE


def test_a_deadline_ends_a_request_between_two_passes(wire):
    wire.generate(b"a", "The film was", 900, deadline_ms=300, ignore_eos=True)
    _, _, kind, body = wire.gather(b"a")
    assert (kind, body["code"]) == (ERROR, "deadline_exceeded")


def test_stats_show_experts_and_their_places(wire):
    _, ready = wire.ask(HELLO)
    model = ready["model"]
    wire.generate(b"a", "The film was", 8)
    assert wire.gather(b"a")[2] == DONE
    stats = wire.settle()
    assert len(stats["residency"]) == model["num_moe_layers"] * model["num_experts"]
    assert sum(place != 0 for place in stats["residency"]) <= model["num_slots"]
    assert stats["expert_lookups_total"]["hit"] + stats["expert_lookups_total"]["miss"] > 0
    assert stats["expert_transfer_bytes_total"]["on_demand"] > 0
    assert not stats["degraded"]


def test_the_documented_client_works_as_it_stands(server):
    """The example of docs/serving.md, cut out and run: pyzmq and msgpack, nothing of ours."""
    (source,) = re.findall(r"```python\n(import msgpack.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "outrider" not in source.replace("outrider serve", "")
    done = subprocess.run(
        [sys.executable, "-c", source, server.address, "The film was"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = ["--prompt", "The film was", "--max-tokens", "32", "--temperature", "0", "--json"]
    answer = json.loads(outrider("ask", "--connect", server.address, *options).stdout)
    assert done.stdout == answer["text"] + "\n" and answer["text"]
    assert answer["finish_reason"] in done.stderr


def test_sigterm_under_load_drains_and_the_log_says_so(server):
    with by_hand.wire(server.address) as one:
        for number in range(6):
            one.generate(b"%d" % number, f"The number {number}", 40, ignore_eos=True)
        assert one.receive()[0] == CHUNK
        server.process.send_signal(signal.SIGTERM)
        endings = {}
        while len(endings) < 6:
            kind, request_id, body = one.receive()
            if kind != CHUNK:
                endings[request_id] = kind, body.get("finish_reason")
        assert set(endings.values()) == {(DONE, "length")}
    assert server.wait() == 0
    assert server.events("draining")[0]["open"] == 6
    assert server.events("stopped")[0]["exit_code"] == 0
