"""The shipped outrider-nano is whole, small, and laid out as DeepSeek-MoE checkpoints are."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from recipes.nano.measure import measure

MODEL = Path(__file__).parents[2] / "runtime" / "models" / "nano"


def test_every_expert_of_every_layer_is_there_in_bfloat16() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
            for expert in range(config["n_routed_experts"]):
                for part, shape in (("gate", [inner, hidden]), ("down", [hidden, inner])):
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                    assert name in names
                    assert file.get_slice(name).get_shape() == shape
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 60_000_000


def test_the_shipped_model_predicts_text_and_uses_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from outrider.collect.corpora import offline
    from outrider.collect.corpora.split import split_of
    from outrider.runtime.models.deepseek import DeepseekForCausalLM
    from recipes.nano import measure as slice_of
    from recipes.nano.tokenizer import encode

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sample = MODEL.parents[2] / "collect" / "corpora" / "sample"
    domains = ("speeches", "dialogue", "code")
    held_out = [d for d in offline.sample(sample) if split_of(d.text) == "test"]
    for domain in domains:
        text = next(document.text for document in held_out if document.domain == domain)
        np.save(tmp_path / f"{domain}.test.npy", encode(tokenizer, [(text * 9)[:9000]]))
    monkeypatch.setattr("recipes.nano.data.DOMAINS", domains)
    monkeypatch.setattr(slice_of, "DOMAINS", domains)
    model = DeepseekForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    figures, usage = measure(model, tmp_path)
    # The card's figures are 1.3 to 1.6; untrained the model needs about 3.7.
    assert all(1.0 < row.bits_per_byte < 2.2 for row in figures.values())
    assert int((usage > 0).sum(-1).min()) >= 60
