"""The command line: what it prints where, and the exit code and one line of every refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from outrider.runtime import memory
from outrider.runtime.cli import COMMANDS, app
from outrider.runtime.commands.display import summary
from outrider.runtime.errors import UsageError
from outrider.runtime.stats import ExpertUsage, GenerationStats, GenerationTimings

SCRIPT = Path(sys.executable).with_name("outrider")
GREEDY = ("--temperature", "0", "--max-tokens", "4", "--ignore-eos")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("OUTRIDER_") and name != "OUTRIDER_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def model(models):
    return models.checkpoint("qwen3_moe")


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(model, tmp_path / "model")


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)


def document(*arguments, stdin=None):
    """The JSON document that a command ends with."""
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def check_refusal(result, code, message):
    """One line on stderr, no result on stdout, no traceback."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("outrider: ")]
    assert len(ours) == 1
    assert message in ours[0]


# --- what is printed -------------------------------------------------------------------------

TRAFFIC = {
    "lookups",
    "hits_resident",
    "hits_prefetched",
    "late_hits",
    "misses",
    "host_computed",
    "prefetch_issued",
    "prefetch_used",
    "prefetch_used_next",
    "prefetch_wasted",
    "prefetch_cancelled",
    "bytes_on_demand",
    "bytes_prefetched",
}


