"""Loading a model folder: the weights that are there, or an error that names what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path

import engines
import pytest
import torch
from engines import DTYPES, prompt_of
from families import FAMILIES
from safetensors.torch import load_file, save_file

from outrider.collect.schema import ExpertKey
from outrider.runtime.engine import Engine
from outrider.runtime.errors import InvalidDataError, OutriderError, UnsupportedModelError
from outrider.runtime.models import adapter
from outrider.runtime.models.loading import load_model, load_tokenizer, resolve_folder
from outrider.runtime.request import SamplingParams

GREEDY = SamplingParams(max_tokens=2, temperature=0.0)
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A qwen3_moe folder that a test may damage: 3 layers, the first dense, 16 experts."""
    return shutil.copytree(models.checkpoint("qwen3_moe"), tmp_path / "model")


def configure(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def retensor(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def open_all(folder: Path) -> None:
    """What an engine opens: dense weights, the map of the experts, the tokenizer."""
    loaded = load_model(folder)
    loaded.experts_in_place()
    load_tokenizer(folder)


# --- what is read is what is there -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_those_that_transformers_loads(models, family):
    from transformers import AutoModelForCausalLM

    folder = models.checkpoint(family)
    want = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    loaded = load_model(folder)
    got = dict(loaded.model.state_dict())
    for layer in loaded.layers:
        for name, value in loaded.layer_tensors(layer.layer_idx).items():
            got[f"{layer.name}.{name}"] = value
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert loaded.unused_tensors == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_experts_extents_hold_its_rows_of_the_fused_weights(models, family):
    loaded = models.loaded(family)
    source = loaded.experts_in_place()
    for layer_idx in range(loaded.shape.num_moe_layers):
        fused = loaded.layer_tensors(layer_idx)
        for expert_idx in range(loaded.shape.num_experts):
            layout = source.layout(ExpertKey(layer_idx, expert_idx))
            layout.check()
            block = bytearray(layout.nbytes)
            for extent in layout.extents:
                with extent.file.open("rb") as file:
                    file.seek(extent.offset)
                    piece = file.read(extent.length)
                block[extent.slot_offset : extent.slot_offset + extent.length] = piece
            for name, view in layout.views.items():
                raw = block[view.offset : view.offset + view.nbytes]
                tensor = torch.frombuffer(raw, dtype=view.dtype).reshape(view.shape)
                assert torch.equal(tensor, fused[name][expert_idx]), (name, layer_idx, expert_idx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoints_own_dtype_is_kept(models, dtype):
    loaded = models.loaded("mixtral", dtype=dtype)
    assert loaded.dtype == DTYPES[dtype]
    assert loaded.experts_in_place().format == dtype
    with models.engine("mixtral", dtype=dtype) as engine:
        (result,) = engine.generate(prompt_of(6), GREEDY)
    assert len(result.token_ids) == 2


@pytest.mark.parametrize("computed", DTYPES)
def test_a_bf16_checkpoint_is_computed_in_another_dtype(models, computed):
    loaded = load_model(models.checkpoint("qwen3_moe", dtype="bf16"), dtype=DTYPES[computed])
    assert loaded.model.model.embed_tokens.weight.dtype == DTYPES[computed]
    assert loaded.experts_in_place().format == "bf16"


def test_dtype_fp32_of_a_bf16_checkpoint_equals_transformers_in_fp32(models):
    from transformers import AutoModelForCausalLM

    folder = models.checkpoint("qwen3_moe", dtype="bf16")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = prompt_of(12)
    logits = []
    for options in ({"format": "fp32"}, {}):  # packed as fp32, and bf16 experts read in place
        with Engine.from_pretrained(
            folder, dtype="fp32", expert_memory="25%", device="cpu", **options
        ) as engine:
            logits.append(engines.generate(engine, [prompt], max_tokens=1).logits[0])
    with torch.no_grad():
        want = reference(torch.tensor([prompt])).logits[0, -1:]
    for got in logits:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_the_embedding_where_they_are_tied(models, is_tied):
    fields = {"tie_word_embeddings": is_tied}
    loaded = models.loaded("qwen2_moe", **fields)
    head, embedding = loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) is is_tied
    weights = [*loaded.model.parameters(), *loaded.model.buffers()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in weights if not tensor.is_meta}
    assert loaded.dense_bytes == sum(held.values())
    prompt = prompt_of(10)
    with models.engine("qwen2_moe", fields=fields) as engine:
        (got,) = engines.generate(engine, [prompt], max_tokens=1).logits
    want = models.reference("qwen2_moe", **fields).logits(prompt)[-1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def shard(folder: Path, num_shards: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index in range(num_shards):
        file_name = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        mine = names[index::num_shards]  # an expert's projections lie in different shards
        save_file({name: tensors[name] for name in mine}, folder / file_name)
        weight_map |= dict.fromkeys(mine, file_name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_with_an_index_are_the_same_model(models, folder):
    prompt = prompt_of(10)
    shard(folder, 3)
    with models.engine("qwen3_moe") as engine:
        want = engines.generate(engine, [prompt], max_tokens=3)
        fingerprint = engine.loaded.shape.fingerprint
    with Engine.from_pretrained(folder, expert_memory="25%", device="cpu") as engine:
        got = engines.generate(engine, [prompt], max_tokens=3)
        assert engine.loaded.shape.fingerprint == fingerprint
    assert all(map(torch.equal, got.logits, want.logits))


def test_fingerprints_tell_models_apart(models, folder):
    before = load_model(folder)
    weights = before.weights_fingerprint()
    assert load_model(folder).weights_fingerprint() == weights
    retensor(folder, lambda tensors: tensors[EXPERT].add_(1.0))
    after = load_model(folder)
    assert after.weights_fingerprint() != weights
    assert after.shape.fingerprint == before.shape.fingerprint  # the routing is that of before
    retensor(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    assert load_model(folder).shape.fingerprint != before.shape.fingerprint


def test_progress_counts_the_dense_bytes_to_the_end(models):
    told = []
    loaded = load_model(
        models.checkpoint("qwen3_moe"), progress=lambda done, total: told.append((done, total))
    )
    done = [one for one, _ in told]
    assert done == sorted(done)
    (total,) = {total for _, total in told}
    tensors = loaded.checkpoint.tensors.values()
    assert total == sum(one.nbytes for one in tensors if ".experts." not in one.name)
    assert done[-1] == total


def test_tensors_that_nothing_wants_are_told(folder):
    retensor(
        folder,
        lambda tensors: tensors.update(
            {
                "model.extra": torch.ones(2),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
            }
        ),
    )
    assert load_model(folder).unused_tensors == ("model.extra",)


def test_a_buffer_that_nothing_rebuilds_is_refused(models, monkeypatch):
    loaded = load_model(models.checkpoint("qwen3_moe"))
    model = adapter.build_on_meta(loaded.config, dtype=torch.float32)
    monkeypatch.setattr(type(model), "_init_weights", lambda self, module: None)
    with pytest.raises(UnsupportedModelError, match="inv_freq"):
        adapter.materialize_buffers(model, device=torch.device("cpu"))


# --- what is wrong is named ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("model.norm.weight"), "'model.norm.weight'", id="no-dense"),
        pytest.param(
            lambda t: t.pop("model.layers.1.mlp.gate.weight"), "mlp.gate.weight", id="no-router"
        ),
        pytest.param(lambda t: t.pop(EXPERT), "has 15 tensors like", id="no-expert-projection"),
        pytest.param(
            lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts.3." in name],
            "is made of 16 experts",
            id="no-expert",
        ),
        pytest.param(
            lambda t: [t.pop(name) for name in list(t) if "layers.2.mlp.experts." in name],
            "'model.layers.2.mlp.experts.gate_up_proj'",
            id="no-experts-of-a-layer",
        ),
        pytest.param(
            lambda t: t.update({EXPERT.replace(".3.", ".16."): t[EXPERT].clone()}),
            "has 17 tensors like",
            id="one-expert-more",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model\.safetensors: 'model\.norm\.weight'.*shape \[7\].*\[64\]",
            id="dense-shape",
        ),
        pytest.param(
            lambda t: t.update({EXPERT: torch.ones(7, 64)}),
            rf"model\.safetensors: tensor '{EXPERT}' has shape \[7, 64\]".replace(".up", r"\.up"),
            id="expert-shape",
        ),
        pytest.param(
            lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}),
            rf"model\.safetensors: tensor '{EXPERT}' has shape",
            id="expert-transposed",
        ),
        pytest.param(
            lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}),
            rf"model\.safetensors: tensor '{EXPERT}' is torch\.bfloat16.*torch\.float32",
            id="one-expert-of-another-dtype",
        ),
        pytest.param(
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.int32)}),
            rf"model\.safetensors: tensor '{EXPERT}' is torch\.int32",
            id="expert-of-integers",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
            r"model\.safetensors: 'model\.norm\.weight'.*torch\.int32",
            id="dense-of-integers",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.bool)}),
            r"model\.safetensors: 'model\.norm\.weight'.*torch\.bool",
            id="dense-of-booleans",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            r"model\.safetensors: 'model\.norm\.weight'.*float8.*quantization_config",
            id="dense-of-fp8-without-scales",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    retensor(folder, change)
    with pytest.raises(InvalidDataError, match=message) as error:
        open_all(folder)
    assert str(folder) in str(error.value)


