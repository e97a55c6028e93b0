"""The engine's options: what each accepts, and which of four layers gives a value."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.runtime import config as config_module
from outrider.runtime.config import OPTION_NAMES, EngineConfig, resolve_config
from outrider.runtime.errors import FieldError, UsageError
from outrider.runtime.experts.eviction import EVICTIONS
from outrider.runtime.provenance import MAX_FILE_BYTES, Provenance, gather

# option -> (accepted, refused); from INTERFACES section 1.
OPTIONS = {
    "expert_memory": (["8GiB", "25%", "all", "auto", 4096], ["", "8G", "0%", "101%", -1, None]),
    "host_memory": (["8GiB", "50%", "all", "auto"], ["lots", 0]),
    "format": (["auto", "fp32", "bf16", "fp16", "int8", "int4", "nf4"], ["fp8", "INT8", None, 8]),
    "dense_format": (["same", "int8", "int4"], ["nf4", "auto", ""]),
    "dtype": (["auto", "fp32", "bf16", "fp16"], ["float32", "int8"]),
    "predictor": (["auto", "none", "lookahead"], ["", "no-such-folder", None, 3, ["none"]]),
    "prefetch": (["on", "off", "auto"], [True, "yes", ""]),
    "eviction": (["auto", *EVICTIONS], ["fifo", "LRU", None]),
    "on_miss": (["fetch"], ["drop", None, True]),
    "verify_on_load": ([True, False], [1, "true", None]),
    "device": (["auto", "cpu"], ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", 0, None]),
    "revision": ([None, "main", "refs/pr/1", "0123abc"], ["", "a b", "a\n", "x" * 300, 5]),
    "num_threads": ([None, 1, 1024], [0, -1, 1025, True, 2.0, "2"]),
    "profile": ([None, "out", Path("out")], [3, b"out"]),
}
GOOD = [(name, value) for name, (good, _) in OPTIONS.items() for value in good]
BAD = [(name, value) for name, (_, bad) in OPTIONS.items() for value in bad]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(config_module, "cuda_device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(config_module, "cuda_device_count", lambda: 2)


def write(folder: Path, text: str, name: str = "outrider.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_every_option_has_a_case():
    assert set(OPTIONS) == set(OPTION_NAMES)


@pytest.mark.parametrize(("name", "value"), GOOD, ids=repr)
def test_accepted_value(name, value):
    assert getattr(EngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), BAD, ids=repr)
def test_refused_value_is_named(name, value):
    with pytest.raises(FieldError) as caught:
        EngineConfig(**{name: value})
    assert caught.value.field == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["format", "dense_format", "dtype", "eviction", "on_miss"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(FieldError) as caught:
        EngineConfig(**{name: "nonsense"})
    assert "'nonsense'" in str(caught.value)
    for known in OPTIONS[name][0]:
        assert known in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("eviction", "belady"), ("predictor", "oracle")])
def test_name_that_needs_the_future_is_refused_with_the_reason(name, value):
    with pytest.raises(FieldError, match="replay only"):
        EngineConfig(**{name: value})


def test_predictor_may_be_a_folder(tmp_path):
    assert EngineConfig(predictor=tmp_path).predictor == tmp_path
    assert EngineConfig(predictor=str(tmp_path)).predictor == str(tmp_path)
    with pytest.raises(FieldError, match="folder made by outrider train"):
        EngineConfig(predictor=tmp_path / "absent")


def test_budgets_are_parsed():
    config = EngineConfig(expert_memory="25%", host_memory="1GiB")
    assert (config.expert_budget.kind, config.expert_budget.amount) == ("percent", 25)
    assert (config.host_budget.kind, config.host_budget.amount) == ("bytes", 2**30)


def test_config_is_frozen_and_closed():
    with pytest.raises(AttributeError):
        EngineConfig().device = "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        EngineConfig(expert_memori="1GiB")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("on_miss", ["host", "auto"])
def test_host_computation_without_gpu_is_refused_with_the_reason(on_miss, no_gpu):
    with pytest.raises(FieldError, match=r"machine has no GPU.*accepted here is fetch"):
        EngineConfig(on_miss=on_miss)
    with pytest.raises(FieldError, match="the device is the CPU"):
        EngineConfig(on_miss=on_miss, device="cpu")


@pytest.mark.parametrize("on_miss", ["host", "auto"])
def test_host_computation_with_gpu_is_accepted(on_miss, two_gpus):
    EngineConfig(on_miss=on_miss)
    EngineConfig(on_miss=on_miss, device="cuda:1")
    with pytest.raises(FieldError, match="the device is the CPU"):
        EngineConfig(on_miss=on_miss, device="cpu")


def test_device_must_be_there(two_gpus, monkeypatch):
    EngineConfig(device="cuda")
    EngineConfig(device="cuda:1")
    with pytest.raises(FieldError, match=r"has 2 CUDA devices.*cuda:0 to cuda:1"):
        EngineConfig(device="cuda:2")
    monkeypatch.setattr(config_module, "cuda_device_count", lambda: 0)
    with pytest.raises(FieldError, match="has no CUDA devices"):
        EngineConfig(device="cuda")


# Two spellings of each layer's value, so that the winner can be told from its value alone.
LAYERED = {
    "expert_memory": ["1GiB", "2GiB", "3GiB"],
    "dtype": ["fp32", "bf16", "fp16"],
    "prefetch": ["on", "off", "auto"],
    "num_threads": ["1", "2", "3"],
    "eviction": ["lru", "lfu", "static"],
    "revision": ["main", "0123", "v1"],
}
SOURCES = ["command line", "environment", "file"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({name: st.sets(st.sampled_from(SOURCES)) for name in LAYERED}),
    st.booleans(),
)
def test_highest_layer_wins_and_is_named(tmp_path_factory, given_by, dashes):
    file = tmp_path_factory.getbasetemp() / "layers.yaml"
    layers: dict[str, dict[str, str]] = {source: {} for source in SOURCES}
    for name, sources in given_by.items():
        for source in sources:
            layers[source][name] = LAYERED[name][SOURCES.index(source)]
    lines = [
        f"{name.replace('_', '-') if dashes else name}: {value}"
        for name, value in layers["file"].items()
    ]
    file.write_text("\n".join(lines))
    cli = {name: layers["command line"].get(name) for name in OPTION_NAMES}
    env = {f"OUTRIDER_{name.upper()}": value for name, value in layers["environment"].items()}

    config, provenance = resolve_config(cli, env, file)

    assert set(provenance) == set(OPTION_NAMES)
    default = EngineConfig()
    for name in OPTION_NAMES:
        winner = next((s for s in SOURCES if s in given_by.get(name, ())), "default")
        assert provenance[name].source == winner
        if winner == "default":
            assert getattr(config, name) == getattr(default, name)
        else:
            assert str(getattr(config, name)) == LAYERED[name][SOURCES.index(winner)]


def test_provenance_says_where(tmp_path):
    file = write(tmp_path, "# mine\nformat: int8\n\nverify-on-load: yes\n")
    config, provenance = resolve_config(
        {"dtype": "fp32"}, {"OUTRIDER_PREFETCH": "off", "HOME": "/"}, file
    )
    assert provenance["dtype"] == Provenance("command line", "--dtype")
    assert provenance["prefetch"] == Provenance("environment", "OUTRIDER_PREFETCH")
    assert provenance["format"] == Provenance("file", f"{file}:2")
    assert provenance["verify_on_load"] == Provenance("file", f"{file}:4")
    assert provenance["device"] == Provenance("default", "default")
    assert config.verify_on_load is True


def test_words_that_yaml_takes_for_something_else_stay_words(tmp_path):
    # YAML 1.1 reads these as true, an octal number and a date.
    config, _ = resolve_config({}, {}, write(tmp_path, "prefetch: on\nrevision: 0123\n"))
    assert (config.prefetch, config.revision) == ("on", "0123")
    config, _ = resolve_config({}, {}, write(tmp_path, "prefetch: off\nrevision: 2026-01-01\n"))
    assert (config.prefetch, config.revision) == ("off", "2026-01-01")


def test_empty_means_not_given(tmp_path):
    file = write(tmp_path, "dtype:\nformat: null\nrevision: ~\n")
    config, provenance = resolve_config({"device": None}, {"OUTRIDER_DEVICE": ""}, file)
    assert config == EngineConfig()
    assert {source.source for source in provenance.values()} == {"default"}
    assert resolve_config({}, {}, write(tmp_path, ""))[0] == EngineConfig()
    assert resolve_config({}, os.environ, None)[0] is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("On", True), ("1", True), ("no", False), ("off", False), ("0", False)],
)
def test_truth_values_of_the_environment(text, value):
    config, _ = resolve_config({}, {"OUTRIDER_VERIFY_ON_LOAD": text})
    assert config.verify_on_load is value


@pytest.mark.parametrize(
    ("cli", "env", "line", "field", "where"),
    [
        ({"format": "fp8"}, {}, "", "format", "--format"),
        ({}, {"OUTRIDER_NUM_THREADS": "four"}, "", "num_threads", "OUTRIDER_NUM_THREADS"),
        ({}, {"OUTRIDER_NUM_THREADS": "9" * 50}, "", "num_threads", "OUTRIDER_NUM_THREADS"),
        ({}, {"OUTRIDER_VERIFY_ON_LOAD": "maybe"}, "", "verify_on_load", "OUTRIDER_VERIFY_ON_LOAD"),
        ({}, {}, "expert-memory: 8G", "expert_memory", ".yaml:1"),
        ({}, {}, "dtype: [fp32, bf16]", "dtype", ".yaml:1"),
        ({}, {}, "expert-memori: 1GiB", "expert_memori", "did you mean expert_memory"),
        ({}, {}, "dtype: fp32\ndtype: bf16", "dtype", "twice, first on line 1"),
        ({}, {}, "on-miss: fetch\non_miss: fetch", "on_miss", ".yaml:2"),
        ({"predicter": "none"}, {}, "", "predicter", "did you mean predictor"),
    ],
)
def test_error_says_which_layer_gave_the_value(tmp_path, cli, env, line, field, where):
    with pytest.raises(FieldError) as caught:
        resolve_config(cli, env, write(tmp_path, line))
    assert caught.value.field == field
    assert where in str(caught.value)


def test_lower_layer_that_is_overridden_is_not_judged():
    config, _ = resolve_config({"format": "int8"}, {"OUTRIDER_FORMAT": "fp8"})
    assert config.format == "int8"


def test_unknown_key_lists_what_is_accepted(tmp_path):
    with pytest.raises(FieldError) as caught:
        resolve_config({}, {}, write(tmp_path, "zzz: 1"))
    assert all(name in str(caught.value) for name in OPTION_NAMES)
    assert "did you mean" not in str(caught.value)


def test_misspelt_variable_is_refused_and_a_stranger_is_not():
    with pytest.raises(UsageError, match="did you mean OUTRIDER_EXPERT_MEMORY"):
        resolve_config({}, {"OUTRIDER_EXPERT_MEMROY": "1GiB"})
    resolve_config({}, {"OUTRIDER_KERNEL_LOG": "1", "OUTRIDER_": "", "EXPERT_MEMROY": "x"})


@pytest.mark.parametrize(
    "text",
    [
        *("- a\n- b", "just words", "a: b: c", "{", "dtype: {a: b}", "? [a]\n: b", "\t- x"),
        *("dtype: [[a]]", "--- a\n--- b", "dtype: *absent", "[" * 500),
        "dtype: &a [*a]",
    ],
    ids=lambda text: text[:12],
)
def test_file_that_is_no_list_of_options_is_refused(tmp_path, text):
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        resolve_config({}, {}, file)
    assert file.name in str(caught.value)
    assert len(str(caught.value)) < 800


def test_tag_makes_no_object(tmp_path):
    canary = tmp_path / "canary"
    file = write(tmp_path, f"revision: !!python/object/apply:os.mkdir ['{canary}']")
    with pytest.raises(UsageError):
        resolve_config({}, {}, file)
    assert not canary.exists()


def test_unreadable_file_is_refused(tmp_path):
    big = write(tmp_path, "#" * (MAX_FILE_BYTES + 1), "big.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent.yaml", tmp_path, big, binary):
        with pytest.raises(UsageError, match="configuration file"):
            resolve_config({}, {}, file)


def test_other_options_of_a_command_share_the_layers(tmp_path):
    file = write(tmp_path, "max-tokens: 5\nstop: [a, b]\nformat: int8\n")
    names = ("max_tokens", "stop", "top_k")
    env = {"OUTRIDER_TOP_K": "7"}
    config, _ = resolve_config({}, env, file, other_names=names)
    assert config.format == "int8"
    values = gather(names, {"max_tokens": 9}, env, file, other_names=OPTION_NAMES)
    assert {name: value for name, (value, _) in values.items()} == {
        "max_tokens": 9,
        "stop": ["a", "b"],
        "top_k": "7",
    }
    with pytest.raises(FieldError, match="max_tokens"):
        resolve_config({}, env, file)
