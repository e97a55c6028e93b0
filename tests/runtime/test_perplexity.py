"""Perplexity on the engine's own path against plain transformers, and what `pack` says of it."""

import json
import math
from pathlib import Path
from typing import Any

import engines
import pytest
import torch

from outrider.collect.corpora.offline import sample
from outrider.collect.corpora.registry import SAMPLE_FOLDER
from outrider.collect.corpora.split import split_of
from outrider.runtime import perplexity as module
from outrider.runtime.errors import OutriderError, UsageError
from outrider.runtime.models.loading import load_tokenizer
from outrider.runtime.perplexity import held_out, perplexity

CONTEXT = 24


def reference_perplexity(models: Any, family: str, documents: list[list[int]]) -> float:
    """One window after the other through the reference's plain forward pass."""
    total, count = 0.0, 0
    for document in documents:
        for start in range(0, len(document), CONTEXT):
            window = document[start : start + CONTEXT]
            logits = models.reference(family).logits(window).double()
            for position in range(len(window) - 1):
                scores = logits[position]
                total += float(scores.exp().sum().log() - scores[window[position + 1]])
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("max_logits", [1, 3 * CONTEXT * 320, 1 << 26], ids=["1", "3", "all"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_equals_the_plain_forward_pass(
    models: Any, family: str, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_LOGITS", max_logits)
    lengths = (70, CONTEXT, 2, 1, CONTEXT + 1, 9)
    documents = [engines.prompt_of(n, seed=n) for n in lengths]
    told: list[tuple[int, int]] = []
    with models.engine(family, num_slots=3) as engine:
        ours = perplexity(engine, documents, context=CONTEXT, progress=lambda *at: told.append(at))
    assert ours == pytest.approx(reference_perplexity(models, family, documents), rel=1e-5)
    # 3 + 1 + 1 + 0 + 1 + 1 windows with something to predict.
    assert told[-1] == (7, 7)
    assert len(told) == {1: 7, 1 << 26: 1}.get(max_logits, 3)


def test_logprobs_leave_running_streams_alone(models: Any) -> None:
    from outrider.runtime.request import SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = engines.prompt_of(6)
    with models.engine("mixtral", num_slots=4) as engine:
        alone = engine.generate(prompt, params)[0].token_ids
        stream = engine.stream(prompt, params)
        token_ids = [*next(stream).token_ids]
        (logprobs,) = engine.logprobs([[*prompt, *alone]])
        token_ids += [token_id for chunk in stream for token_id in chunk.token_ids]
    assert tuple(token_ids) == alone
    # Greedy tokens are the likeliest: none can be less likely than one in the vocabulary.
    assert bool((logprobs[len(prompt) - 1 :] >= -math.log(320)).all())


def test_nothing_to_predict_is_refused(models: Any) -> None:
    with models.engine("mixtral") as engine, pytest.raises(UsageError, match="two tokens"):
        perplexity(engine, [[5], []], context=8)


def test_logits_that_are_no_numbers_are_an_error(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.engine("mixtral") as engine:
        monkeypatch.setattr(engine, "logprobs", lambda texts: [torch.full((1,), torch.nan)])
        with pytest.raises(OutriderError, match="nan"):
            perplexity(engine, [[5, 6]], context=8)


def test_held_out_text_is_of_the_test_split_and_of_all_domains(models: Any) -> None:
    tokenizer = load_tokenizer(models.checkpoint("mixtral"))
    text, windows = held_out(tokenizer, num_tokens=1500, context=100)
    assert sum(len(window) - 1 for window in windows) == 1500
    assert max(map(len, windows)) == 100
    test_split: dict[str, str] = {}
    rest = ""
    for document in sample(SAMPLE_FOLDER):
        if split_of(document.text) == "test":
            test_split[document.domain] = test_split.get(document.domain, "") + document.text
        else:
            rest += document.text
    assert text == f"sample:{','.join(test_split)} (test split)"
    found = set()
    for window in windows:
        piece = tokenizer.decode(window)
        domains = [domain for domain, whole in test_split.items() if piece in whole]
        found.update(domains)
        assert domains
        assert len(piece) < 40 or piece not in rest
    assert found == test_split.keys()


def _pack(model: Path, out: Path, *options: str) -> Any:
    from typer.testing import CliRunner

    from outrider.runtime.cli import app

    arguments = ["pack", str(model), "--format", "int4", "--out", str(out), "--json", *options]
    return CliRunner().invoke(app, arguments)


def test_pack_measures_it_on_small_models(models: Any, tmp_path: Path) -> None:
    result = _pack(models.checkpoint("qwen3_moe", dtype="bf16"), tmp_path / "store")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    measured = document["perplexity"]
    assert measured["tokens"] == module.NUM_TOKENS
    assert measured["ratio"] == measured["packed"] / measured["checkpoint"]
    # A random model: no better than guessing, and int4 experts are not the same model.
    assert 100 < measured["checkpoint"] < 1e4
    assert 0.8 < measured["ratio"] < 1.25
    assert measured["ratio"] != 1.0
    assert "held-out text" in result.stderr


@pytest.mark.parametrize(
    ("options", "limit", "measures", "said"),
    [
        pytest.param(["--no-perplexity"], 1 << 31, False, "", id="not-wanted"),
        pytest.param([], 1, False, "--perplexity", id="too-large"),
        pytest.param(["--perplexity"], 1, True, "held-out text", id="insisted"),
    ],
)
def test_pack_leaves_it_out_where_it_is_not_wanted_or_not_cheap(
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    limit: int,
    measures: bool,
    said: str,
) -> None:
    monkeypatch.setattr("outrider.runtime.commands.pack.CHEAP_BYTES", limit)
    monkeypatch.setattr(module, "NUM_TOKENS", 64)
    result = _pack(models.checkpoint("qwen3_moe"), tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["perplexity"] is not None) == measures
    assert said in result.stderr
    assert (tmp_path / "store" / "index.json").is_file()


def test_pack_without_a_tokenizer_says_why_it_is_left_out(models: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(models.checkpoint("qwen3_moe"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    result = _pack(folder, tmp_path / "store")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["perplexity"] is None
    assert "no usable tokenizer" in result.stderr
    insisted = _pack(folder, tmp_path / "store", "--perplexity")
    assert insisted.exit_code == 3


def test_encoded_checkpoints_are_compared_as_decoded(tmp_path: Path) -> None:
    from encodings_of_checkpoints import encode_fp8
    from families import make_checkpoint

    folder = make_checkpoint(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)
    encode_fp8(folder, block=(8, 8))
    result = _pack(folder, tmp_path / "store")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["perplexity"]["ratio"] != 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]