def test_generate_json_has_the_promised_fields(model):
    got = document("generate", model, "--prompt", "the film", "--expert-memory", "25%", *GREEDY)
    assert set(got) == {
        "model", "format", "device", "predictor", "exact", "prompt_token_ids", "token_ids", "text",
        "finish_reason", "usage", "timings", "experts",
    }  # fmt: skip
    assert set(got["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert set(got["timings"]) == {
        "load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "stall_s",
    }  # fmt: skip
    experts = got["experts"]
    assert set(experts) == {"total", "slots", "budget_bytes", "slot_bytes", "decode", "prefill"}
    assert set(experts["decode"]) == set(experts["prefill"]) == TRAFFIC
    assert (got["model"], got["format"], got["device"]) == (str(model), "fp32", "cpu")
    assert (got["predictor"], got["exact"]) == ("lookahead", True)
    assert (got["finish_reason"], len(got["token_ids"])) == ("length", 4)
    assert got["usage"] == {
        "prompt_tokens": len(got["prompt_token_ids"]),
        "completion_tokens": 4,
    }
    assert (experts["total"], experts["slots"]) == (32, 8)
    assert experts["budget_bytes"] == 8 * experts["slot_bytes"]
    for phase in ("decode", "prefill"):
        counts = experts[phase]
        served = ("hits_resident", "hits_prefetched", "late_hits", "misses")
        assert counts["lookups"] == sum(counts[name] for name in served)
        assert counts["misses"] > 0


def test_text_is_streamed_and_the_summary_is_apart(model):
    result = run("generate", model, "--prompt", "the film", *GREEDY)
    assert result.exit_code == 0
    got = document("generate", model, "--prompt", "the film", *GREEDY)
    assert result.stdout == got["text"] + "\n"
    assert "4 tokens" in result.stderr
    assert "of 32 (" in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("budget", ["5%", "25%", "all", "auto"])
@pytest.mark.parametrize("prefetch", ["on", "off", "auto"])
def test_tokens_are_the_same_for_every_budget_and_prefetch(models, model, budget, prefetch):
    got = document(
        "generate", model, "--prompt", "the film", "--dtype", "fp32", "--format", "fp32",
        "--expert-memory", budget, "--prefetch", prefetch, *GREEDY,
    )  # fmt: skip
    reference = models.reference("qwen3_moe")
    expected = list(got["prompt_token_ids"])
    for _ in range(4):
        expected.append(int(reference.logits(expected)[-1].argmax()))
    assert got["token_ids"] == expected[len(got["prompt_token_ids"]) :]


def test_a_prompt_is_read_from_standard_input(model):
    piped = document("generate", model, *GREEDY, stdin="the film\n")
    given = document("generate", model, "--prompt", "the film\n", *GREEDY)
    assert piped["prompt_token_ids"] == given["prompt_token_ids"]
    assert piped["token_ids"] == given["token_ids"]


def test_chat_puts_the_prompt_into_the_template(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = document("generate", folder, "--chat", "--prompt", "the film", *GREEDY)
    plain = document("generate", folder, "--prompt", "[user]the film[assistant]", *GREEDY)
    assert chat["prompt_token_ids"] == plain["prompt_token_ids"]


def test_a_seed_and_a_stop_are_heeded(model):
    options = ("--prompt", "the film", "--max-tokens", "12", "--ignore-eos")
    seeded = [
        document("generate", model, *options, "--seed", seed)["token_ids"] for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]
    whole = document("generate", model, *options, "--temperature", "0")["text"]
    stop = whole[3:5]
    got = document("generate", model, *options, "--temperature", "0", "--stop", stop)
    assert got["finish_reason"] == "stop"
    assert got["text"] == whole[: whole.index(stop)]


def rows(*arguments):
    return {
        row["option"]: row for row in document("generate", "--print-config", *arguments)["rows"]
    }


def test_print_config_says_where_each_value_came_from(monkeypatch, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("prefetch: off\nexpert_memory: 10%\ntemperature: 0.5\n")
    monkeypatch.setenv("OUTRIDER_EXPERT_MEMORY", "20%")
    monkeypatch.setenv("OUTRIDER_TOP_K", "7")
    monkeypatch.setenv("OUTRIDER_SEED", "3")
    found = rows("--config", file, "--seed", "4")
    assert {name: found[name]["value"] for name in ("prefetch", "expert_memory", "seed")} == {
        "prefetch": "off",
        "expert_memory": "20%",
        "seed": 4,
    }
    where = {name: row["where"] for name, row in found.items()}
    assert where["prefetch"] == f"{file}:1"
    assert where["expert_memory"] == "OUTRIDER_EXPERT_MEMORY"
    assert where["seed"] == "--seed"
    assert where["top_k"] == "OUTRIDER_TOP_K"
    assert where["temperature"] == f"{file}:3"
    assert where["max_tokens"] == "default"
    result = run("generate", "--print-config", "--config", file)
    assert result.exit_code == 0
    assert f"{file}:3" in result.stdout


def test_the_environment_and_a_file_are_heeded(model, monkeypatch, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("max_tokens: 2\ntemperature: 0\nexpert-memory: 50%\n")
    monkeypatch.setenv("OUTRIDER_MAX_TOKENS", "3")
    monkeypatch.setenv("OUTRIDER_IGNORE_EOS", "true")
    got = document("generate", model, "--prompt", "the film", "--config", file)
    assert len(got["token_ids"]) == 3
    assert got["experts"]["slots"] == 16


def test_a_profile_is_written(model, tmp_path):
    document("generate", model, "--prompt", "x", "--profile", tmp_path / "new" / "folder", *GREEDY)
    trace = json.loads((tmp_path / "new" / "folder" / "trace.json").read_text())
    assert trace["traceEvents"]


def test_a_summary_without_decode_steps_is_still_one():
    stats = GenerationStats(GenerationTimings(load_s=1.0), ExpertUsage(10, 5, 500, 100))
    assert "1 tokens" in summary(stats, num_tokens=1)


# --- refusals of generate --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        pytest.param(["--prompt", ""], 2, "the prompt is empty", id="empty-prompt"),
        pytest.param(["--prompt", "x" * 400], 2, "context", id="prompt-beyond-the-context"),
        pytest.param(["--max-tokens", "256"], 2, "the context holds 256", id="answer-too-long"),
        pytest.param(["--max-tokens", "0"], 2, "max_tokens", id="no-tokens"),
        pytest.param(["--temperature", "nan"], 2, "temperature is nan", id="temperature-nan"),
        pytest.param(["--temperature", "inf"], 2, "temperature is inf", id="temperature-inf"),
        pytest.param(["--temperature", "-1"], 2, "temperature is -1", id="temperature-negative"),
        pytest.param(["--top-p", "nan"], 2, "top_p is nan", id="top-p-nan"),
        pytest.param(["--top-p", "0"], 2, "top_p is 0", id="top-p-0"),
        pytest.param(["--top-p", "1.5"], 2, "top_p is 1.5", id="top-p-above-1"),
        pytest.param(["--top-k", "-1"], 2, "top_k is -1", id="top-k-negative"),
        pytest.param(["--min-p", "2"], 2, "min_p is 2", id="min-p-above-1"),
        pytest.param(["--seed", "-1"], 2, "seed is -1", id="seed-negative"),
        pytest.param(["--stop", ""], 2, "stop", id="stop-empty"),
        pytest.param(["--expert-memory", "1B"], 2, "the smallest budget", id="budget-too-small"),
        pytest.param(["--expert-memory", "0.1%"], 2, "the smallest budget", id="percent-too-small"),
        pytest.param(["--expert-memory", "999TiB"], 4, "999", id="budget-beyond-memory"),
        pytest.param(["--expert-memory", "8 bananas"], 2, "is not a size", id="budget-nonsense"),
        pytest.param(["--expert-memory", "101%"], 2, "101%", id="percent-above-100"),
        pytest.param(["--format", "int3"], 2, "format is 'int3'", id="format"),
        pytest.param(["--dtype", "int8"], 2, "dtype is 'int8'", id="dtype"),
        pytest.param(["--device", "tpu"], 2, "device is 'tpu'", id="device"),
        pytest.param(["--prefetch", "maybe"], 2, "prefetch is 'maybe'", id="prefetch"),
        pytest.param(["--predictor", "oracle"], 2, "replay only", id="predictor-oracle"),
        pytest.param(["--predictor", "crystal"], 2, "predictor is 'crystal'", id="predictor"),
        pytest.param(["--eviction", "belady"], 2, "replay only", id="eviction-belady"),
        pytest.param(["--on-miss", "host"], 2, "on_miss is 'host'", id="on-miss-without-gpu"),
        pytest.param(["--host-memory", "1GiB"], 2, "host_memory", id="host-memory-without-gpu"),
        pytest.param(["--verify-on-load"], 2, "no checksums", id="nothing-to-verify"),
        pytest.param(["--chat"], 2, "chat template", id="no-chat-template"),
        pytest.param(["--num-threads", "0"], 2, "num_threads is 0", id="no-threads"),
        pytest.param(["--store", "/nowhere"], 3, "/nowhere", id="no-store"),
        pytest.param(["--config", "/nowhere.yaml"], 2, "/nowhere.yaml", id="no-config"),
    ],
)
def test_generate_refuses(model, options, code, message):
    options = options if "--prompt" in options else [*options, "--prompt", "the film"]
    tokens = [] if "--max-tokens" in options else ["--max-tokens", "2"]
    check_refusal(run("generate", model, *options, *tokens), code, message)


def test_the_smallest_budget_that_is_named_is_accepted(model):
    refused = run("generate", model, "--prompt", "x", "--expert-memory", "1B")
    words = refused.stderr.split()
    smallest = words[words.index("is", words.index("budget")) :]
    num_bytes = next(word for word in smallest if word.isdigit())
    percent = next(word for word in smallest if word.endswith("%"))
    for budget in (num_bytes, percent):
        got = document("generate", model, "--prompt", "x", "--expert-memory", budget, *GREEDY)
        assert got["experts"]["slots"] == 1


def test_a_budget_that_does_not_fit_what_is_free_is_refused(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 512 << 20)
    result = run("generate", model, "--prompt", "x", "--expert-memory", "all")
    check_refusal(result, 4, "give a smaller --expert-memory")


def test_no_prompt_at_a_terminal_is_a_usage_error(monkeypatch):
    from outrider.runtime.commands import options

    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(options.sys, "stdin", Terminal())
    with pytest.raises(UsageError, match="no prompt: give --prompt"):
        options.prompt_text(None)


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        pytest.param("", "the prompt is empty", id="nothing"),
        pytest.param(b"\xff\xfe", "is not UTF-8", id="not-utf-8"),
    ],
)
def test_a_prompt_on_standard_input_that_is_none_is_refused(model, stdin, message):
    check_refusal(run("generate", model, stdin=stdin), 2, message)


