"""Trained predictors in the engine: chosen, refused, switched off; never a different token."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.bench.geometry import make_geometry
from outrider.predictors.base import family_class
from outrider.predictors.checkpoint import load_predictor, read_config, save_predictor
from outrider.predictors.errors import PredictorError
from outrider.predictors.examples import Examples
from outrider.predictors.frequent import FrequentPredictor
from outrider.predictors.journal import Journal
from outrider.predictors.presets import make_settings
from outrider.runtime.config import EngineConfig
from outrider.runtime.engine import Engine
from outrider.runtime.errors import InvalidDataError, UsageError
from outrider.runtime.experts.eviction import DEFAULT_EVICTION
from outrider.runtime.models import adapter
from outrider.runtime.models.loading import load_model, resolve_folder
from outrider.runtime.models.origin import trained_shape
from outrider.runtime.request import SamplingParams
from outrider.runtime.speculation import (
    LATE_S,
    MAX_LATE,
    LateForecastError,
    Punctual,
    choose_predictor,
    shipped_predictor,
)

FAMILY = "deepseek"
FAMILIES = (
    "statistics", "cluster", "pattern", "frequent", "hierarchical", "attention",
    "lookahead-corrected", "pre-attention", "ensemble",
)  # fmt: skip
PROMPT = "the film was"
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
SETTINGS = make_settings(
    "small", {"width": 16, "heads": 2, "clusters": 2, "epochs": 1, "batch_size": 64}
)
SAMPLES, LENGTH = 24, 8


@pytest.fixture(scope="module")
def loaded(models):
    return models.loaded(FAMILY)


def examples_of(loaded, split, seed):
    """Made-up routing of the model's shape, with its own gates."""
    shape, rng = loaded.shape, np.random.default_rng(seed)
    tokens, layers = SAMPLES * LENGTH, shape.num_moe_layers
    chosen = rng.random((tokens, layers, shape.num_experts)).argsort(axis=2)[..., : shape.top_k]
    states = rng.normal(size=(layers, tokens, shape.hidden_size)).astype(np.float32)
    return Examples(
        shape=shape,
        split=split,
        token_id=rng.integers(0, 20, tokens).astype(np.int32),
        topk_ids=chosen.astype(np.uint8),
        topk_weights=np.full(chosen.shape, 0.5, np.float16),
        sample_offsets=np.arange(0, tokens + 1, LENGTH),
        document_id=(np.arange(tokens) // LENGTH + 1000 * seed).astype(np.uint64),
        hidden=dict(enumerate(states)),
        gates=tuple(adapter.router_gate(layer) for layer in loaded.layers),
        sources=("made up",),
    )


@pytest.fixture(scope="module")
def folders(loaded, tmp_path_factory):
    made, parts = {}, [examples_of(loaded, "train", 1), examples_of(loaded, "validation", 2)]
    for name in FAMILIES:
        fitted = family_class(name).fit(
            parts[0], validation=parts[1], settings=SETTINGS, progress=Journal()
        )
        tensors, config = fitted.state()
        made[name] = tmp_path_factory.mktemp("predictors") / name
        save_predictor(made[name], family=name, shape=loaded.shape, tensors=tensors, config=config)
    return made


@pytest.fixture(scope="module")
def expected(models):
    with models.engine(FAMILY, predictor="none") as engine:
        return engine.generate(PROMPT, GREEDY)[0].token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_from_its_folder_and_changes_no_token(
    name, models, folders, expected, caplog
):
    # Of routing that is next to random most forecasts are not worth a victim's own; this policy
    # knows no worths.
    options = {"prefetch": "on", "eviction": "layer-lfu", "predictor": str(folders[name])}
    with models.engine(FAMILY, num_slots=12, is_instant=True, **options) as engine:
        assert engine.tier.predictor_name == name
        assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
        assert not engine.tier.executor.is_degraded, caplog.text
        assert engine.tier.executor.cache.counters.prefetch_issued > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "forecast"),
        ({"prefetch": "on"}, "forecast"),
        ({"prefetch": "off"}, DEFAULT_EVICTION),
        ({"predictor": "none"}, DEFAULT_EVICTION),
        ({"expert_memory": "all"}, DEFAULT_EVICTION),
        ({"prefetch": "off", "eviction": "forecast"}, "forecast"),
        ({"eviction": "lru"}, "lru"),
    ],
)
def test_experts_leave_by_forecast_where_there_is_one_anyway(options, name, models, folders):
    told = {"expert_memory": "25%", "predictor": str(folders["statistics"])} | options
    with models.engine(FAMILY, **told) as engine:
        assert engine.tier.eviction_name == name
        # A predictor is loaded only where something asks it.
        is_forecast = name == "forecast" or told.get("prefetch") == "on"
        assert (engine.tier.predictor_name != "none") >= is_forecast


