"""Packing a store: what is refused, resumed, shared between processes, and survives a kill."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from outrider.collect.schema import ModelShape
from outrider.runtime.errors import InvalidDataError, OutriderError, UsageError
from outrider.runtime.experts import disk
from outrider.runtime.experts.identity import SourceIdentity
from outrider.runtime.experts.index import read_index
from outrider.runtime.experts.pack import pack_store, shard_plan
from outrider.runtime.experts.store import ExpertStore

from .store_child import SHAPE, SOURCE, Checkpoint, pack

HERE = Path(__file__).parent
SHARDS = [f"experts-{layer:05d}-{piece:03d}.safetensors" for layer in (0, 1) for piece in (0, 1)]
FINISHED = [*SHARDS, "index.json", "pack.lock"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What a packing does on its own.


def test_each_layer_is_asked_for_once_and_progress_counts_every_expert(tmp_path: Path) -> None:
    checkpoint, told = Checkpoint(), []
    pack(tmp_path / "store", checkpoint, progress=lambda *counts: told.append(counts))
    assert checkpoint.asked == [0, 1]
    assert told == [(done, 6) for done in range(7)]
    assert names(tmp_path / "store") == FINISHED


def test_packing_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(tmp_path / name)
    for name in (*SHARDS, "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_finished_store_is_not_packed_again(tmp_path: Path) -> None:
    pack(tmp_path / "store")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    checkpoint = Checkpoint()
    assert pack(tmp_path / "store", checkpoint).verify() == []
    assert checkpoint.asked == []
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert {n: t for n, t in after.items() if n != "pack.lock"} == {
        n: t for n, t in before.items() if n != "pack.lock"
    }


def test_only_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    expected = pack(tmp_path / "store").index.shards
    os.truncate(tmp_path / "store" / SHARDS[2], 4096)
    kept = {name: (tmp_path / "store" / name).stat().st_ino for name in SHARDS if name != SHARDS[2]}
    checkpoint = Checkpoint()
    assert pack(tmp_path / "store", checkpoint).index.shards == expected
    assert checkpoint.asked == [1]
    assert kept == {name: (tmp_path / "store" / name).stat().st_ino for name in kept}


def test_an_interrupted_packing_goes_on_and_is_no_store_before_that(tmp_path: Path) -> None:
    out = tmp_path / "store"

    def interrupt(done: int, _total: int) -> None:
        if done == 4:  # one expert into the second layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(out, progress=interrupt)
    assert names(out) == [*SHARDS[:2], "index.partial.json", "pack.lock"]
    with pytest.raises(InvalidDataError, match="was not finished"):
        ExpertStore(out)
    checkpoint, told = Checkpoint(), []
    store = pack(out, checkpoint, progress=lambda *counts: told.append(counts))
    assert (checkpoint.asked, told[0]) == ([1], (3, 6))
    assert store.verify() == [] and names(out) == FINISHED


def test_files_of_a_killed_packing_are_removed_before_space_is_needed(tmp_path: Path) -> None:
    leftover = tmp_path / ".experts-00000-000.safetensors.x1.tmp"
    leftover.write_bytes(b"half a shard")
    orphan = tmp_path / SHARDS[3]
    orphan.write_bytes(b"renamed, but not recorded")
    seen: list[list[str]] = []
    pack(tmp_path, progress=lambda *_: seen.append(names(tmp_path)))
    assert seen[0] == ["index.partial.json", "pack.lock"]


@pytest.mark.parametrize(
    "change",
    [
        {"fmt": "int4"},
        {"source": msgspec.structs.replace(SOURCE, fingerprint="0" * 64)},
        {"max_shard_bytes": 2**30},
    ],
    ids=["format", "source", "shard-size"],
)
def test_what_was_begun_otherwise_starts_over(tmp_path: Path, change: dict) -> None:
    out = tmp_path / "store"

    def stop(layer_idx: int) -> dict[str, Tensor]:
        if layer_idx == 1:
            raise RuntimeError("stop")
        return Checkpoint(seed=5).tensors(layer_idx)

    with pytest.raises(RuntimeError, match="stop"):
        pack(out, layers=stop)
    checkpoint = Checkpoint()
    store = pack(out, checkpoint, **change)
    assert checkpoint.asked == [0, 1]
    pack(tmp_path / "fresh", **change)
    assert store.index.shards == read_index(tmp_path / "fresh" / "index.json").shards
    assert names(out) == names(tmp_path / "fresh")


def test_a_damaged_partial_index_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with pytest.raises(ZeroDivisionError):
        pack(out, progress=lambda done, _: 1 // (4 - done))
    (out / "index.partial.json").write_bytes(b"{}")
    checkpoint = Checkpoint()
    assert pack(out, checkpoint).verify() == []
    assert checkpoint.asked == [0, 1]


def test_errors_of_the_source_and_of_progress_pass_unchanged(tmp_path: Path) -> None:
    class SourceError(OSError):
        pass

    def layers(_layer_idx: int) -> dict[str, Tensor]:
        raise SourceError(errno.EACCES, "the model's shard")

    with pytest.raises(SourceError):
        pack(tmp_path / "one", layers=layers)

    def progress(done: int, _total: int) -> None:
        if done:
            raise BrokenPipeError(errno.EPIPE, "the terminal")

    with pytest.raises(BrokenPipeError):
        pack(tmp_path / "two", progress=progress)


def test_shards_of_a_large_layer_are_split_in_order() -> None:
    shape = ModelShape(2, 7, 1, 8, 8, "")
    plan = shard_plan(shape, 4096, max_shard_bytes=3 * 4096)
    assert [len(keys) for keys in plan.values()] == [3, 3, 1, 3, 3, 1]
    assert [tuple(key) for keys in plan.values() for key in keys] == [
        (layer, expert) for layer in range(2) for expert in range(7)
    ]
    assert list(plan) == sorted(plan)
    assert len(shard_plan(shape, 2**33)) == 14  # a block above the limit is a shard of its own
    assert list(shard_plan(shape, 4096)) == [
        "experts-00000.safetensors",
        "experts-00001.safetensors",
    ]


# What is refused.


def distorted(name: str, change) -> object:
    def layers(layer_idx: int) -> dict[str, Tensor]:
        tensors = Checkpoint(has_bias=True).tensors(layer_idx)
        if layer_idx == 1:
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
        return tensors

    return layers


def with_value(value: float):
    def change(tensor: Tensor) -> Tensor:
        tensor[2].view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "fmt", "says"),
    [
        ("down_proj", lambda t: t[:, :-1], "int8", "expected (3, 24, 20)"),
        ("down_proj", lambda t: t.mT, "int8", "expected (3, 24, 20)"),
        ("gate_up_proj", lambda t: t[:2], "int8", "expected (3, 40, 24)"),
        ("gate_up_proj", lambda t: t.to(torch.int8), "int8", "torch.int8"),
        ("gate_up_proj", lambda t: t.double(), "bf16", "torch.float64"),
        ("gate_up_proj", lambda t: None, "int8", "gate_up_proj"),
        ("down_proj_bias", lambda t: t[:2], "int8", "(3, ...)"),
        ("down_proj_bias", lambda t: t[:, 1:], "int8", "does not have the tensors"),
        ("down_proj", with_value(float("nan")), "int8", "NaN"),
        ("down_proj", with_value(float("-inf")), "nf4", "infinity"),
        ("gate_up_proj_bias", with_value(float("inf")), "bf16", "infinity"),
        ("down_proj", with_value(7e4), "fp16", "65504"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_naming_layer_and_tensor(
    tmp_path: Path, name: str, change, fmt: str, says: str
) -> None:
    with pytest.raises(InvalidDataError) as caught:
        pack(tmp_path / "store", layers=distorted(name, change), fmt=fmt)
    message = str(caught.value)
    assert says in message and "MoE layer 1" in message and name.removesuffix("_bias") in message
    with pytest.raises(InvalidDataError):
        ExpertStore(tmp_path / "store")


def test_an_odd_number_of_weights_is_refused_in_nf4(tmp_path: Path) -> None:
    shape = ModelShape(1, 1, 1, 3, 5, "")
    with pytest.raises(InvalidDataError, match=r"down_proj.*odd"):
        pack(tmp_path / "store", Checkpoint(shape), fmt="nf4")


def test_an_unknown_format_is_refused_listing_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"int3.*int8.*nf4"):
        pack(tmp_path / "store", fmt="int3")
    assert not (tmp_path / "store").exists()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"thesis\.txt"):
            pack(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_finished_store_of_something_else_is_refused_unless_overwritten(tmp_path: Path) -> None:
    pack(tmp_path, fmt="bf16")
    with pytest.raises(UsageError, match="bf16"):
        pack(tmp_path, fmt="int8")
    assert ExpertStore(tmp_path).format == "bf16" and ExpertStore(tmp_path).verify() == []
    assert pack(tmp_path, fmt="int8", overwrite=True).format == "int8"
    assert names(tmp_path) == FINISHED


def test_a_finished_store_with_an_edited_index_is_refused_unless_overwritten(
    tmp_path: Path,
) -> None:
    pack(tmp_path)
    index = tmp_path / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"top_k":2', b'"top_k":1'))
    with pytest.raises(InvalidDataError, match=r"index\.json was damaged or edited.*pack it again"):
        pack(tmp_path)
    assert pack(tmp_path, overwrite=True).verify() == []


def test_a_source_that_changes_while_it_is_packed_is_noticed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"first")
    source = SourceIdentity.of(model, [weights], fingerprint="a" * 64)

    def layers(layer_idx: int) -> dict[str, Tensor]:
        if layer_idx == 1:
            weights.write_bytes(b"second")
        return Checkpoint().tensors(layer_idx)

    with pytest.raises(InvalidDataError, match=r"changed while.*model\.safetensors"):
        pack(tmp_path / "store", layers=layers, source=source)
    with pytest.raises(InvalidDataError, match="not finished"):
        ExpertStore(tmp_path / "store")


def test_too_little_space_is_said_before_anything_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=30_000))
    with pytest.raises(OutriderError) as caught:
        pack(tmp_path / "store")
    message = str(caught.value)
    needed = 4 * 4096 + 6 * 4096 + 2**20
    assert str(tmp_path / "store") in message
    assert f"{needed} more bytes are needed, 30000 are free" in message
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_the_space_check_counts_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        pack(tmp_path, progress=lambda done, _: 1 // (4 - done))
    usage = shutil.disk_usage(tmp_path)
    needed = 2 * 4096 + 3 * 4096 + 2**20
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutriderError, match=f"{needed} more bytes"):
        pack(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert pack(tmp_path).verify() == []


def test_a_folder_that_cannot_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutriderError) as caught:
        pack(tmp_path / "file" / "store")
    message = str(caught.value)
    assert str(tmp_path / "file") in message
    assert "OUTRIDER_CACHE" in message and "--out" in message


def test_a_source_without_a_fingerprint_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        pack_store(
            tmp_path,
            shape=SHAPE,
            fmt="int8",
            layers=Checkpoint(),
            source=msgspec.structs.replace(SOURCE, fingerprint=""),
        )


# Faults at the system's boundary, in processes of their own.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of packings with their fsyncs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    folder = memory / f"outrider-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def start(*arguments: object, preload: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    # As a module of its own file: the child imports outrider as installed.
    command = [sys.executable, str(HERE / "store_child.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def run(*arguments: object, preload: Path | None = None):
    process = start(*arguments, preload=preload)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0
    return json.loads(output)


@pytest.fixture(scope="module")
def faults(folder: Path) -> dict:
    """Outcomes of every disturbed packing, from one child under the preloaded library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = folder / "store_faults.so"
    source = HERE / "store_faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return run("faults", folder, preload=library)