def without_weights(folder, *, leaving):
    (folder / "model.safetensors").unlink()
    (folder / leaving).write_bytes(b"x")


def with_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def without_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


# what is done to the folder, what the refusal says, and which commands notice
DAMAGE = {
    "no-folder": (shutil.rmtree, "", "generate pack inspect env"),
    "no-config": (lambda f: (f / "config.json").unlink(), "", "generate pack inspect env"),
    "pickle-only": (
        lambda f: without_weights(f, leaving="pytorch_model.bin"),
        "run code",
        "generate pack inspect env",
    ),
    "gguf-only": (
        lambda f: without_weights(f, leaving="m.gguf"),
        "GGUF",
        "generate pack inspect env",
    ),
    "cut-short": (
        lambda f: os.truncate(f / "model.safetensors", 9000),
        "model.safetensors",
        "generate pack inspect env",
    ),
    "no-tensor": (
        lambda f: without_tensor(f, "model.norm.weight"),
        "model.norm.weight",
        "generate pack",
    ),
    "no-tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "no usable tokenizer",
        "generate",
    ),
    "no-experts": (
        lambda f: with_config(f, model_type="llama"),
        "llama",
        "generate pack inspect env",
    ),
    "unknown-family": (
        lambda f: with_config(f, model_type="frob"),
        "frob",
        "generate pack inspect env",
    ),
    "odd-config": (
        lambda f: with_config(f, hidden_size="x"),
        "hidden_size",
        "generate pack inspect env",
    ),
    "unknown-encoding": (
        lambda f: with_config(f, quantization_config={"quant_method": "awq"}),
        "awq",
        "generate pack",
    ),
}


