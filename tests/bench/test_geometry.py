"""A widened checkpoint is the same function at real sizes, and its bytes are dense."""

import json
from pathlib import Path

import deepseek_reference
import pytest
import torch
from families import make_checkpoint
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from outrider.bench.geometry import make_geometry
from outrider.bench.widening import CHUNK_BYTES, Fill, Filler, widen_matrix
from outrider.kernels.quantization import quantize
from outrider.runtime import Engine, SamplingParams
from outrider.runtime.errors import UnsupportedModelError, UsageError

TEXT = torch.tensor([[(7 * i * i + 3 * i + 5) % 320 for i in range(24)]])
SIZES = {"hidden": 256, "expert": 128, "dense": 384}  # four times the tiny checkpoint's


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def run(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [S, V] of TEXT and each layer's chosen experts, ascending, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(
                lambda _module, _args, output: chosen.append(output[2].sort(dim=-1).values)
            )
    return model(TEXT).logits[0].float(), chosen


def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((result - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("narrow"), "deepseek")


@pytest.fixture(scope="module")
def wide(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide")
    make_geometry(narrow, out, **SIZES)
    return out


@pytest.mark.parametrize(
    "hidden, tolerance", [(256, 1e-12), (192, 1e-6)], ids=["4x-exact-scale", "3x-rounded-scale"]
)
def test_without_rounding_it_is_the_same_function(
    narrow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hidden: int,
    tolerance: float,
) -> None:
    """Both checkpoints by the plain reference in fp64; only norm weights were rounded, to fp32."""
    make_geometry(narrow, tmp_path / "made", hidden=hidden, expert=128, dense=384)
    logits = []
    for source in (narrow, tmp_path / "made"):
        folder = tmp_path / f"plain-{source.name}"
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        theta = config["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))
        weights = {name: tensor.double() for name, tensor in tensors(source).items()}
        monkeypatch.setattr(deepseek_reference, "load_file", lambda _path, weights=weights: weights)
        logits.append(deepseek_reference.logits(folder, TEXT[0]))
    assert relative(logits[1], logits[0]) < tolerance


# fp32 itself is 1.1e-6 from fp64 on this model; with the exact scale even its rounding is shared.
@pytest.mark.parametrize(
    "hidden, tolerance", [(256, 1e-6), (192, 3e-6)], ids=["4x-exact-scale", "3x-rounded-scale"]
)
def test_in_fp32_logits_and_routing_are_the_sources(
    narrow: Path, tmp_path: Path, hidden: int, tolerance: float
) -> None:
    make_geometry(narrow, tmp_path, hidden=hidden, expert=128, dense=384)
    truth, true_routing = run(narrow, torch.float32)
    result, routing = run(tmp_path, torch.float32)
    assert relative(result, truth) < tolerance
    assert len(routing) == len(true_routing) == 2
    for layer, true_layer in zip(routing, true_routing, strict=True):
        assert torch.equal(layer, true_layer)
    assert torch.equal(result.argmax(-1), truth.argmax(-1))


def test_in_bf16_with_a_scale_that_is_a_power_of_two_only_sums_differ(
    tmp_path: Path,
) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", "deepseek", dtype=torch.bfloat16)
    make_geometry(narrow, tmp_path / "wide", **SIZES)
    truth, true_routing = run(narrow, torch.bfloat16)
    result, routing = run(tmp_path / "wide", torch.bfloat16)
    assert relative(result, truth) < 2e-2
    # Sums of bf16 products in another order can tip a near-tie of the router.
    same = torch.cat(routing) == torch.cat(true_routing)
    assert same.all(dim=-1).float().mean() > 0.9


def test_the_engine_generates_the_sources_tokens_from_a_quarter_of_the_experts(
    narrow: Path, wide: Path
) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompt = TEXT[0, :5].tolist()
    generated = []
    for folder, budget in ((narrow, "all"), (wide, "25%")):
        with Engine.from_pretrained(folder, expert_memory=budget, device="cpu") as engine:
            generated.append(engine.generate(prompt, params)[0].token_ids)
    assert generated[0] == generated[1]
    assert len(set(generated[0])) > 3  # a loop over one token would prove little


def test_shapes_are_the_ones_asked_for_and_dense_bytes_fill_them(narrow: Path, wide: Path) -> None:
    config = json.loads((wide / "config.json").read_text())
    old = json.loads((narrow / "config.json").read_text())
    assert config["hidden_size"] == 256 and config["moe_intermediate_size"] == 128
    assert config["num_attention_heads"] * config["head_dim"] == 256
    assert config["head_dim"] == old["hidden_size"] // old["num_attention_heads"]
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert config["rms_norm_eps"] == pytest.approx(old["rms_norm_eps"] / 4)
    found = tensors(wide)
    up = found["model.layers.1.mlp.experts.11.up_proj.weight"]
    assert up.shape == (128, 256)
    # Zero only where added rows meet real columns: 3/4 of the rows, 1/4 of the columns.
    assert (up == 0).float().mean() < 0.75 * 0.25 + 0.02
    assert (wide / "tokenizer.json").read_bytes() == (narrow / "tokenizer.json").read_bytes()


def test_filler_changes_no_quantisation_scale_of_a_real_row(narrow: Path, wide: Path) -> None:
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    source, widened = tensors(narrow)[name], tensors(wide)[name]
    scales = quantize(widened, "int8")["scale"][: source.shape[0]]
    assert torch.equal(scales, quantize(source, "int8")["scale"])
    assert widened.abs().max() <= source.abs().max()


def test_heads_that_share_keys_keep_sharing_them(tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", "deepseek", num_key_value_heads=2)
    make_geometry(narrow, tmp_path / "wide", **SIZES)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"] == 16
    truth, _ = run(narrow, torch.float32)
    result, _ = run(tmp_path / "wide", torch.float32)
    assert relative(result, truth) < 1e-6


def test_fewer_layers_are_the_sources_first_and_more_repeat_them(
    narrow: Path, tmp_path: Path
) -> None:
    one = make_geometry(narrow, tmp_path / "one", layers=1, **SIZES)
    assert not one.is_same_function
    cut = tmp_path / "cut"
    cut.mkdir()
    config = json.loads((narrow / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    (cut / "model.safetensors").write_bytes((narrow / "model.safetensors").read_bytes())
    assert relative(run(tmp_path / "one", torch.float32)[0], run(cut, torch.float32)[0]) < 1e-6
    three = make_geometry(narrow, tmp_path / "three", layers=3, **SIZES)
    assert three.num_moe_layers == 3
    found = tensors(tmp_path / "three")
    first, repeated = (
        found[f"model.layers.{layer}.mlp.experts.5.up_proj.weight"] for layer in (1, 3)
    )
    assert torch.equal(first[:32, :64], repeated[:32, :64])
    assert not torch.equal(first[:, 64:], repeated[:, 64:])  # other bytes to move


def test_the_same_seed_writes_the_same_bytes(narrow: Path, wide: Path, tmp_path: Path) -> None:
    make_geometry(narrow, tmp_path / "again", **SIZES)
    make_geometry(narrow, tmp_path / "other", seed=1, **SIZES)
    shard = "model-00001-of-00001.safetensors"
    written = [(folder / shard).read_bytes() for folder in (wide, tmp_path / "again")]
    assert written[0] == written[1]
    assert written[0] != (tmp_path / "other" / shard).read_bytes()


def test_a_large_tensor_is_made_in_bounded_chunks() -> None:
    weight = torch.randn(30, 10).bfloat16()
    shape = (9000, 4000)
    rows = 0
    for chunk in widen_matrix(weight, shape, fill=Fill.RANDOM, filler=Filler(0, "x")):
        assert chunk.nbytes <= CHUNK_BYTES
        if rows == 0:
            assert torch.equal(chunk[:30, :10], weight)
        rows += chunk.shape[0]
    assert rows == shape[0]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"hidden": 32}, "smaller than the source"),
        ({"expert": 16}, "smaller than the source"),
        ({"hidden": 200}, "give a multiple of 16"),
        ({"layers": 0}, "at least one MoE layer"),
    ],
    ids=["narrower-hidden", "narrower-expert", "part-of-a-head-group", "no-layers"],
)
def test_sizes_that_cannot_be_are_refused(
    narrow: Path, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_geometry(narrow, tmp_path / "out", **{**SIZES, **sizes})
    assert not (tmp_path / "out").exists()


def test_another_family_or_a_folder_in_use_is_refused(narrow: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mixtral"}')
    (other / "model.safetensors").write_bytes((narrow / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        make_geometry(other, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        make_geometry(narrow, other)