@pytest.mark.parametrize(
    ("scenario", "readers"),
    [
        ("fresh", {"refused", "sound int8"}),
        ("other-format", {"sound bf16", "refused", "sound int8"}),
        ("damaged-shard", {"refused", "sound int8"}),
        ("touched-source", {"sound int8"}),
    ],
)
def test_a_kill_at_any_step_leaves_a_store_that_is_whole_or_resumed(
    faults: dict, scenario: str, readers: set[str]
) -> None:
    *killed, last = faults[scenario]
    assert len(killed) > 15 and all(step["killed"] for step in killed)
    assert not last["killed"] and "unexpected" not in last and last["reader"] == "sound int8"
    assert {step["reader"] for step in killed} == readers
    for number, step in enumerate([*killed, last], 1):
        # Finished shards were neither made again nor asked for.
        assert step["asked"] == step["unfinished_layers"], number
        assert step["remade"] == [], number
        assert step["is_whole"] and step["final_files"] == FINISHED, number


@pytest.mark.parametrize(("name", "least"), [("ENOSPC", 50), ("EDQUOT", 8)])
def test_a_full_disk_at_any_step_is_said_and_packing_goes_on_later(
    faults: dict, folder: Path, name: str, least: int
) -> None:
    *failed, last = faults[name]
    assert len(failed) >= least and last["reader"] == "sound int8"
    kept: set[str] = set()
    for number, step in enumerate(failed):
        assert not step["killed"] and "unexpected" not in step, number
        reason = os.strerror(getattr(errno, name))
        assert reason in step["error"] and str(folder) in step["error"], number
        assert "bytes are free" in step["error"]
        assert not [name for name in step["files"] if name.endswith(".tmp")], number
        assert step["asked"] == step["unfinished_layers"] and step["remade"] == [], number
        assert step["is_whole"] and step["final_files"] == FINISHED, number
        if "safetensors" in step["error"]:
            assert "more bytes are needed" in step["error"]
        kept.update(name for name in step["files"] if name.endswith(".safetensors"))
    assert kept == set(SHARDS)