@pytest.mark.parametrize(
    ("damage", "command"),
    [
        pytest.param(name, command, id=f"{name}-{command}")
        for name, (_, _, commands) in DAMAGE.items()
        for command in commands.split()
    ],
)
def test_a_model_that_cannot_be_used_is_refused(folder, tmp_path, damage, command):
    damage, message, _ = DAMAGE[damage]
    damage(folder)
    arguments = {
        "generate": ["generate", folder, "--prompt", "x"],
        "pack": ["pack", folder, "--out", tmp_path / "store"],
        "inspect": ["inspect", folder],
        "env": ["env", "--model", folder],
    }[command]
    check_refusal(run(*arguments), 3, message or str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["frobnicate"], "No such command 'frobnicate'", id="command"),
        pytest.param(["generate", "--frobnicate"], "No such option", id="option"),
        pytest.param(
            ["generate", "--max-tokens", "many"],
            "Invalid value for '--max-tokens'",
            id="not-a-number",
        ),
        pytest.param(
            ["generate", "--temperature", "hot"],
            "Invalid value for '--temperature'",
            id="not-a-float",
        ),
        pytest.param(["generate", "a", "b"], "unexpected extra argument", id="two-models"),
        pytest.param(["generate", "--prompt"], "requires an argument", id="no-value"),
        pytest.param(["verify"], "Missing argument", id="no-store"),
    ],
)
def test_a_line_that_makes_no_sense_ends_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_misspelt_variable_is_told(model, monkeypatch):
    monkeypatch.setenv("OUTRIDER_EXPERT_MEMRY", "25%")
    result = run("generate", model, "--prompt", "x")
    check_refusal(result, 2, "did you mean OUTRIDER_EXPERT_MEMORY")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("expert_memry: 1\n", "did you mean expert_memory", id="misspelt"),
        pytest.param("- a\n", "option: value", id="a-list"),
        pytest.param("a: [\n", "is not YAML", id="half"),
        pytest.param("temperature: hot\n", "temperature", id="not-a-number"),
        pytest.param("max_tokens: 0\n", "max_tokens", id="out-of-range"),
        pytest.param("prefetch: maybe\n", "options.yaml:1", id="says-the-line"),
    ],
)
def test_a_file_of_options_that_is_wrong_is_refused(model, tmp_path, content, message):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    check_refusal(run("generate", model, "--prompt", "x", "--config", file), 2, message)


