"""The expert store as a reader meets it: what round-trips, what is aligned, what is refused."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import msgspec
import pytest
import safetensors
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.kernels.quantization import FORMATS, dequantize, quantize
from outrider.runtime.errors import InvalidDataError
from outrider.runtime.experts.index import StoreIndex, read_index, write_index
from outrider.runtime.experts.store import ExpertStore

from .store_child import SHAPE, Checkpoint, pack

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_block(store: ExpertStore, key: ExpertKey) -> bytes:
    (extent,) = store.layout(key).extents
    with extent.file.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.length)


def read_expert(store: ExpertStore, key: ExpertKey) -> dict[str, Tensor]:
    block = torch.frombuffer(bytearray(read_block(store, key)), dtype=torch.uint8)
    return {
        name: block[view.offset : view.offset + view.nbytes].view(view.dtype).view(view.shape)
        for name, view in store.views.items()
    }


def projection_parts(expert: dict[str, Tensor], projection: str) -> dict[str, Tensor]:
    named = {name: t for name, t in expert.items() if name.partition(".")[0] == projection}
    return {name.partition(".")[2] or "weight": tensor for name, tensor in named.items()}


def all_keys(shape: ModelShape) -> list[ExpertKey]:
    return [
        ExpertKey(layer, expert)
        for layer in range(shape.num_moe_layers)
        for expert in range(shape.num_experts)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["from-fp32", "from-bf16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_packed_experts_are_the_quantised_source(
    tmp_path: Path, fmt: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint(dtype=dtype, has_bias=True)
    store = pack(tmp_path / "store", checkpoint, fmt=fmt)
    assert (store.format, store.path) == (fmt, tmp_path / "store")
    for key in all_keys(SHAPE):
        expert, source = read_expert(store, key), checkpoint.tensors(key.layer_idx)
        for projection in ("gate_up_proj", "down_proj"):
            original = source[projection][key.expert_idx]
            size = (original.shape[0], original.shape[1])
            expected = dequantize(quantize(original, fmt), fmt, dtype=torch.float32, shape=size)
            parts = projection_parts(expert, projection)
            decoded = dequantize(parts, fmt, dtype=torch.float32, shape=size)
            assert torch.equal(decoded, expected)
            # Near the source itself too, so that a shared mistake of both sides would show.
            if fmt in PLAIN:
                assert torch.equal(decoded, original.to(PLAIN[fmt]).float())
            else:
                error = (decoded - original.float()).norm() / original.float().norm()
                assert error < {"int8": 0.01, "int4": 0.13, "nf4": 0.13}[fmt]
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            assert expert[name].dtype == dtype
            assert torch.equal(expert[name], source[name][key.expert_idx])


def test_transposed_projections_are_stored_output_by_input(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    plain = pack(tmp_path / "plain", checkpoint)

    def layers(layer_idx: int) -> dict[str, Tensor]:
        return {name: t.mT.contiguous() for name, t in checkpoint.tensors(layer_idx).items()}

    transposed = pack(tmp_path / "transposed", layers=layers, is_transposed=True)
    assert transposed.index.shards == plain.index.shards  # checksums and all


def test_ungated_experts_have_an_up_projection(tmp_path: Path) -> None:
    def layers(layer_idx: int) -> dict[str, Tensor]:
        tensors = Checkpoint().tensors(layer_idx)
        tensors["up_proj"] = tensors.pop("gate_up_proj")[:, : SHAPE.expert_size]
        return tensors

    store = pack(tmp_path / "store", layers=layers, fmt="bf16")
    up_proj = read_expert(store, ExpertKey(1, 2))["up_proj"]
    assert torch.equal(up_proj, layers(1)["up_proj"][2].bfloat16())
    assert "gate_up_proj" not in store.views


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 5),
    hidden_size=st.integers(1, 150),
    expert_size=st.integers(1, 150),
    has_bias=st.booleans(),
    fmt=st.sampled_from(FORMATS),
    max_shard_bytes=st.sampled_from([1, 9000, 2**30]),
)
def test_every_block_is_aligned_in_its_file_and_padded(
    tmp_path_factory: pytest.TempPathFactory,
    num_experts: int,
    hidden_size: int,
    expert_size: int,
    has_bias: bool,
    fmt: str,
    max_shard_bytes: int,
) -> None:
    if fmt == "nf4":
        expert_size += hidden_size * expert_size % 2  # two weights a byte
    shape = ModelShape(2, num_experts, 1, hidden_size, expert_size, "")
    out = tmp_path_factory.mktemp("store")
    store = pack(
        out, Checkpoint(shape, has_bias=has_bias), fmt=fmt, max_shard_bytes=max_shard_bytes
    )
    spans: dict[Path, list[int]] = {}
    for key in all_keys(shape):
        layout = store.layout(key)
        layout.check()
        (extent,) = layout.extents
        assert extent.offset % 4096 == 0 and extent.length % 4096 == 0
        assert extent.length == store.nbytes == layout.nbytes
        assert extent.offset + extent.length <= extent.file.stat().st_size
        spans.setdefault(extent.file, []).append(extent.offset)
        block = bytearray(read_block(store, key))
        assert xxhash.xxh3_64_intdigest(bytes(block)) == store.checksum(key)
        for view in store.views.values():
            block[view.offset : view.offset + view.nbytes] = bytes(view.nbytes)
        assert not any(block), "padding holds something"
        assert all(view.offset % 64 == 0 for view in store.views.values())
    for offsets in spans.values():
        assert len(set(offsets)) == len(offsets)
    shutil.rmtree(out)


def test_the_safetensors_library_reads_the_shards(tmp_path: Path) -> None:
    store = pack(tmp_path / "store", Checkpoint(has_bias=True))
    seen = []
    for path in sorted((tmp_path / "store").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["fingerprint"] == store.source.fingerprint
            for name in file.keys():  # noqa: SIM118 (not a dict)
                layer_idx, expert_idx = re.fullmatch(
                    r"layers\.(\d+)\.experts\.(\d+)", name
                ).groups()
                key = ExpertKey(int(layer_idx), int(expert_idx))
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.uint8
                assert tensor.numpy().tobytes() == read_block(store, key)
                seen.append(key)
    assert sorted(seen) == all_keys(SHAPE)


def test_an_expert_that_the_model_lacks_is_a_key_error(tmp_path: Path) -> None:
    store = pack(tmp_path / "store")
    with pytest.raises(KeyError):
        store.layout(ExpertKey(0, SHAPE.num_experts))
    with pytest.raises(KeyError):
        store.checksum(ExpertKey(SHAPE.num_moe_layers, 0))


def test_a_moved_store_is_the_same_store(tmp_path: Path) -> None:
    pack(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "moved")
    store = ExpertStore(tmp_path / "moved")
    assert store.verify() == []
    assert read_block(store, ExpertKey(0, 0))


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return pack(tmp_path / "store")


def refusal(path: Path) -> str:
    with pytest.raises(InvalidDataError) as caught:
        ExpertStore(path)
    return str(caught.value)


SECOND = "experts-00000-001.safetensors"
THIRD = "experts-00001-000.safetensors"


@pytest.mark.parametrize("size", [0, 7, 4000, 4096, 5000, 8192])
def test_a_truncated_shard_is_refused(store: ExpertStore, size: int) -> None:
    os.truncate(store.path / THIRD, size)
    message = refusal(store.path)
    assert THIRD in message and "cut short" in message
    if size >= 4096:
        assert f"layers.1.experts.{(size - 4096) // 4096}" in message


def test_a_shard_that_grew_is_refused(store: ExpertStore) -> None:
    with (store.path / THIRD).open("ab") as file:
        file.write(b"x")
    assert THIRD in refusal(store.path)


def test_a_missing_shard_is_refused(store: ExpertStore) -> None:
    (store.path / SECOND).unlink()
    assert re.search(f"{SECOND} is missing", refusal(store.path))


def test_a_shard_that_is_no_file_is_refused(store: ExpertStore) -> None:
    (store.path / SECOND).unlink()
    (store.path / SECOND).mkdir()
    assert SECOND in refusal(store.path)


def test_swapped_shards_are_refused(store: ExpertStore, tmp_path: Path) -> None:
    first, other = store.path / "experts-00000-000.safetensors", store.path / THIRD
    first.rename(tmp_path / "aside")
    other.rename(first)
    (tmp_path / "aside").rename(other)
    message = refusal(store.path)
    assert first.name in message
    assert "layers.0.experts.0" in message and "layers.1.experts.0" in message


def test_a_shard_of_another_store_is_refused(store: ExpertStore, tmp_path: Path) -> None:
    source = msgspec.structs.replace(store.source, fingerprint="0" * 64)
    other = pack(tmp_path / "other", Checkpoint(seed=1), source=source)
    shutil.copy(other.path / THIRD, store.path / THIRD)
    message = refusal(store.path)
    assert THIRD in message and "another store" in message and "0" * 64 in message


def rewrite_header(path: Path, change) -> None:
    """Change a shard's header table and leave its length, and so its data, where they were."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    change(table)
    text = json.dumps(table, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(raw[:8] + text + raw[8 + length :])


LIES = {
    "dtype": lambda t: t["layers.1.experts.1"].update(dtype="I8"),
    "offsets": lambda t: t["layers.1.experts.1"].update(data_offsets=[0, 4096]),
    "shape": lambda t: t["layers.1.experts.1"].update(shape=[4095]),
    "gone": lambda t: t.pop("layers.1.experts.1"),
    "renamed": lambda t: t.update({"layers.1.experts.9": t.pop("layers.1.experts.1")}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_naming_file_and_tensor(store: ExpertStore, lie: str) -> None:
    rewrite_header(store.path / THIRD, LIES[lie])
    message = refusal(store.path)
    assert THIRD in message and "layers.1.experts.1" in message


def test_an_added_tensor_is_refused(store: ExpertStore) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [8192, 8192]}
    rewrite_header(store.path / THIRD, lambda table: table.update({"layers.1.experts.7": entry}))
    message = refusal(store.path)
    assert THIRD in message and "layers.1.experts.7" in message


@pytest.mark.parametrize(
    "head",
    [b"\xff" * 8, struct.pack("<Q", 10**7), b"\0" * 8, struct.pack("<Q", 4)],
    ids=["2^64", "beyond-the-file", "empty", "cut-json"],
)
def test_a_header_of_an_impossible_length_is_refused(store: ExpertStore, head: bytes) -> None:
    with (store.path / THIRD).open("r+b") as file:
        file.write(head)
    message = refusal(store.path)
    assert THIRD in message and "header" in message


@settings(max_examples=30, deadline=None)
@given(bit=st.integers(0, 4096 * 8 - 1))
def test_a_flipped_bit_in_a_header_is_refused(header_store: ExpertStore, bit: int) -> None:
    path = header_store.path / THIRD
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        assert THIRD in refusal(header_store.path)
    finally:
        path.write_bytes(sound)


@pytest.fixture(scope="module")
def header_store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(tmp_path_factory.mktemp("header") / "store")


def test_verify_names_exactly_the_damaged_experts(store: ExpertStore) -> None:
    told: list[tuple[int, int]] = []
    assert store.verify(lambda *counts: told.append(counts)) == []
    assert told == [(done, 6) for done in range(1, 7)]
    damaged = [ExpertKey(0, 1), ExpertKey(1, 2)]
    for key in damaged:
        (extent,) = store.layout(key).extents
        with extent.file.open("r+b") as file:
            file.seek(extent.offset + extent.length - 1)  # padding is covered as well
            file.write(b"\x01")
    reopened = ExpertStore(store.path)  # values are not looked at when a store is opened
    assert reopened.verify() == damaged


def test_verify_finds_a_shard_replaced_by_another_with_the_same_header(
    store: ExpertStore, tmp_path: Path
) -> None:
    other = pack(tmp_path / "other", Checkpoint(seed=1))
    shutil.copy(other.path / THIRD, store.path / THIRD)
    assert ExpertStore(store.path).verify() == [ExpertKey(1, 0), ExpertKey(1, 1)]


def test_verify_counts_what_cannot_be_read_as_damaged(store: ExpertStore) -> None:
    os.truncate(store.path / "experts-00001-000.safetensors", 4096 + 100)
    (store.path / SECOND).unlink()
    assert store.verify() == [ExpertKey(0, 2), ExpertKey(1, 0), ExpertKey(1, 1)]


def test_no_store_is_refused_saying_what_is_missing(tmp_path: Path) -> None:
    assert "index.json is missing" in refusal(tmp_path)
    assert "index.json is missing" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "index.json is missing" in refusal(tmp_path / "file")


def test_an_index_edited_by_hand_is_refused(store: ExpertStore) -> None:
    path = store.path / "index.json"
    raw = path.read_bytes()
    edits = {
        "value": raw.replace(b'"top_k":2', b'"top_k":1'),
        "checksum": re.sub(rb'"[0-9a-f]{16}"\]', b'"0123456789abcdef"]', raw, count=1),
        "field": raw.replace(b'{"kind"', b'{"note":"mine","kind"'),
        "spacing": raw.replace(b'"top_k":2', b'"top_k": 2'),
        "truncated": raw[:-20],
        "empty": b"",
        "seal": raw.replace(b'"sha256":"', b'"sha256":"00'),
    }
    for name, edited in edits.items():
        assert edited != raw, name
        path.write_bytes(edited)
        assert "index.json" in refusal(store.path), name
    path.write_bytes(raw)
    assert ExpertStore(store.path).verify() == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_the_index_is_refused(
    header_store: ExpertStore, data: st.DataObject
) -> None:
    path = header_store.path / "index.json"
    raw = path.read_bytes()
    bit = data.draw(st.integers(0, (len(raw) - 1) * 8 - 1))
    damaged = bytearray(raw)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        assert "index.json" in refusal(header_store.path)
    finally:
        path.write_bytes(raw)


def change(index: StoreIndex, **fields) -> StoreIndex:
    return msgspec.structs.replace(index, **fields)


def change_view(index: StoreIndex, name: str, **fields) -> StoreIndex:
    view = msgspec.structs.replace(index.views[name], **fields)
    return change(index, views=index.views | {name: view})


def change_shard(index: StoreIndex, position: int, **fields) -> StoreIndex:
    shards = list(index.shards)
    shards[position] = msgspec.structs.replace(shards[position], **fields)
    return change(index, shards=tuple(shards))


def change_block(index: StoreIndex, position: int, block_position: int, **fields) -> StoreIndex:
    blocks = list(index.shards[position].blocks)
    blocks[block_position] = msgspec.structs.replace(blocks[block_position], **fields)
    return change_shard(index, position, blocks=tuple(blocks))


CONTRADICTIONS = {
    "schema": (lambda i: change(i, schema=2), "schema version 2"),
    "format": (lambda i: change(i, format="int3"), "int3"),
    "other-format": (lambda i: change(i, format="nf4"), "gate_up_proj"),
    "block-bytes": (lambda i: change(i, block_bytes=4000), "block_bytes"),
    "shape": (lambda i: change(i, shape=msgspec.structs.replace(i.shape, top_k=0)), "top_k"),
    "hidden": (
        lambda i: change(i, shape=msgspec.structs.replace(i.shape, hidden_size=25)),
        "gate_up_proj",
    ),
    "no-down": (
        lambda i: change(i, views={k: v for k, v in i.views.items() if k != "down_proj"}),
        "down_proj",
    ),
    "no-scale": (
        lambda i: change(i, views={k: v for k, v in i.views.items() if "scale" not in k}),
        "gate_up_proj.scale",
    ),
    "dtype": (lambda i: change_view(i, "down_proj", dtype="complex64"), "complex64"),
    "view-overlap": (lambda i: change_view(i, "down_proj", offset=64), "down_proj"),
    "view-beyond": (lambda i: change_view(i, "down_proj", offset=4096), "down_proj"),
    "view-negative": (lambda i: change_view(i, "down_proj", offset=-64), "down_proj"),
    "view-unaligned": (lambda i: change_view(i, "down_proj", offset=3001), "down_proj"),
    "path": (lambda i: change_shard(i, 0, file="../evil.safetensors"), "evil"),
    "absolute": (lambda i: change_shard(i, 0, file="/etc/passwd"), "passwd"),
    "shard-twice": (lambda i: change(i, shards=(*i.shards, i.shards[0])), "twice"),
    "shard-gone": (lambda i: change(i, shards=i.shards[:-1]), "layers.1.experts.2"),
    "shard-empty": (lambda i: change_shard(i, 1, blocks=()), SECOND),
    "shard-size": (lambda i: change_shard(i, 1, nbytes=4096), SECOND),
    "key-twice": (lambda i: change_block(i, 0, 1, expert_idx=0), "layers.0.experts.0"),
    "key-beyond": (lambda i: change_block(i, 0, 1, expert_idx=3), "layers.0.experts.3"),
    "key-negative": (lambda i: change_block(i, 0, 1, layer_idx=-1), "layers.-1.experts.1"),
    "key-moved": (lambda i: change_block(i, 2, 0, layer_idx=0), "layers.0.experts.0"),
    "offset": (lambda i: change_block(i, 0, 1, offset=4096), "layers.0.experts.1"),
    "offset-unaligned": (lambda i: change_block(i, 0, 1, offset=8191), "layers.0.experts.1"),
    "first-offset": (lambda i: change_block(i, 1, 0, offset=8192), SECOND),
    "checksum": (lambda i: change_block(i, 0, 1, xxh3_64="xyz"), "xyz"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_sealed_index_that_contradicts_itself_is_refused(store: ExpertStore, name: str) -> None:
    distort, named = CONTRADICTIONS[name]
    write_index(store.path / "index.json", distort(read_index(store.path / "index.json")))
    message = refusal(store.path)
    assert "index.json" in message and named in message


def test_an_index_whose_data_would_begin_elsewhere_is_refused(store: ExpertStore) -> None:
    index = store.index
    (block,) = index.shards[1].blocks
    moved = msgspec.structs.replace(block, offset=block.offset + 4096)
    shard = msgspec.structs.replace(
        index.shards[1], blocks=(moved,), nbytes=index.shards[1].nbytes + 4096
    )
    shards = (index.shards[0], shard, *index.shards[2:])
    write_index(store.path / "index.json", change(index, shards=shards))
    message = refusal(store.path)
    assert SECOND in message and "layers.0.experts.2" in message