def test_a_read_only_file_system_says_what_to_set(faults: dict) -> None:
    first, *_ = faults["EROFS"]
    assert os.strerror(errno.EROFS) in first["error"]
    assert "OUTRIDER_CACHE" in first["error"] and "--out" in first["error"]


def test_an_input_output_error_is_said_and_nothing_is_lost(faults: dict, folder: Path) -> None:
    *failed, _ = faults["EIO"]
    assert len(failed) >= 8
    for step in failed:
        assert os.strerror(errno.EIO) in step["error"] and str(folder) in step["error"]
        assert step["is_whole"]


def test_a_file_size_limit_is_said(faults: dict) -> None:
    outcome = faults["limit"]
    assert os.strerror(errno.EFBIG) in outcome["error"]
    assert "experts-00000.safetensors" in outcome["error"]
    assert outcome["files"] == ["index.partial.json", "pack.lock"]
    assert outcome["again"]


def test_of_two_processes_the_second_waits_and_takes_the_result(tmp_path: Path) -> None:
    out, started, go = tmp_path / "store", tmp_path / "started", tmp_path / "go"
    first = start("hold", out, started, go)
    deadline = time.monotonic() + 120
    while not started.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    waited: list[Path] = []

    def on_wait(folder: Path) -> None:
        waited.append(folder)
        go.touch()

    checkpoint = Checkpoint()
    store = pack(out, checkpoint, on_wait=on_wait)
    assert waited == [out] and checkpoint.asked == []
    assert store.verify() == []
    output, _ = first.communicate(timeout=60)
    assert json.loads(output) == {"asked": [0, 1]}


def test_of_two_threads_the_second_waits_too(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "store", Checkpoint()
    inside, go = threading.Event(), threading.Event()

    def layers(layer_idx: int) -> dict[str, Tensor]:
        inside.set()
        assert go.wait(30)
        return checkpoint(layer_idx)

    thread = threading.Thread(target=lambda: pack(out, layers=layers))
    thread.start()
    try:
        assert inside.wait(30)
        second = Checkpoint()
        assert pack(out, second, on_wait=lambda _: go.set()).verify() == []
    finally:
        go.set()
        thread.join()
    assert (checkpoint.asked, second.asked) == ([0, 1], [])


def test_packing_holds_one_layer_at_a_time(folder: Path) -> None:
    # 8 layers of 16 MiB; what comes above one layer is a block, its quantised parts and the heap.
    slack = 12 * 2**20
    rises = run("memory", folder / "memory", "clean", "leaking")
    assert rises["clean"]["rise"] < rises["clean"]["layer_bytes"] + slack
    assert rises["leaking"]["rise"] > 4 * rises["leaking"]["layer_bytes"]
