"""collect, analyze and compare as a person calls them, on a tiny checkpoint, without a network."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from outrider.collect import TraceReader
from outrider.collect.devices import DeviceMemory
from outrider.collect.trace import read_manifest
from outrider.kernels import native
from outrider.runtime.advice import advise_collection
from outrider.runtime.cli import app
from outrider.runtime.config import EngineConfig
from outrider.runtime.errors import UsageError
from outrider.runtime.traced import open_traced, parse_max_memory, resident_bytes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of documents of made-up words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioulnrst"), rng.integers(2, 8))) for _ in range(150)]
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 120)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    """A qwen3_moe with 48 experts, top-4, that is in no repository, with a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "qwen48"
    families.make_checkpoint(
        folder, "qwen3_moe", dtype=torch.bfloat16, num_experts=48, num_experts_per_tok=4
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train([str(path) for path in sorted(text.iterdir())], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def outrider():
    """Run a command line; gives exit code, stdout and stderr."""

    def run(*words, code=0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def collected(outrider, checkpoint, text, tmp_path):
    """Collect 40 traces into `tmp_path / name` and return the JSON document."""

    def run(name="T", *extra, code=0):
        result = outrider(
            "collect", checkpoint, "--datasets", f"text:{text}", "--traces", 40, "--seed", 1,
            "--context-tokens", 24, "--batch-size", 8, "--num-threads", 1, "--dtype", "fp32",
            "--out", tmp_path / name, "--json", *extra, code=code,
        )  # fmt: skip
        return json.loads(result.stdout.splitlines()[-1]) if code == 0 else result

    return run


def test_collect_then_analyze_on_a_model_from_elsewhere(collected, outrider, tmp_path):
    document = collected()
    assert document["traces"] == document["new_traces"] == 40
    assert document["tokens"] == 40 * 24
    assert (document["moe_layers"], document["num_experts"], document["top_k"]) == (2, 48, 4)
    (figures,) = document["datasets"].values()
    assert figures["traces"] == 40 and 0.5 < figures["coverage"] <= 1
    assert document["bytes"] > 0 and document["traces_per_minute"] > 0
    folder = tmp_path / "T"
    assert {path.name for path in folder.iterdir()} >= {
        "manifest.json", "shards", "hidden", "routers.safetensors", "expert_analysis.json",
        "collection.log", "tokenizer.json",
    }  # fmt: skip
    result = outrider("analyze", folder, "--out", tmp_path / "A", "--clusters", 4, "--json")
    analysis = json.loads(result.stdout)
    assert analysis["tokens"] == 960
    assert analysis["overall"]["unique_pairs"] == figures["unique_pairs"]
    assert analysis["overall"]["routing_entropy"] == pytest.approx(
        figures["routing_entropy"], abs=1e-4
    )
    for name in analysis["files"]:
        assert Path(name).stat().st_size > 500
    page = (tmp_path / "A" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http://" not in page and "https://" not in page  # one page that needs nothing else
    plain = outrider("analyze", folder, "--out", tmp_path / "A2", "--clusters", 0)
    assert f"experts used {analysis['overall']['experts_used']}/96" in plain.stdout


def test_a_model_larger_than_its_budget_gives_the_same_traces(collected, tmp_path):
    collected("all")
    collected("little", "--expert-memory", "10%")
    first, second = (TraceReader(tmp_path / name) for name in ("all", "little"))
    for a, b in zip(first.batches(), second.batches(), strict=True):
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
        np.testing.assert_array_equal(a.coded_log_probs, b.coded_log_probs)


def test_resume_finishes_and_takes_dtype_and_threads_from_the_folder(
    collected, outrider, checkpoint, text, tmp_path
):
    whole = collected("whole")
    assert collected("T", code=0)["traces"] == 40
    again = collected("T", code=3)
    assert "already holds traces" in again.output
    manifest = tmp_path / "T" / "manifest.json"
    described = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(described | {"shards": [], "complete": False}))
    words = ("collect", checkpoint, "--datasets", f"text:{text}", "--traces", 40, "--seed", 1)
    result = outrider(*words, "--context-tokens", 24, "--out", tmp_path / "T", "--resume", "--json")
    resumed = json.loads(result.stdout)
    assert resumed["dtype"] == "float32" and resumed["batch_size"] == 8
    assert resumed["threads"] == whole["threads"] == 1
    names = [path.name for path in sorted((tmp_path / "whole" / "shards").iterdir())]
    assert [path.name for path in sorted((tmp_path / "T" / "shards").iterdir())] == names
    for name in names:
        mine, other = (tmp_path / run / "shards" / name for run in ("T", "whole"))
        assert mine.read_bytes() == other.read_bytes()
    refused = outrider(*words, "--context-tokens", 16, "--out", tmp_path / "T", "--resume", code=3)
    assert "context_tokens: 24, now 16" in refused.output
    # Other kernels may decide near ties otherwise, so a resume must not mix them.
    described = json.loads(manifest.read_text())
    assert described["kernels"] == native.isa()
    manifest.write_text(json.dumps(described | {"kernels": "another"}))
    words = (*words, "--context-tokens", 24, "--out", tmp_path / "T", "--resume")
    assert f"kernels: 'another', now '{native.isa()}'" in outrider(*words, code=3).output
    del described["kernels"]  # as folders were before it was recorded
    manifest.write_text(json.dumps(described))
    outrider(*words)


def test_traces_are_what_transformers_routes(collected, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    collected()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    same = total = 0
    for batch in TraceReader(tmp_path / "T").batches():
        token_ids = torch.from_numpy(batch.token_id.astype(np.int64)).reshape(-1, 24)
        with torch.inference_mode():
            output = model(token_ids, output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(output.router_logits):
            best = logits.topk(4, dim=-1).indices.sort(dim=-1).values.numpy()
            same += int((np.sort(batch.topk_ids[:, layer], axis=1) == best).all(axis=1).sum())
            total += len(best)
    assert same >= total - 2  # a tie in fp32 may fall either way


@pytest.mark.filterwarnings(
    "ignore:_check_is_size:FutureWarning",
    # bitsandbytes compiles a function when it is imported, which loads what torch itself
    # deprecates.
    "ignore:.*torch.jit:DeprecationWarning",
)
def test_four_bit_loading_quantises_the_experts_too(checkpoint, collected, tmp_path):
    config = EngineConfig(dtype="bf16", num_threads=1)
    with open_traced(str(checkpoint), config, max_memory={"cpu": 1 << 34}) as plain:
        whole = resident_bytes(plain.model)
        embeddings = plain.model.get_input_embeddings().weight
        kept = embeddings.numel() * embeddings.element_size()
    with open_traced(str(checkpoint), config, load_in_4bit=True) as small:
        held = resident_bytes(small.model)
        assert small.format == "nf4"
        experts = small.model.model.layers[1].mlp.experts
        assert experts.parametrizations.gate_up_proj.original.dtype == torch.uint8
    # Embeddings stay; in this tiny model they would hide what became of the rest.
    assert held - kept <= 0.35 * (whole - kept)
    document = collected("T", "--load-in-4bit")
    assert document["format"] == "nf4" == read_manifest(tmp_path / "T").format


def test_offload_by_accelerate_gives_the_routing_and_routers_of_the_rest(
    collected, checkpoint, tmp_path
):
    collected("plain")
    collected("offloaded", "--max-memory", "cpu:200KiB")
    first, second = (TraceReader(tmp_path / name) for name in ("plain", "offloaded"))
    assert first.shape == second.shape
    tensors, others = first.routers()[0], second.routers()[0]
    assert set(tensors) == set(others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    for a, b in zip(first.batches(), second.batches(), strict=True):
        assert (a.topk_ids == b.topk_ids).mean() > 0.999


def test_max_memory_is_a_list_of_devices_and_sizes():
    assert parse_max_memory("0:2GiB, cpu:16MiB") == {0: 2 << 30, "cpu": 16 << 20}
    for wrong in ("2GiB", "gpu:1GiB", "0:2GiB;cpu:1", ""):
        with pytest.raises(UsageError, match=r"such as 0:20GiB,cpu:16GiB|size"):
            parse_max_memory(wrong)
    with pytest.raises(UsageError, match="give one of them"):
        open_traced("x", EngineConfig(), load_in_4bit=True, max_memory={"cpu": 1})


def test_bad_input_ends_with_its_exit_code_and_a_reason(
    outrider, checkpoint, text, tmp_path, collected
):
    words = ("collect", checkpoint, "--traces", 4, "--context-tokens", 24)
    out = ("--out", tmp_path / "X")
    unknown = outrider(*words, *out, "--datasets", "imbd", code=2)
    assert "known are imdb, yelp" in unknown.output
    missing = outrider(*words, *out, "--datasets", "text:/no/such", code=3)
    assert "does not exist" in missing.output
    (tmp_path / "empty.txt").write_text("")
    empty = outrider(*words, *out, "--datasets", f"text:{tmp_path / 'empty.txt'}", code=3)
    assert "is empty" in empty.output
    few = outrider(*words[:-2], "--datasets", f"text:{text}", "--traces", 10**6, *out, code=3)
    assert "ask for fewer" in few.output
    assert "give --out DIR" in outrider(*words, code=2).output
    assert "batch_size is -1" in outrider(*words, *out, "--batch-size", -1, code=2).output
    dense = tmp_path / "dense"
    families.make_checkpoint(dense, "llama", intermediate_size=32)
    refused = outrider("collect", dense, "--datasets", f"text:{text}", *out, code=3)
    assert "no Mixture-of-Experts layers" in refused.output
    assert not (tmp_path / "X").exists()


def test_a_damaged_shard_stops_analysis_unless_asked(collected, outrider, tmp_path):
    collected("T")
    shard = next((tmp_path / "T" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-20])
    stopped = outrider("analyze", tmp_path / "T", "--out", tmp_path / "A", code=3)
    assert shard.name in stopped.output
    stopped = outrider("analyze", tmp_path / "T", "--out", tmp_path / "A", "--skip-bad", code=3)
    assert "no finished trace" in stopped.output  # it was the only one


def test_compare_puts_folders_side_by_side(collected, outrider, planted, rng, tmp_path):
    collected("mine")
    ids = np.argsort(rng.random((640, 1, 8)), axis=-1)[..., :2]
    planted.write(
        tmp_path / "other", planted.shape(layers=1), {"one": {"topk_ids": ids}}, window=16
    )
    folders = (tmp_path / "mine", tmp_path / "other")
    result = outrider("compare", *folders, "--out", tmp_path / "C", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [(row["name"], row["num_experts"]) for row in rows] == [("mine", 48), ("other", 8)]
    assert json.loads((tmp_path / "C" / "comparison.json").read_text())["rows"] == rows
    table = outrider("compare", *folders, "--out", tmp_path / "C").stdout
    assert "48" in table and "mine" in table and str(tmp_path / "C" / "index.html") in table
    assert "needs two" in outrider("compare", folders[0], "--out", tmp_path / "C", code=2).output
    mixed = outrider("analyze", *folders, "--out", tmp_path / "A", code=3)
    assert "traces of different models: num_moe_layers is 2 and 1" in mixed.output


def test_env_advises_how_to_collect_from_a_model(outrider, checkpoint):
    document = json.loads(outrider("env", "--model", checkpoint, "--json").stdout)
    advice = document["model"]["collect"]
    assert advice["fits"] and advice["device"] == "cpu" and advice["batch_size"] == 16
    assert "outrider collect MODEL" in outrider("env", "--model", checkpoint).stdout


@pytest.mark.parametrize(
    ("name", "gib", "used", "options"),
    [
        ("A100 80GB", 80, 1, []),
        ("RTX 3090", 24, 1, ["--load-in-4bit"]),
        ("RTX 3090", 24, 18, ["--device", "cpu", "--expert-memory", "3072MiB"]),
    ],
    ids=["all-in-bf16", "all-in-4-bit", "by-the-cache"],
)
def test_advice_follows_what_a_16b_model_leaves_free(name, gib, used, options):
    sizes = {
        "dense_bytes": 3 << 30,
        "experts_bytes": {"bf16": 30 << 30, "int8": 15 << 30, "int4": 8 << 30},
        "advice": {"format": "int8", "expert_memory": 3 << 30},
    }
    device = DeviceMemory(name, gib << 30, used << 30)
    found = advise_collection(sizes, [device])
    assert found["options"] == options
    assert found["batch_size"] == (16 if "cpu" in options else {80: 20, 24: 8}[gib])
    none = advise_collection(sizes | {"advice": None}, [])
    assert not none["fits"] and "does not fit" in none["text"][0]


def test_configuration_says_where_each_value_came_from(outrider, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("traces: 7\ndatasets: [plays, code]\n")
    monkeypatch.setenv("OUTRIDER_SEED", "5")
    result = outrider(
        "collect", "--config", tmp_path / "c.yaml", "--batch-size", 3, "--print-config", "--json"
    )
    rows = {row["option"]: row for row in json.loads(result.stdout)["rows"]}
    assert (rows["traces"]["value"], rows["traces"]["source"]) == (7, "file")
    assert rows["datasets"]["value"] == ["plays", "code"]
    assert (rows["seed"]["value"], rows["seed"]["source"]) == (5, "environment")
    assert (rows["batch_size"]["value"], rows["batch_size"]["source"]) == (3, "command line")
    assert rows["context_tokens"]["source"] == "default"