@pytest.fixture
def own_folder(models, tmp_path):
    """A checkpoint that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(models.checkpoint(FAMILY), folder)
    return folder


def test_auto_is_the_models_own_predictor(own_folder, folders, expected):
    assert choose_predictor("auto", load_model(own_folder)).name == "lookahead"
    shutil.copytree(folders["ensemble"], own_folder / "predictor")
    assert shipped_predictor(own_folder) == own_folder / "predictor"
    with Engine.from_pretrained(str(own_folder), expert_memory="25%", prefetch="on") as engine:
        assert engine.tier.predictor_name == "ensemble"
        assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
    loaded = load_model(own_folder)
    assert choose_predictor("ensemble", loaded).name == "ensemble"
    with pytest.raises(UsageError, match="'hierarchical' must be trained"):
        choose_predictor("hierarchical", loaded)


def test_a_shipped_predictor_that_does_not_fit_is_left_out(own_folder, folders, caplog):
    shutil.copytree(folders["statistics"], own_folder / "predictor")
    (own_folder / "predictor" / "model.safetensors").write_bytes(b"damage")
    assert choose_predictor("auto", load_model(own_folder)).name == "lookahead"
    assert "is damaged" in caplog.text


def test_a_predictor_of_another_model_is_refused_with_the_difference(models, folders):
    other = models.loaded("mixtral")
    with pytest.raises(InvalidDataError, match=r"trained for another model: .*fingerprint is"):
        choose_predictor(folders["statistics"], other)
    assert InvalidDataError("").exit_code == 3


def test_a_name_that_must_be_trained_says_how(loaded):
    with pytest.raises(UsageError, match=r"outrider train TRACES --predictor attention --out DIR"):
        choose_predictor("attention", loaded)


@pytest.fixture(scope="module")
def widened(models, folders, tmp_path_factory):
    """The checkpoint at four times its sizes, made from one that ships an ensemble."""
    source = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(models.checkpoint(FAMILY), source)
    shutil.copytree(folders["ensemble"], source / "predictor")
    out = tmp_path_factory.mktemp("widened")
    make_geometry(source, out, hidden=256, expert=128, dense=384)
    return load_model(out)


@pytest.mark.parametrize("name", ["statistics", "ensemble", "lookahead-corrected"])
def test_on_a_widened_model_its_sources_predictors_say_the_same(name, loaded, widened, folders):
    assert widened.shape.hidden_size == 4 * loaded.shape.hidden_size
    size, shape = loaded.shape.hidden_size, loaded.shape
    said = []
    for model in (loaded, widened):
        predictor = choose_predictor(folders[name], model).make()
        predictor.begin(np.arange(3))
        heard = []
        for token in range(3):
            for layer_idx in range(shape.num_moe_layers):
                rng = np.random.default_rng((token, layer_idx))
                state = torch.zeros(1, model.shape.hidden_size)
                state[0, :size] = torch.from_numpy(rng.normal(size=size))
                ids = rng.permutation(shape.num_experts)[None, : shape.top_k]
                heard.append(predictor.in_pass(layer_idx, state))
                weights = np.full(ids.shape, 0.5, np.float32)
                predictor.observe(layer_idx, ids, weights, state)
            heard.append(predictor.before_token(token, 1))
        said.append([one.probability for one in heard if one is not None])
    assert len(said[0]) == len(said[1]) > 2
    for own, other in zip(*said, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)


def test_a_widened_model_has_the_predictor_of_its_source(widened, folders, tmp_path):
    assert choose_predictor("auto", widened).name == "ensemble"
    config = read_config(folders["statistics"])
    other = dict(widened.checkpoint.config)
    other["widened_from"] = {**other["widened_from"], "fingerprint": "another"}
    with pytest.raises(PredictorError, match="fingerprint"):
        load_predictor(folders["statistics"], trained_shape(other, widened.shape))
    assert (
        trained_shape(widened.checkpoint.config, widened.shape).fingerprint
        == (config["shape"]["fingerprint"])
    )


@pytest.mark.parametrize(
    "source",
    [{}, {"hidden_size": 0, "expert_size": 4, "fingerprint": ""}, [1],
     {"hidden_size": 10**9, "expert_size": 4, "fingerprint": ""}],
)  # fmt: skip
def test_a_source_that_cannot_be_one_is_refused(source, loaded):
    with pytest.raises(InvalidDataError, match="widened_from"):
        trained_shape({"widened_from": source}, loaded.shape)


def test_forecasts_that_are_not_numbers_switch_the_predictor_off(
    models, loaded, folders, expected, tmp_path, caplog
):
    from safetensors.numpy import load_file

    tensors = load_file(folders["hierarchical"] / "model.safetensors")
    tensors["network.heads.0.bias"][:] = np.nan
    config = read_config(folders["hierarchical"])
    own = {
        name: value
        for name, value in config.items()
        if name not in ("format_version", "family", "shape", "weights")
    }
    save_predictor(
        tmp_path / "P", family="hierarchical", shape=loaded.shape, tensors=tensors, config=own
    )
    with models.engine(
        FAMILY, num_slots=12, prefetch="on", predictor=str(tmp_path / "P")
    ) as engine:
        assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
        assert engine.tier.executor.is_degraded
    assert "switched off" in caplog.text and "NaN" in caplog.text


class Slow(FrequentPredictor):
    """Takes its time, by a clock that it turns itself."""

    now = 0.0

    def before_token(self, token_id, horizon):
        Slow.now += 2 * LATE_S
        return super().before_token(token_id, horizon)


def test_forecasts_that_come_late_switch_the_predictor_off(models, expected, caplog):
    def make(loaded):
        return Punctual(Slow(loaded.shape), clock=lambda: Slow.now)

    with models.engine(FAMILY, num_slots=12, prefetch="on", make_predictor=make) as engine:
        assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
        assert engine.tier.executor.is_degraded
    assert f"{MAX_LATE} forecasts in a row took over 100 ms" in caplog.text


def test_a_forecast_that_is_late_now_and_then_is_forgiven(loaded):
    times = iter(np.cumsum([0.0, 2 * LATE_S] * 2 + [0.0, 0.0] + [0.0, 2 * LATE_S] * 3).tolist())
    predictor = Punctual(FrequentPredictor(loaded.shape), clock=lambda: next(times))
    predictor.begin(np.arange(2))
    for _ in range(5):
        predictor.before_token(1, 1)
    with pytest.raises(LateForecastError):
        predictor.before_token(1, 1)


def test_a_prompts_rows_are_not_timed(loaded):
    predictor = Punctual(FrequentPredictor(loaded.shape), clock=lambda: pytest.fail("timed"))
    predictor.in_pass(0, torch.zeros(3, loaded.shape.hidden_size))


def test_a_folder_that_is_no_predictor(loaded, tmp_path):
    with pytest.raises(InvalidDataError, match="is not a predictor"):
        choose_predictor(tmp_path, loaded)
    assert issubclass(PredictorError, ValueError)
    assert EngineConfig(predictor=Path(tmp_path)).predictor == tmp_path


def test_the_built_in_models_own_predictor_fits_it():
    loaded = load_model(resolve_folder(None))
    assert shipped_predictor(loaded.folder) is not None
    speculation = choose_predictor("auto", loaded)
    assert speculation.name == "ensemble"
    predictor = speculation.make()
    predictor.begin(np.arange(3))
    forecast = predictor.before_token(5, 1)
    forecast.check(loaded.shape)
    np.testing.assert_allclose(forecast.probability.sum(axis=1), loaded.shape.top_k, rtol=0.01)