@pytest.mark.parametrize("cache", ["/proc/outrider", "{file}/below"])
def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
    model, tmp_path, monkeypatch, cache
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTRIDER_CACHE", cache.format(file=tmp_path / "file"))
    result = run("generate", model, "--prompt", "x", "--format", "int8")
    check_refusal(result, 1, "OUTRIDER_CACHE")


# --- the other commands ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "int8"
    result = run("pack", model, "--format", "int8", "--out", out, "--no-perplexity")
    assert result.exit_code == 0, result.stderr
    return out, result.stdout


def test_a_packed_store_is_used_as_its_message_says(model, store):
    out, said = store
    assert f"--store {out}" in said
    got = document("generate", model, "--prompt", "the film", "--store", out, *GREEDY)
    assert got["format"] == "int8"
    cached = document("generate", model, "--prompt", "the film", "--format", "int8", *GREEDY)
    assert got["token_ids"] == cached["token_ids"]


def test_a_store_of_another_model_is_refused(models, store):
    out, _ = store
    other = models.checkpoint("qwen2_moe")
    result = run("generate", other, "--prompt", "x", "--store", out, "--format", "int8")
    check_refusal(result, 3, "cannot serve this model")


def test_verify_finds_one_flipped_bit(model, store, tmp_path):
    out, _ = store
    assert document("verify", out)["damaged"] == []
    copy = shutil.copytree(out, tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 4
    shard.write_bytes(content)
    result = run("verify", copy)
    check_refusal(result, 3, "1 of 32 experts are damaged")
    result = run("verify", copy, "--json")
    assert result.exit_code == 3
    assert len(json.loads(result.stdout)["damaged"]) == 1
    result = run(
        "generate", model, "--prompt", "the film", "--store", copy, "--format", "int8",
        "--verify-on-load", "--expert-memory", "all", *GREEDY, "--max-tokens", "60", "--json",
    )  # fmt: skip
    check_refusal(result, 1, "checksum")


def test_inspect_says_what_a_folder_is(model, store):
    out, _ = store
    found = document("inspect", out)
    assert (found["kind"], found["format"], found["experts"]) == ("expert store", "int8", 32)
    found = document("inspect", model)
    assert (found["kind"], found["family"], found["num_experts"]) == ("model", "qwen3_moe", 16)
    assert found["dense_bytes"] + found["routed_expert_bytes"] == found["total_bytes"]
    assert "qwen3_moe" in run("inspect", model).stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(None, None, "holds neither", id="empty-folder"),
        pytest.param("index.json", "{", "index.json", id="store-half"),
        pytest.param("index.json", "[]", "index.json", id="store-list"),
        pytest.param("manifest.json", "{", "manifest.json", id="traces-half"),
        pytest.param("manifest.json", "[]", "manifest.json", id="traces-list"),
        pytest.param("config.json", "{", "config.json", id="config-half"),
        pytest.param("config.json", "5", "config.json", id="config-number"),
        pytest.param("config.json", '{"family": "x"}', "model.safetensors", id="predictor-bare"),
        pytest.param("config.json", '{"model_type": "llama"}', "", id="model-bare"),
    ],
)
def test_inspect_refuses_what_it_does_not_know(tmp_path, name, content, message):
    if name is not None:
        (tmp_path / name).write_text(content)
    check_refusal(run("inspect", tmp_path), 3, message)


