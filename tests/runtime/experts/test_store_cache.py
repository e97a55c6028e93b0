"""The folder of stores: made once, found again without reading the model, never used when stale."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from outrider.runtime.errors import InvalidDataError, OutriderError
from outrider.runtime.experts import store_cache
from outrider.runtime.experts.identity import SourceIdentity
from outrider.runtime.experts.index import PARTIAL_INDEX_NAME
from outrider.runtime.experts.store import ExpertStore
from outrider.runtime.experts.store_cache import cache_folder, store_folder, store_for
from outrider.runtime.models.checkpoint import fingerprint

from .store_child import SHAPE, Checkpoint


@dataclass
class Model:
    """A model folder whose content is a seed; counts how often it was read as a whole."""

    folder: Path
    seed: int = 0
    num_fingerprints: int = 0
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def write(self, seed: int) -> None:
        self.seed = seed
        self.checkpoint = Checkpoint(seed=seed)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps({"model_type": "x"}))
        (self.folder / "model.safetensors").write_text(f"seed {seed}")

    def source(self) -> SourceIdentity:
        files = [self.folder / "config.json", self.folder / "model.safetensors"]
        return SourceIdentity.of(self.folder, files)

    def fingerprint(self) -> str:
        self.num_fingerprints += 1
        config = json.loads((self.folder / "config.json").read_bytes())
        return fingerprint(config, {"weight": self.seed})

    def store(self, fmt: str = "int8", **options) -> ExpertStore:
        return store_for(
            self.source(),
            fmt,
            **{"shape": SHAPE, "layers": self.checkpoint, "fingerprint": self.fingerprint}
            | options,
        )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    model = Model(tmp_path / "model")
    model.write(seed=1)
    return model


def never(*_args: object) -> str:
    raise AssertionError("the model was read")


def test_the_first_use_packs_and_later_ones_read_nothing(model: Model) -> None:
    store = model.store()
    assert store.path == store_folder(store.source.fingerprint, "int8")
    assert store.path.parent == cache_folder()
    assert "int8" in store.path.name and store.source.fingerprint[:16] in store.path.name
    again = model.store(fingerprint=never, layers=never)
    assert again.path == store.path and again.verify() == []


def test_every_format_has_a_store_of_its_own(model: Model) -> None:
    paths = {fmt: model.store(fmt).path for fmt in ("int8", "nf4", "bf16")}
    assert len(set(paths.values())) == 3
    assert {fmt: model.store(fmt, layers=never).format for fmt in paths} == {f: f for f in paths}


def test_a_changed_model_never_gets_the_stale_store(model: Model) -> None:
    old = model.store()
    model.write(seed=2)
    new = model.store()
    assert model.num_fingerprints == 2
    assert new.path != old.path
    assert new.checksum((0, 0)) != old.checksum((0, 0))
    assert model.checkpoint.asked == [0, 1]


def test_a_touched_model_is_read_once_more_but_not_packed(model: Model) -> None:
    store = model.store()
    os.utime(model.folder / "model.safetensors", ns=(1, 1))
    again = model.store(layers=never)
    assert model.num_fingerprints == 2 and again.path == store.path
    model.store(layers=never)
    assert model.num_fingerprints == 2  # the new mtime was recorded


def test_two_models_with_equal_file_names_sizes_and_times_do_not_share(
    model: Model, tmp_path: Path
) -> None:
    other = Model(tmp_path / "other")
    other.write(seed=3)
    for folder in (model.folder, other.folder):
        for path in folder.iterdir():
            os.utime(path, ns=(5, 5))
    first, second = model.store(), other.store()
    assert first.source.files == second.source.files
    assert first.path != second.path
    assert first.checksum((0, 0)) != second.checksum((0, 0))


def test_copies_of_one_model_share_their_store(model: Model, tmp_path: Path) -> None:
    store = model.store()
    copy = Model(tmp_path / "copy")
    copy.write(seed=1)
    assert copy.store(layers=never).path == store.path


def damage_index(path: Path) -> None:
    index = path / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"top_k":2', b'"top_k":1'))


def truncate_shard(path: Path) -> None:
    os.truncate(path / "experts-00001.safetensors", 9000)


def remove_shard(path: Path) -> None:
    (path / "experts-00001.safetensors").unlink()


def unfinish(path: Path) -> None:
    (path / "index.json").rename(path / PARTIAL_INDEX_NAME)


DAMAGES = {
    "index": (damage_index, [0, 1]),
    "truncated": (truncate_shard, [1]),
    "missing": (remove_shard, [1]),
    "unfinished": (unfinish, []),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_in_the_cache_is_mended(model: Model, name: str) -> None:
    damage, asked = DAMAGES[name]
    store = model.store()
    damage(store.path)
    model.checkpoint.asked.clear()
    mended = model.store()
    assert mended.path == store.path and mended.verify() == []
    assert model.checkpoint.asked == asked
    assert mended.index.shards == store.index.shards


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_that_the_user_names_is_refused_and_left_alone(
    model: Model, tmp_path: Path, name: str
) -> None:
    given = tmp_path / "given"
    shutil.copytree(model.store().path, given)
    DAMAGES[name][0](given)
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    with pytest.raises(InvalidDataError, match=str(given)):
        model.store(at=given, layers=never)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before


def test_a_sound_store_that_the_user_names_is_used(model: Model, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(model.store().path, given)
    assert model.store(at=given, layers=never, fingerprint=never).path == given
    os.utime(model.folder / "config.json", ns=(1, 1))
    assert model.store(at=given, layers=never).path == given  # same content, by fingerprint


def other_weights(model: Model) -> dict:
    model.write(seed=9)
    return {}


MISMATCHES: dict[str, tuple[Callable[[Model], dict], str]] = {
    "weights": (other_weights, "other weights"),
    "format": (lambda _: {"fmt": "nf4"}, "format is int8"),
    "shape": (lambda _: {"shape": replace(SHAPE, top_k=1)}, "top_k"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_named_store_of_something_else_is_refused_with_the_reason(
    model: Model, tmp_path: Path, name: str
) -> None:
    given = tmp_path / "given"
    shutil.copytree(model.store().path, given)
    change, reason = MISMATCHES[name]
    with pytest.raises(InvalidDataError, match=reason):
        model.store(at=given, **change(model))


def test_a_cache_that_cannot_be_written_says_what_to_set(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutriderError, match="OUTRIDER_CACHE"):
        model.store()


def test_a_read_only_cache_still_serves_what_it_has(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = model.store()
    os.utime(model.folder / "model.safetensors", ns=(1, 1))
    monkeypatch.setattr(store_cache.os, "access", lambda *_: False)
    monkeypatch.setattr(store_cache, "pack_store", never)
    assert model.store().path == store.path


def test_foreign_and_broken_entries_of_the_cache_are_passed_over(model: Model) -> None:
    for name, content in {"a-int8-v1": b"", "b-int8-v1": b"{}", "c-int8-v1": b"\xff" * 99}.items():
        (cache_folder() / name).mkdir(parents=True)
        (cache_folder() / name / "index.json").write_bytes(content)
    (cache_folder() / "notes.txt").touch()
    (cache_folder() / "d-int8-v1" / "index.json").mkdir(parents=True)
    assert model.store().verify() == []


def test_without_the_variable_stores_stand_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OUTRIDER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)
    assert "outrider" in cache_folder().parts
    monkeypatch.setenv("OUTRIDER_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere" / "experts"


def test_a_fingerprint_depends_on_every_tensor_and_the_config_but_not_on_spelling() -> None:
    config = {"hidden_size": 8, "model_type": "x"}
    base = fingerprint(config, {"a": 1, "b": 2})
    assert len(base) == 64 and set(base) <= set("0123456789abcdef")
    assert fingerprint(dict(reversed(config.items())), {"b": 2, "a": 1}) == base
    others = [
        fingerprint(config | {"hidden_size": 9}, {"a": 1, "b": 2}),
        fingerprint(config, {"a": 1, "b": 3}),
        fingerprint(config, {"a": 2, "b": 1}),
        fingerprint(config, {"a": 1, "c": 2}),
        fingerprint(config, {"a": 1}),
    ]
    assert len({base, *others}) == 6
