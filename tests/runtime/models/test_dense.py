"""Dense layers in int8 and int4: the right ones, their values, less memory, the same routing."""

import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from outrider.kernels.quantization import dequantize, part_shapes, quantize
from outrider.runtime.engine import Engine
from outrider.runtime.errors import InvalidDataError, UnsupportedModelError
from outrider.runtime.models.checkpoint import Checkpoint
from outrider.runtime.models.dense import HalfLinear, QuantizedLinear
from outrider.runtime.models.loading import LoadedModel, load_model
from outrider.runtime.request import SamplingParams

_ATTENTION = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 3}
# By hand from each family's published layer list, three layers each: what is replaced, by the last
# part of its name, and which linear layers are left.
FAMILIES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    # One dense block and two shared ones of three projections.
    "deepseek": (
        {**_ATTENTION, "gate_proj": 3, "up_proj": 3, "down_proj": 3, "lm_head": 1},
        {},
    ),
    "qwen2_moe": (
        {**_ATTENTION, "gate_proj": 3, "up_proj": 3, "down_proj": 3, "lm_head": 1},
        {"shared_expert_gate": 3},
    ),
    # One dense block, no shared experts, and an output head that is the embedding.
    "qwen3_moe": (
        {**_ATTENTION, "gate_proj": 1, "up_proj": 1, "down_proj": 1},
        {"lm_head": 1},
    ),
    "deepseek_v3": (
        {"q_a_proj": 3, "q_b_proj": 3, "kv_a_proj_with_mqa": 3, "kv_b_proj": 3, "o_proj": 3}
        | {"gate_proj": 3, "up_proj": 3, "down_proj": 3, "lm_head": 1},
        {},
    ),
    "gpt_oss": ({**_ATTENTION, "lm_head": 1}, {}),
}
FORMATS = ("int8", "int4")


def load(models: Any, family: str, fmt: str) -> LoadedModel:
    return load_model(models.checkpoint(family), dense_format=fmt)


def stand_ins(loaded: LoadedModel) -> dict[str, QuantizedLinear]:
    return {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def plain_weights(models: Any, family: str) -> dict[str, torch.Tensor]:
    return load_file(models.checkpoint(family) / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_dense_products_are_replaced(models: Any, family: str) -> None:
    replaced, left = FAMILIES[family]
    loaded = load(models, family, "int8")
    assert Counter(name.rpartition(".")[2] for name in stand_ins(loaded)) == replaced
    linears = [n for n, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
    assert Counter(name.rpartition(".")[2] for name in linears) == left


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", ["deepseek", "qwen2_moe", "gpt_oss"])
def test_layers_compute_with_the_checkpoints_quantised_weights(
    models: Any, family: str, fmt: str
) -> None:
    weights = plain_weights(models, family)
    biases = 0
    for name, module in stand_ins(load(models, family, fmt)).items():
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        expected = quantize(weight, fmt)
        assert module.parts.keys() == expected.keys()
        assert all(torch.equal(module.parts[part], expected[part]) for part in expected)
        rows, columns = weight.shape
        hidden_states = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(1))
        values = dequantize(expected, fmt, dtype=torch.float32, shape=(rows, columns))
        truth = nn.functional.linear(hidden_states, values, bias)
        torch.testing.assert_close(module(hidden_states), truth, rtol=1e-4, atol=1e-4)
        biases += bias is not None
    assert biases == {"deepseek": 0, "qwen2_moe": 9, "gpt_oss": 12}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_embeddings_are_the_checkpoints(models: Any, family: str) -> None:
    plain, quantised = models.loaded(family), load(models, family, "int4")
    hidden_states = torch.randn(7, plain.shape.hidden_size)
    for ours, theirs in zip(quantised.layers, plain.layers, strict=True):
        for mine, other in zip(
            ours.router(hidden_states), theirs.router(hidden_states), strict=True
        ):
            assert torch.equal(mine, other)
    left = plain_weights(models, family)
    embedding = quantised.model.get_input_embeddings().weight
    assert torch.equal(embedding, left["model.embed_tokens.weight"])


def test_a_tied_head_stays_the_embedding(models: Any) -> None:
    loaded = load_model(models.checkpoint("qwen3_moe", dtype="bf16"), dense_format="int8")
    head = loaded.model.get_output_embeddings()
    assert head.weight is loaded.model.get_input_embeddings().weight
    assert isinstance(head, HalfLinear)  # what is left plain computes as it does without the option


@pytest.mark.parametrize("fmt", FORMATS)
def test_memory_shrinks_by_what_the_parts_save(models: Any, fmt: str) -> None:
    loaded = load(models, "qwen2_moe", fmt)
    saved = 0
    for module in stand_ins(loaded).values():
        rows, columns = module.out_features, module.in_features
        parts = part_shapes(fmt, rows, columns).values()
        taken = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts)
        saved += 4 * rows * columns - taken
    assert saved > 0
    assert loaded.dense_bytes == models.loaded("qwen2_moe").dense_bytes - saved


def test_one_plain_weight_is_in_memory_at_a_time(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.checkpoint("deepseek")
    chosen = {f"{name}.weight" for name in stand_ins(load_model(folder, dense_format="int8"))}
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        if name in chosen:
            alive.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    load_model(folder, dense_format="int8")
    assert len(alive) == len(chosen)
    # The one that was just read, and its predecessor until the loop's name is bound anew.
    assert most <= 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens_do_not_depend_on_the_expert_budget(models: Any, fmt: str) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    token_ids = set()
    for budget in ("10%", "all"):
        with Engine.from_pretrained(
            models.checkpoint("deepseek"), expert_memory=budget, dense_format=fmt
        ) as engine:
            assert stand_ins(engine.loaded)
            token_ids.add(engine.generate([5, 6, 7, 8], params)[0].token_ids)
    assert len(token_ids) == 1


def test_int8_hardly_changes_the_output(models: Any) -> None:
    hidden_states = torch.randn(4, models.loaded("deepseek").shape.hidden_size)
    plain = models.loaded("deepseek").model.model.layers[0].mlp
    quantised = load(models, "deepseek", "int8").model.model.layers[0].mlp
    truth, ours = plain(hidden_states), quantised(hidden_states)
    error = (ours - truth).norm() / truth.norm()
    assert 0 < error < 0.02


def test_a_family_that_reads_the_weight_is_refused(models: Any) -> None:
    module = stand_ins(load(models, "deepseek", "int8"))["lm_head"]
    with pytest.raises(UnsupportedModelError, match="--dense-format same"):
        nn.functional.linear(torch.zeros(1, 64), module.weight)


def _changed(models: Any, folder: Path, tensor: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(models.checkpoint("deepseek"), folder)
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[tensor]
    else:
        tensors[tensor] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(torch.full((64, 64), torch.nan), "NaN or infinity", id="not-finite"),
        pytest.param(torch.ones(64, 63), r"shape \[64, 63\].*wants \[64, 64\]", id="shape"),
        pytest.param(None, "no tensor of the checkpoint makes up", id="missing"),
    ],
)
def test_a_damaged_weight_is_named(
    models: Any, tmp_path: Path, value: torch.Tensor | None, said: str
) -> None:
    tensor = "model.layers.1.self_attn.q_proj.weight"
    folder = _changed(models, tmp_path / "model", tensor, value)
    with pytest.raises(InvalidDataError, match=said) as caught:
        load_model(folder, dense_format="int8")
    assert tensor in str(caught.value)
    assert str(folder) in str(caught.value)
