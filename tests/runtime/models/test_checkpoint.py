"""A folder of shards: the bytes that are there, or an error that names file and tensor."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from outrider.runtime.errors import InvalidDataError, UnsupportedModelError
from outrider.runtime.models.checkpoint import Checkpoint, checksum, fingerprint

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "fp32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "fp64": torch.arange(3, dtype=torch.float64),
    "bf16": torch.arange(5).to(torch.bfloat16),
    "fp16": torch.arange(5).to(torch.float16),
    "fp8": torch.arange(5).float().to(torch.float8_e4m3fn),
    "int64": torch.arange(-2, 2),
    "int8": torch.arange(-3, 3, dtype=torch.int8),
    "bool": torch.tensor([True, False]),
}


def folder_of(path: Path, tensors=TENSORS, *, config=None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_it_was_written(tmp_path, name):
    checkpoint = Checkpoint(folder_of(tmp_path))
    got, want = checkpoint.read(name), TENSORS[name]
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.reshape(-1).view(torch.uint8).equal(want.reshape(-1).view(torch.uint8))


def test_shards_are_read_and_not_mapped(tmp_path):
    # A mapped file that is cut short kills the process; one that is read is an error of one read.
    checkpoint = Checkpoint(folder_of(tmp_path))
    tensors = [checkpoint.read(name) for name in TENSORS]
    assert len(tensors) == len(TENSORS)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param([], "damaged safetensors header", id="a-list"),
        pytest.param(5, "damaged safetensors header", id="a-number"),
        pytest.param("x", "damaged safetensors header", id="a-string"),
        pytest.param(None, "damaged safetensors header", id="null"),
        pytest.param(b"{", "damaged safetensors header", id="half-json"),
        pytest.param(b"\xff\xfe", "damaged safetensors header", id="not-utf-8"),
        pytest.param(b"[" * 100_000, "damaged safetensors header", id="too-deep"),
        pytest.param({"t": []}, "tensor 't': damaged entry", id="entry-list"),
        pytest.param({"t": None}, "tensor 't': damaged entry", id="entry-null"),
        pytest.param({"t": {"dtype": "F32"}}, "tensor 't': unknown or missing", id="no-shape"),
        pytest.param({"t": entry("F4")}, "tensor 't': unknown or missing 'F4'", id="dtype"),
        pytest.param({"t": entry(["F32"])}, "tensor 't'", id="dtype-list"),
        pytest.param({"t": entry(shape=["1"])}, "tensor 't': damaged entry", id="size-text"),
        pytest.param({"t": entry(shape=[1.0])}, "tensor 't': damaged entry", id="size-float"),
        pytest.param({"t": entry(shape=[True])}, "tensor 't': damaged entry", id="size-bool"),
        pytest.param({"t": entry(shape=[-1, -1])}, "tensor 't': damaged entry", id="negative"),
        pytest.param({"t": entry(shape=[2])}, "tensor 't': 4 bytes for shape", id="too-large"),
        pytest.param({"t": entry(offsets=[4, 0])}, "tensor 't'", id="offsets-swapped"),
        pytest.param({"t": entry(offsets=[-4, 0])}, "tensor 't'", id="offset-negative"),
        pytest.param({"t": entry(offsets=[0, 4, 8])}, "tensor 't': damaged entry", id="3-offsets"),
        pytest.param({"t": entry(offsets=[8, 12])}, "tensor 't' ends at byte", id="past-the-end"),
        pytest.param(
            {"t": entry(shape=[10**30], offsets=[0, 4 * 10**30])}, "tensor 't' ends", id="huge"
        ),
        pytest.param(
            {"t": entry(shape=[2], offsets=[0, 8]), "u": entry(offsets=[4, 8])},
            "tensors 't' and 'u' overlap",
            id="overlap",
        ),
    ],
)
def test_a_lying_header_is_refused_by_file_and_tensor(tmp_path, header, message):
    folder = folder_of(tmp_path)
    write_shard(folder / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(InvalidDataError, match=message) as error:
        Checkpoint(folder)
    assert str(folder / "model.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "header of 0 bytes in a file of 0", id="empty"),
        pytest.param(b"\2\0\0", "not a safetensors file", id="three-bytes"),
        pytest.param((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors", id="huge"),
        pytest.param((3).to_bytes(8, "little") + b"{}", "not a safetensors", id="one-byte-short"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content, message):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidDataError, match=message):
        Checkpoint(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_harmless(tmp_path_factory, data):
    folder = folder_of(tmp_path_factory.mktemp("fuzz"), {"t": torch.ones(2, 3), "u": torch.ones(4)})
    shard = folder / "model.safetensors"
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    del content[len(content) - data.draw(st.integers(0, 40)) :]
    shard.write_bytes(bytes(content))
    try:
        checkpoint = Checkpoint(folder)
        for name, record in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == record.shape
    except InvalidDataError as error:
        assert str(shard) in str(error)


def test_a_file_cut_short_while_it_is_open_is_an_error_of_one_read(tmp_path):
    folder = folder_of(tmp_path)
    checkpoint = Checkpoint(folder)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(InvalidDataError, match=r"model\.safetensors: tensor 'fp32'.*truncated"):
        checkpoint.read("fp32")


def test_a_file_deleted_while_it_is_open_is_an_error_that_names_it(tmp_path):
    folder = folder_of(tmp_path)
    checkpoint = Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidDataError, match=r"model\.safetensors: tensor 'fp32'"):
        checkpoint.read("fp32")


def sharded(path: Path, weight_map: object, **shards) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, path / f"{name}.safetensors")
    index = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return path


def test_an_index_says_which_shard_holds_a_tensor(tmp_path):
    old, new = torch.zeros(2), torch.ones(2)
    folder = sharded(
        tmp_path,
        {"t": "a.safetensors", "u": "b.safetensors"},
        a={"t": new},
        b={"t": old, "u": new},
    )
    checkpoint = Checkpoint(folder)
    assert checkpoint.read("t").equal(new)
    assert checkpoint.tensors["t"].file == folder / "a.safetensors"
    assert checkpoint.files == [folder / "a.safetensors", folder / "b.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        pytest.param("{", "not a shard index", id="half-json"),
        pytest.param("[]", "not a shard index", id="a-list"),
        pytest.param("{}", "not a shard index", id="no-map"),
        pytest.param([], "not a shard index", id="map-list"),
        pytest.param({"t": 5}, "not a shard index", id="name-number"),
        pytest.param({"t": None}, "not a shard index", id="name-null"),
        pytest.param({}, "names no shard", id="empty"),
        pytest.param({"t": "../a.safetensors"}, "not a plain", id="dot-dot"),
        pytest.param({"t": "/a.safetensors"}, "not a plain", id="absolute"),
        pytest.param({"t": "sub/a.safetensors"}, "not a plain", id="folder"),
        pytest.param({"t": "a.bin"}, "not a plain", id="pickle"),
        pytest.param({"t": ""}, "not a plain", id="no-name"),
        pytest.param({"t": "gone.safetensors"}, "shard is missing", id="missing-shard"),
        pytest.param({"t": "nul\0.safetensors"}, "shard is missing", id="nul"),
        pytest.param({"absent": "a.safetensors"}, "tensor 'absent' is named in", id="no-tensor"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, message):
    folder = sharded(tmp_path, weight_map, a={"t": torch.ones(2)})
    with pytest.raises(InvalidDataError, match=message) as error:
        Checkpoint(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("is_relative", [True, False])
def test_shards_may_be_links_out_of_the_folder(tmp_path, is_relative):
    # The hub's cache keeps its files that way; what a link's owner may read is decided by the
    # system, while names in an index come from whoever made the model.
    blobs = folder_of(tmp_path / "blobs")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    target = Path("..") / "blobs" if is_relative else blobs
    (folder / "model.safetensors").symlink_to(target / "model.safetensors")
    assert Checkpoint(folder).read("fp32").equal(TENSORS["fp32"])


def test_a_link_to_nothing_is_a_missing_shard(tmp_path):
    folder = sharded(tmp_path, {"t": "a.safetensors"})
    (folder / "a.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidDataError, match="shard is missing"):
        Checkpoint(folder)


def test_a_pipe_in_a_shards_place_is_not_waited_for(tmp_path):
    folder = sharded(tmp_path, {"t": "a.safetensors"})
    os.mkfifo(folder / "a.safetensors")
    with pytest.raises(InvalidDataError, match="shard is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        pytest.param(["pytorch_model.bin"], UnsupportedModelError, "run code", id="pickle"),
        pytest.param(["model.pt"], UnsupportedModelError, "run code", id="pt"),
        pytest.param(["consolidated.00.pth"], UnsupportedModelError, "run code", id="pth"),
        pytest.param(["model.gguf"], UnsupportedModelError, "GGUF", id="gguf"),
        pytest.param(["model.gguf", "a.bin"], UnsupportedModelError, "GGUF", id="both"),
        pytest.param([], InvalidDataError, "neither model.safetensors nor", id="nothing"),
        pytest.param(["other.safetensors"], InvalidDataError, "neither", id="another-name"),
    ],
)
def test_other_weights_are_refused_unopened(tmp_path, files, kind, message):
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_bytes(b"not opened")
        (tmp_path / name).chmod(0)
    with pytest.raises(kind, match=message):
        Checkpoint(tmp_path)


def test_a_missing_folder_says_what_a_model_is(tmp_path):
    with pytest.raises(InvalidDataError, match="does not exist; give a folder"):
        Checkpoint(tmp_path / "gone")


def test_a_file_in_a_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidDataError, match="is not a folder"):
        Checkpoint(tmp_path / "file")


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(InvalidDataError, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_a_fingerprint_is_of_what_is_computed_and_of_nothing_else():
    config = {"hidden_size": 8, "torch_dtype": "bfloat16", "_name_or_path": "/a"}
    sums = {"t": 1, "u": 2}
    same = fingerprint(config, sums)
    assert same == fingerprint({**config, "_name_or_path": "/b", "torch_dtype": "x"}, sums)
    assert same == fingerprint(dict(reversed(config.items())), dict(reversed(sums.items())))
    others = [
        fingerprint({**config, "hidden_size": 9}, sums),
        fingerprint({**config, "more": None}, sums),
        fingerprint(config, {"t": 2, "u": 1}),
        fingerprint(config, {"t": 1}),
        fingerprint(config, {"t": 1, "v": 2}),
    ]
    assert len({same, *others}) == 6


def test_a_checksum_is_of_the_bytes():
    tensor = torch.arange(4.0)
    assert checksum(tensor) == checksum(tensor.reshape(2, 2))
    assert checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(torch.tensor(1.0)) == checksum(torch.ones(1))
    assert checksum(torch.zeros(1)) != checksum(-torch.zeros(1))
