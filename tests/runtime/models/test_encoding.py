"""Encoded checkpoints become the weights that transformers itself decodes them to."""

import json
from pathlib import Path

import pytest
import torch
from encodings_of_checkpoints import encode_fp8, encode_mxfp4
from families import make_checkpoint

from outrider.runtime import Engine, SamplingParams
from outrider.runtime.errors import UnsupportedModelError
from outrider.runtime.models.loading import load_model

CASES = {
    "deepseek_v3-fp8": ("deepseek_v3", {}),
    "qwen3_moe-fp8": ("qwen3_moe", {"moe_intermediate_size": 32}),
    "gpt_oss-mxfp4": ("gpt_oss", {"intermediate_size": 64}),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    family, fields = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, family, dtype=torch.bfloat16, **fields)
    if request.param.endswith("fp8"):
        encode_fp8(folder, block=(8, 8))
        decoding = FineGrainedFP8Config(dequantize=True)
    else:
        encode_mxfp4(folder)
        decoding = Mxfp4Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=decoding
    )
    return folder, reference.state_dict()


def test_decoded_weights_equal_transformers(encoded) -> None:
    folder, reference = encoded
    loaded = load_model(folder)
    experts = {
        f"{layer.name}.{name}": value
        for layer in loaded.layers
        for name, value in loaded.layer_tensors(layer.layer_idx).items()
    }
    ours = {**loaded.model.state_dict(), **experts}
    assert ours.keys() == reference.keys()
    differing = [name for name in ours if not torch.equal(ours[name], reference[name])]
    assert differing == []


def test_encoded_experts_are_packed_and_generate(
    encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path))
    folder, _ = encoded
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    token_ids = set()
    for budget in ("25%", "all"):
        with Engine.from_pretrained(folder, expert_memory=budget) as engine:
            assert engine.tier.source.format == "bf16"
            token_ids.add(engine.generate("The film was", params)[0].token_ids)
    assert len(token_ids) == 1


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"awq.*fp8 and mxfp4"):
        load_model(tmp_path)