def test_env_says_whether_a_model_fits(model):
    found = document("env", "--model", model)
    assert found["packages"]["torch"]
    assert found["memory"]["available"] <= found["memory"]["total"]
    assert found["memory_read_bytes_per_s"] > 0
    assert found["model"]["fits"] is True
    text = run("env", "--model", model).stdout
    assert "qwen3_moe" in text


def test_env_advises_for_the_memory_of_the_device_that_a_run_would_choose(model, monkeypatch):
    monkeypatch.setattr("outrider.runtime.device.device_of", lambda _: torch.device("cuda", 0))
    # As on a card that has no room left beside a host that has.
    monkeypatch.setattr("outrider.runtime.memory.device_bytes", lambda kind, index: (1000, 1 << 30))
    found = document("env", "--model", model)["model"]
    assert found["device"] == "cuda:0"
    assert found["fits"] is False
    assert found["collect"]["fits"] is True, "traces can be taken on the host"


def test_pack_refuses_what_it_cannot_do(model, tmp_path):
    check_refusal(run("pack", model, "--format", "int8"), 2, "--out DIR")
    check_refusal(run("pack", model, "--format", "int3", "--out", tmp_path), 2, "int3")
    (tmp_path / "note.txt").write_text("mine")
    result = run("pack", model, "--out", tmp_path, "--no-perplexity")
    check_refusal(result, 2, str(tmp_path))
    assert (tmp_path / "note.txt").read_text() == "mine"
    check_refusal(run("pack", model, "--out", "/proc/outrider/store"), 1, "--out")


# --- through the real script -----------------------------------------------------------------


def script(*arguments, **options):
    return subprocess.Popen(
        [SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['outrider', *sys.argv[1:]]\n"
        "from outrider.runtime.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print('LOADED', sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    for arguments, message in (
        (["--help"], "generate"),
        (["--version"], "outrider "),
        (["generate", "--help"], "--expert-memory"),
        (["generate", "--print-config"], "expert_memory"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert message in done.stdout
        loaded = done.stdout.rpartition("LOADED")[2]
        assert "torch" not in loaded
        assert "transformers" not in loaded


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for name, (_, line) in COMMANDS.items():
        assert name in result.stdout
        assert line in result.stdout


@pytest.fixture(scope="module")
def talkative(models):
    """A model whose answers are long enough to be interrupted."""
    return models.checkpoint("mixtral", max_position_embeddings=8192)


LONG = ("--prompt", "the film", "--max-tokens", "8000", "--ignore-eos", "--temperature", "1")


@pytest.fixture
def heard():
    """Commands hear SIGINT though the tests may run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_while_streaming_ends_with_130(talkative):
    with script("generate", talkative, *LONG) as process:
        assert process.stdout.read(1), process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_a_reader_that_goes_away_ends_it_quietly(talkative):
    with script("generate", talkative, *LONG) as process:
        assert process.stdout.read(1), process.stderr.read()
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


def test_two_processes_pack_the_same_store_once(model, tmp_path):
    environment = {**os.environ, "OUTRIDER_CACHE": str(tmp_path / "cache")}
    processes = [
        script(
            "generate", model, "--prompt", "the film", "--format", "int8", "--json", *GREEDY,
            env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    began = time.monotonic()
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    tokens = {tuple(json.loads(stdout)["token_ids"]) for stdout, _ in outputs}
    assert len(tokens) == 1
    stores = [path for path in (tmp_path / "cache" / "experts").iterdir() if path.is_dir()]
    assert len(stores) == 1
    assert time.monotonic() - began < 240
    assert document("verify", stores[0])["damaged"] == []