def test_a_shard_cut_short_is_refused(folder):
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", size - 10)
    with pytest.raises(InvalidDataError, match=r"model\.safetensors: tensor .* is truncated"):
        open_all(folder)


def test_a_missing_shard_is_refused(folder):
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidDataError, match=r"model-00002-of-00003\.safetensors: shard is miss"):
        open_all(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"hidden_size": 128}, r"\[320, 64\].*\[320, 128\]", id="hidden-size"),
        pytest.param(
            {"hidden_size": 0},
            r"\[320, 64\].*\[320, 0\]",
            id="hidden-size-0",
            marks=pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
        ),
        pytest.param({"hidden_size": -5}, "config", id="hidden-size-negative"),
        pytest.param({"hidden_size": "abc"}, "hidden_size", id="hidden-size-text"),
        pytest.param({"vocab_size": 300}, r"\[320, 64\].*\[300, 64\]", id="vocabulary"),
        pytest.param({"num_local_experts": 17}, r"wants \[17, 64\]", id="more-experts"),
        pytest.param({"num_local_experts": 15}, r"wants \[15, 64\]", id="fewer-experts"),
        pytest.param({"num_hidden_layers": 5}, "model.layers.3", id="more-layers"),
        pytest.param({"num_experts_per_tok": 17}, "17 experts per token", id="top-k-above-all"),
        pytest.param({"num_experts_per_tok": 0}, "0 experts per token", id="top-k-0"),
        pytest.param({"moe_intermediate_size": 25}, r"wants \[25, 64\]", id="expert-size"),
        pytest.param({"hidden_act": "frob"}, "frob", id="activation"),
        pytest.param({"hidden_act": None}, "hidden_act", id="no-activation"),
        pytest.param({"max_position_embeddings": None}, "max_position", id="no-context"),
        pytest.param({"eos_token_id": "x"}, "eos_token_id", id="end-token-text"),
        pytest.param(
            {"rope_parameters": {"rope_type": "frob", "rope_theta": 1e4}}, "frob", id="rope"
        ),
        pytest.param({"model_type": "frobnicate"}, "frobnicate", id="unknown-family"),
        pytest.param({"model_type": 5}, "5", id="family-number"),
        pytest.param({"model_type": ...}, "model_type", id="no-family"),
        pytest.param({"model_type": "llama"}, "no Mixture-of-Experts layers", id="no-experts"),
        pytest.param({"model_type": "bert"}, "no Mixture-of-Experts layers", id="encoder"),
        pytest.param({"model_type": "mamba"}, "no Mixture-of-Experts layers", id="recurrent"),
        pytest.param({"model_type": "t5"}, "t5", id="encoder-decoder"),
        pytest.param({"model_type": "qwen3_vl_moe"}, "multi-modal", id="multi-modal"),
        pytest.param({"mlp_only_layers": [0, 1, 2]}, "no Mixture-of-Experts", id="all-dense"),
        pytest.param({"num_hidden_layers": 0}, "no Mixture-of-Experts", id="no-layers"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(folder, fields, message):
    configure(folder, **fields)
    with pytest.raises(InvalidDataError, match=message) as error:
        open_all(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"5", id="number"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe\0", id="binary"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration_is_refused_by_name(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidDataError, match=str(folder)) as error:
        open_all(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param(7, {7}, id="one"),
        pytest.param([3, 4], {3, 4}, id="several"),
        pytest.param(None, set(), id="none"),
        pytest.param(..., {0}, id="left-to-the-configuration"),
    ],
)
def test_end_tokens_come_from_the_generation_configuration_first(folder, ends, expected):
    content = {} if ends is ... else {"eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert load_model(folder).end_token_ids == expected


@pytest.mark.parametrize("ends", ["x", [None], {"a": 1}, 1.5, True], ids=repr)
def test_end_tokens_that_are_no_ids_are_refused(folder, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(InvalidDataError, match=r"generation_config\.json: eos_token_id"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("tokenizer.json", None, id="absent"),
        pytest.param("tokenizer.json", b"{}", id="empty"),
        pytest.param("tokenizer.json", b"{", id="half"),
        pytest.param("tokenizer.json", b'{"added_tokens": [], "model": 5}', id="nonsense"),
        pytest.param("tokenizer.json", b"[]", id="list"),
        pytest.param("tokenizer_config.json", b"{", id="settings-half"),
        pytest.param("tokenizer_config.json", b"[]", id="settings-list"),
        pytest.param(
            "tokenizer_config.json", b'{"tokenizer_class": "NoSuchThing"}', id="unknown-class"
        ),
        pytest.param("tokenizer_config.json", b'{"tokenizer_class": 5}', id="class-number"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(folder, name, content):
    if content is None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / name).write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder)
    except InvalidDataError as error:
        assert "no usable tokenizer" in str(error)
        assert str(folder) in str(error)
        assert "\n" not in str(error)
    else:
        # transformers may do without its settings: then it has to work.
        assert name == "tokenizer_config.json"
        assert tokenizer.decode(tokenizer("the film")["input_ids"]) == "the film"


def test_a_hub_id_that_nobody_has_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidDataError, match=r"HF_HUB_OFFLINE is set.*HF_HOME"):
        resolve_folder("nobody/nothing-of-that-name")


def test_a_hub_id_is_found_in_the_cache_without_a_network(monkeypatch, tmp_path, folder):
    # The hub's own layout: a snapshot of links to blobs.
    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in folder.iterdir():
        blob = repository / "blobs" / path.name
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # A default of the function was bound when it was imported.
    from huggingface_hub import snapshot_download

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *args, **kwargs: snapshot_download(*args, cache_dir=tmp_path, **kwargs),
    )
    found = resolve_folder("somebody/tiny")
    assert found == snapshot
    open_all(found)


def test_a_folder_comes_before_a_hub_id_of_that_name(monkeypatch, tmp_path):
    (tmp_path / "somebody" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("somebody/tiny") == Path("somebody/tiny")


def test_a_path_is_never_looked_for_on_the_hub(tmp_path):
    for name in (str(tmp_path / "gone"), "./gone/model", "../gone", "gone"):
        assert resolve_folder(name) == Path(name)


# --- nothing in a folder is run --------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="family-that-is-known"),
        pytest.param({"model_type": "frobnicate"}, id="family-that-is-not"),
        pytest.param({"model_type": ...}, id="no-family"),
    ],
)
def test_code_in_a_folder_is_not_run(folder, tmp_path, fields):
    canary = tmp_path / "canary"
    code = f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\n"
    classes = "\n".join(
        f"class {name}:\n    pass\n" for name in ("Config", "Model", "Tokenizer", "TokenizerFast")
    )
    for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(code + classes)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(**k): pass\n")
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "modeling_evil.Model",
        "AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.TokenizerFast"],
    }
    configure(folder, auto_map=auto_map, **fields)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": auto_map["AutoTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        with Engine.from_pretrained(folder, device="cpu") as engine:
            engine.generate(prompt_of(3), GREEDY)
    except OutriderError:
        assert fields, "a known family has to load by transformers' own class"
    assert not canary.exists()
    assert not any("evil" in name for name in sys.modules)


def test_a_pickle_beside_the_shards_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    (folder / "pytorch_model.bin").chmod(0)
    open_all(folder)
