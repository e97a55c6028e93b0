"""Trace folders: what is written is read back, damage is named, one writer at a time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from outrider.collect.errors import (
    CorruptShardError,
    DirectoryInUseError,
    OutOfSpaceError,
    ResumeError,
    TraceError,
)
from outrider.collect.trace import (
    Selection,
    ShardRows,
    TraceReader,
    TraceWriter,
    open_traces,
    read_manifest,
    shard,
)
from outrider.collect.trace.columns import SPLITS

WINDOW = 5


def _arrays(rng, shape, samples, *, vocabulary=50):
    rows = samples * WINDOW
    logits = rng.normal(size=(rows, shape.num_moe_layers, shape.num_experts))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    topk_ids = np.argsort(-log_probs, axis=-1)[..., : shape.top_k]
    return {
        "topk_ids": topk_ids,
        "topk_weights": np.take_along_axis(np.exp(log_probs), topk_ids, -1).astype(np.float16),
        "log_probs": log_probs,
        "token_id": rng.integers(0, vocabulary, rows),
        "split": np.repeat(rng.integers(0, 3, samples), WINDOW),
    }


@pytest.fixture
def folder(tmp_path, planted, rng):
    """Two data sets in five shards, and the arrays they were written from."""
    shape = planted.shape(layers=3, experts=9, top_k=2)
    parts = {"one": _arrays(rng, shape, 20), "two": _arrays(rng, shape, 13)}
    planted.write(tmp_path / "T", shape, parts, window=WINDOW, shard_samples=8)
    whole = {key: np.concatenate([part[key] for part in parts.values()]) for key in parts["one"]}
    whole["dataset"] = np.repeat(["one", "two"], [20 * WINDOW, 13 * WINDOW])
    return tmp_path / "T", whole


def _gathered(batches, name):
    return np.concatenate([getattr(batch, name) for batch in batches])


def test_rows_come_back_as_written(folder):
    directory, whole = folder
    reader = TraceReader(directory)
    batches = list(reader.batches())
    for name in ("topk_ids", "topk_weights", "token_id", "split"):
        np.testing.assert_array_equal(_gathered(batches, name), whole[name])
    log_probs = np.concatenate([batch.log_probs() for batch in batches])
    assert np.abs(log_probs - whole["log_probs"]).max() < 0.1
    np.testing.assert_array_equal(_gathered(batches, "sample_id"), np.repeat(np.arange(33), WINDOW))
    assert reader.num_tokens == sum(map(len, batches)) == len(whole["token_id"])
    assert reader.num_samples == sum(batch.num_samples for batch in batches) == 33
    reader.verify()


@pytest.mark.parametrize("datasets", [None, ["two"], ["one", "two"]], ids=str)
@pytest.mark.parametrize("splits", [None, ["test"], ["train", "validation"]], ids=str)
@pytest.mark.parametrize("layers", [None, [2, 0]], ids=str)
def test_a_selection_is_what_a_filter_by_hand_gives(folder, datasets, splits, layers):
    directory, whole = folder
    mask = np.isin(whole["dataset"], datasets or ["one", "two"])
    mask &= np.isin(whole["split"], [SPLITS.index(name) for name in splits or SPLITS])
    selection = Selection(datasets=datasets, splits=splits, layers=layers)
    batches = list(TraceReader(directory).batches(selection))
    assert all(len(batch) for batch in batches)
    expected = whole["topk_ids"][mask][:, layers or slice(None)]
    np.testing.assert_array_equal(_gathered(batches, "topk_ids"), expected)
    np.testing.assert_array_equal(_gathered(batches, "token_id"), whole["token_id"][mask])
    for batch in batches:
        assert set(np.diff(batch.sample_offsets)) == {WINDOW}


def test_records_are_the_per_layer_view(folder):
    directory, whole = folder
    records = list(TraceReader(directory).records(Selection(layers=[1, 2])))
    assert len(records) == 33 * 2
    for number, record in enumerate(records):
        sample, layer = number // 2, 1 + number % 2
        rows = slice(sample * WINDOW, (sample + 1) * WINDOW)
        assert (record.sample_id, record.layer_id) == (sample, layer)
        assert record.dataset_name == whole["dataset"][rows][0]
        np.testing.assert_array_equal(record.target_top_k, whole["topk_ids"][rows, layer])
        np.testing.assert_array_equal(record.token_ids, whole["token_id"][rows])
        np.testing.assert_allclose(
            record.target_routing, np.exp(whole["log_probs"][rows, layer]), rtol=0.1
        )
        assert record.hidden_states is None


def test_batches_hold_whole_samples_and_stay_small(tmp_path, planted, rng, monkeypatch):
    monkeypatch.setattr("outrider.collect.trace.encoding._ROW_GROUP_TOKENS", 17)
    shape = planted.shape()
    planted.write(tmp_path / "T", shape, {"one": _arrays(rng, shape, 40)}, window=WINDOW)
    batches = list(TraceReader(tmp_path / "T").batches())
    assert len(batches) > 10
    assert max(map(len, batches)) <= 17
    assert all(len(batch) == batch.num_samples * WINDOW for batch in batches)


def test_hidden_states_lie_beside_the_shards(tmp_path, planted, rng):
    shape = planted.shape(layers=3, hidden=6)
    described = planted.manifest(shape, {"one": 4}, window=WINDOW, hidden_layers=(1, 2))
    states = {layer: torch.randn(20, 6).bfloat16() for layer in (1, 2)}
    arrays = _arrays(rng, shape, 4)
    columns = planted.columns(shape, first_sample=0, window=WINDOW, dataset="one", **arrays)
    with TraceWriter(tmp_path / "T", described) as writer:
        writer.write_shard(ShardRows("one", 0, 4, 4, columns, states))
    reader = TraceReader(tmp_path / "T")
    held_out = Selection(hidden_layers=(2,), splits=["test", "validation"])
    mask = arrays["split"] > 0
    found = [batch.hidden[2] for batch in reader.batches(held_out)]
    assert torch.equal(torch.cat(found), states[2][torch.from_numpy(mask)])
    record = next(reader.records(Selection(hidden_layers=(1,), layers=[1])))
    assert torch.equal(record.hidden_states, states[1][:WINDOW])
    with pytest.raises(TraceError, match=r"layers \[0\] were not recorded; recorded are \[1, 2\]"):
        next(reader.batches(Selection(hidden_layers=(0,))))
    sidecar = next((tmp_path / "T" / "hidden").iterdir())
    sidecar.write_bytes(sidecar.read_bytes()[:-7])
    with pytest.raises(CorruptShardError, match=sidecar.name):
        list(reader.batches(held_out))


@pytest.mark.parametrize("share", [0.04, 0.25, 0.5, 0.9, 1.0, 7.0])
def test_a_share_of_the_samples_is_spread_over_all_of_them(folder, share):
    reader = TraceReader(folder[0])
    whole = {int(one): len(rows) for one, rows in _by_sample(reader.batches())}
    kept = {int(one): len(rows) for one, rows in _by_sample(reader.batches(Selection(share=share)))}
    assert len(kept) == int(min(share, 1.0) * len(whole))
    assert all(whole[one] == length for one, length in kept.items())
    gaps = np.diff([-1, *kept, len(whole)])
    assert gaps.max() <= np.ceil(1 / share) + 1


def _by_sample(batches):
    for batch in batches:
        for start, end in zip(batch.sample_offsets[:-1], batch.sample_offsets[1:], strict=True):
            yield batch.sample_id[start], batch.token_id[start:end]


def test_selections_that_cannot_be_met_are_refused(folder):
    reader = TraceReader(folder[0])
    with pytest.raises(TraceError, match=r"no data set three.*it has one, two"):
        next(reader.batches(Selection(datasets=["three"])))
    with pytest.raises(TraceError, match="there are train, validation, test"):
        next(reader.batches(Selection(splits=["dev"])))
    with pytest.raises(TraceError, match="there are 0 to 2"):
        next(reader.batches(Selection(layers=[3])))
    with pytest.raises(TraceError, match="without router log-probabilities"):
        next(reader.batches(Selection(log_probs=False))).log_probs()


def _flip_a_page(path, group=0):
    raw = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(group % metadata.num_row_groups).column(8)
    start = column.dictionary_page_offset or column.data_page_offset
    end = start + column.total_compressed_size
    middle = column.data_page_offset + (end - column.data_page_offset) * 3 // 4
    raw[middle] ^= 0x40
    path.write_bytes(raw)


def _cut_the_footer(path):
    path.write_bytes(path.read_bytes()[:-9])


def _rewrite(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def _other_version(table):
    described = json.loads(table.schema.metadata[b"outrider"]) | {"schema_version": 7}
    return table.replace_schema_metadata({b"outrider": json.dumps(described).encode()})


DAMAGE = {
    "corrupted-page": (_flip_a_page, "row group 0"),
    "missing-footer": (_cut_the_footer, "damaged"),
    "empty-file": (lambda path: path.write_bytes(b""), "damaged"),
    "missing-file": (lambda path: path.unlink(), "not there"),
    "foreign-parquet": (
        lambda path: pq.write_table(pa.table({"a": [1]}), path),
        "not a trace shard",
    ),
    "wrong-schema-version": (lambda path: _rewrite(path, _other_version), "schema version 7"),
    "missing-column": (
        lambda path: _rewrite(path, lambda table: table.drop_columns(["token_id"])),
        "column 'token_id' is missing",
    ),
    "wrong-type": (
        lambda path: _rewrite(
            path,
            lambda table: table.set_column(
                6, pa.field("token_id", pa.int64()), table["token_id"].cast(pa.int64())
            ),
        ),
        "column 'token_id' is int64",
    ),
    "rows-lost": (lambda path: _rewrite(path, lambda table: table.slice(3)), "the manifest says"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_is_named_and_skipped_only_on_request(folder, case):
    directory, whole = folder
    damage, reason = DAMAGE[case]
    path = directory / "shards" / "00000008-one.parquet"
    damage(path)
    with pytest.raises(CorruptShardError, match=reason) as caught:
        list(TraceReader(directory).batches())
    assert path.name in str(caught.value)
    with pytest.raises(CorruptShardError, match=path.name):
        TraceReader(directory).verify()
    lenient = TraceReader(directory, skip_bad=True)
    kept = _gathered(list(lenient.batches()), "token_id")
    left = np.r_[0 : 8 * WINDOW, 16 * WINDOW : 33 * WINDOW]
    np.testing.assert_array_equal(kept, whole["token_id"][left])
    assert list(lenient.skipped) == ["shards/00000008-one.parquet"]


def test_a_shard_damaged_at_its_end_is_left_out_whole(tmp_path, planted, rng, monkeypatch):
    monkeypatch.setattr("outrider.collect.trace.encoding._ROW_GROUP_TOKENS", 20)
    shape = planted.shape()
    parts = {"one": _arrays(rng, shape, 32)}
    planted.write(tmp_path / "T", shape, parts, window=WINDOW, shard_samples=16)
    path = tmp_path / "T" / "shards" / "00000000-one.parquet"
    _flip_a_page(path, group=-1)
    strict = TraceReader(tmp_path / "T").batches()
    assert len(next(strict)) == 20  # its beginning is sound
    with pytest.raises(CorruptShardError):
        list(strict)
    lenient = TraceReader(tmp_path / "T", skip_bad=True)
    kept = _gathered(list(lenient.batches()), "sample_id")
    assert kept.min() == 16 and len(kept) == 16 * WINDOW


def test_a_huge_row_group_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(shard, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(CorruptShardError, match="more than 100"):
        next(TraceReader(folder[0]).batches())


def test_expert_ids_beyond_the_model_are_damage(tmp_path, planted):
    shape = planted.shape(experts=8)
    ids = np.full((WINDOW, 2, 2), 8)
    planted.write(tmp_path / "T", shape, {"one": {"topk_ids": ids}}, window=WINDOW)
    with pytest.raises(CorruptShardError, match="expert 8 of 8"):
        next(TraceReader(tmp_path / "T").batches())


def test_a_folder_without_a_manifest_or_of_another_schema_is_refused(tmp_path, folder):
    with pytest.raises(TraceError, match="not a trace folder"):
        TraceReader(tmp_path / "nothing")
    path = folder[0] / "manifest.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"schema_version": 99}))
    with pytest.raises(TraceError, match="schema version 99"):
        TraceReader(folder[0])
    path.write_text(json.dumps(described | {"surprise": 1}))
    with pytest.raises(TraceError, match="surprise"):
        TraceReader(folder[0])
    path.write_text("{")
    with pytest.raises(TraceError, match="not a valid manifest"):
        TraceReader(folder[0])


def test_traces_of_two_models_are_not_mixed(tmp_path, planted, rng):
    for name, experts in (("A", 8), ("B", 16)):
        shape = planted.shape(experts=experts)
        arrays = _arrays(rng, shape, 2)
        planted.write(tmp_path / name, shape, {"one": arrays}, window=WINDOW)
    with pytest.raises(TraceError, match="num_experts is 8 and 16"):
        open_traces([tmp_path / "A", tmp_path / "B"])
    assert len(open_traces([tmp_path / "A", tmp_path / "A"])) == 2


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, planted):
    described = planted.manifest(planted.shape(), {"one": 4}, window=WINDOW)
    holder = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from outrider.collect.trace.writer import lock_directory
        lock = lock_directory(Path(sys.argv[1]))
        print("held", flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "T")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(DirectoryInUseError, match="another collector"):
            TraceWriter(tmp_path / "T", described)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with TraceWriter(tmp_path / "T", described) as writer:
        with pytest.raises(DirectoryInUseError):
            TraceWriter(tmp_path / "T", described, resume=True)
        assert writer.manifest.num_finished == 0


def test_resume_names_every_difference(tmp_path, planted):
    shape = planted.shape()
    with TraceWriter(tmp_path / "T", planted.manifest(shape, {"one": 4}, window=WINDOW)):
        pass
    with pytest.raises(ResumeError, match="already holds traces"):
        TraceWriter(tmp_path / "T", planted.manifest(shape, {"one": 4}, window=WINDOW))
    other = planted.shape(experts=16)
    changed = planted.manifest(other, {"one": 5}, window=WINDOW, seed=3, dtype="bfloat16")
    with pytest.raises(ResumeError) as caught:
        TraceWriter(tmp_path / "T", changed, resume=True)
    for difference in (
        "seed: 0, now 3",
        "dtype: 'float32', now 'bfloat16'",
        "shape.num_experts: 8, now 16",
        "traces of one: 4, now 5",
    ):
        assert difference in str(caught.value)
    renamed = planted.manifest(shape, {"two": 4}, window=WINDOW)
    with pytest.raises(ResumeError, match="datasets: one, now two"):
        TraceWriter(tmp_path / "T", renamed, resume=True)


def test_resume_keeps_batch_size_and_threads_of_the_first_run(tmp_path, planted):
    shape = planted.shape()
    with TraceWriter(tmp_path / "T", planted.manifest(shape, {"one": 4}, window=WINDOW)):
        pass
    other = planted.manifest(shape, {"one": 4}, window=WINDOW, batch_size=32, threads=7)
    with TraceWriter(tmp_path / "T", other, resume=True) as writer:
        assert (writer.manifest.batch_size, writer.manifest.threads) == (4, 1)


def test_what_a_killed_writer_left_is_swept(folder, planted):
    directory, _ = folder
    unlisted = directory / "shards" / "00099-one.parquet"
    unlisted.write_bytes(b"half a shard")
    temporary = directory / "shards" / ".00098-one.parquet.x.tmp"
    temporary.write_bytes(b"less")
    before = read_manifest(directory)
    with TraceWriter(directory, before, resume=True):
        pass
    assert not unlisted.exists() and not temporary.exists()
    TraceReader(directory).verify()
    assert read_manifest(directory) == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_death_before_any_step_of_a_commit_leaves_old_or_new(tmp_path, planted, rng):
    """A child dies before its n-th call that changes the disk, for every n, as kill -9 would."""
    shape = planted.shape(hidden=3)
    described = planted.manifest(shape, {"one": 4}, window=WINDOW, hidden_layers=(1,))
    states = {1: torch.ones(2 * WINDOW, 3)}
    shards = [
        ShardRows(
            "one", first, 2, 4,
            planted.columns(
                shape, first_sample=first, window=WINDOW, dataset="one", **_arrays(rng, shape, 2)
            ),
            states,
        )
        for first in (0, 2)
    ]  # fmt: skip
    seen = set()
    for dies_before in range(1, 200):
        directory = tmp_path / str(dies_before)
        with TraceWriter(directory, described) as writer:
            writer.write_shard(shards[0])
        child = os.fork()
        if not child:
            _die_before(dies_before)
            with TraceWriter(directory, described, resume=True) as writer:
                writer.write_shard(shards[1])
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        reader = TraceReader(directory)
        reader.verify()
        seen.add(reader.num_samples)
        batches = list(reader.batches(Selection(hidden_layers=(1,))))
        assert sum(map(len, batches)) == reader.num_tokens == reader.num_samples * WINDOW
        with TraceWriter(directory, described, resume=True) as writer:
            if writer.manifest.num_finished == 2:
                writer.write_shard(shards[1])
        assert not list(directory.rglob("*.tmp"))
        assert TraceReader(directory).num_samples == 4
        if not died:
            break
    assert dies_before > 12 and seen == {2, 4}


def _die_before(number):
    """Make this process vanish before its `number`-th call of what changes files."""
    left = [number]

    def guarded(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"), (os, "open"), (os, "fdopen"), (tempfile, "mkstemp"),
        (Path, "replace"), (Path, "chmod"), (Path, "unlink"), (Path, "mkdir"),
    ):  # fmt: skip
        setattr(module, name, guarded(getattr(module, name)))


def test_shards_come_in_any_order_but_only_planned_and_only_once(tmp_path, planted, rng):
    shape = planted.shape()
    described = planted.manifest(shape, {"one": 4, "two": 2}, window=WINDOW)

    def rows(first, count, dataset="one"):
        arrays = _arrays(rng, shape, count)
        columns = planted.columns(
            shape, first_sample=first, window=WINDOW, dataset=dataset, **arrays
        )
        return ShardRows(dataset, first, count, 4, columns, {})

    with TraceWriter(tmp_path / "T", described) as writer:
        writer.write_shard(rows(2, 2))
        before = sorted((tmp_path / "T").rglob("*"))
        for again in (rows(2, 2), rows(1, 2), rows(3, 1)):
            with pytest.raises(TraceError, match="finished already"):
                writer.write_shard(again)
        for stray in (rows(4, 1), rows(3, 2), rows(0, 2, "two"), rows(6, 1, "two")):
            with pytest.raises(TraceError, match="not planned"):
                writer.write_shard(stray)
        assert sorted((tmp_path / "T").rglob("*")) == before
        writer.write_shard(rows(4, 2, "two"))
        writer.write_shard(rows(0, 2))
    assert [shard.first_sample for shard in read_manifest(tmp_path / "T").shards] == [0, 2, 4]
    seen = [batch.sample_id for batch in TraceReader(tmp_path / "T").batches()]
    assert np.concatenate(seen).tolist() == np.repeat(np.arange(6), WINDOW).tolist()


def test_a_full_disk_keeps_finished_shards_and_says_what_is_needed(tmp_path, planted):
    """The file size limit of a child stands for the full disk: the write fails half way."""
    program = textwrap.dedent(
        f"""
        import resource, signal, sys, importlib.util
        from pathlib import Path
        import numpy as np
        spec = importlib.util.spec_from_file_location("planted", {planted.__file__!r})
        planted = importlib.util.module_from_spec(spec); spec.loader.exec_module(planted)
        from outrider.collect.errors import OutOfSpaceError
        from outrider.collect.trace import ShardRows, TraceWriter
        shape = planted.shape(experts=64)
        described = planted.manifest(shape, {{"one": 400}}, window=5, probabilities="none")
        rng = np.random.default_rng(0)
        with TraceWriter(Path(sys.argv[1]), described) as writer:
            for first in (0, 200):
                ids = rng.integers(0, 64, (1000, 2, 2))
                tokens = rng.integers(0, 2**31, 1000)
                rows = planted.columns(shape, ids, first_sample=first, window=5, dataset="one",
                                       token_id=tokens)
                if first:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
                try:
                    writer.write_shard(ShardRows("one", first, 200, 4, rows, {{}}))
                except OutOfSpaceError as error:
                    print(error, error.exit_code)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "T")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "the disk is full" in done.stdout and "200 finished samples are kept" in done.stdout
    assert done.stdout.strip().endswith(" 1")
    reader = TraceReader(tmp_path / "T")
    reader.verify()
    assert reader.num_samples == 200
    needed = int(done.stdout.split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert needed == reader.nbytes
    assert [path.name for path in (tmp_path / "T" / "shards").iterdir()] == ["00000000-one.parquet"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, planted):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutOfSpaceError, match="writing failed"):
        TraceWriter(tmp_path / "file" / "T", planted.manifest(planted.shape(), {"a": 1}, window=1))


def test_shards_open_in_pandas_as_they_are(folder):
    pandas = pytest.importorskip("pandas")
    directory, whole = folder
    frame = pandas.read_parquet(directory / "shards")
    assert len(frame) == len(whole["token_id"])
    assert set(frame["split"]) <= set(SPLITS)
    ids = np.stack(frame.sort_values(["sample_id", "position"])["topk_ids"].to_list())
    np.testing.assert_array_equal(ids, whole["topk_ids"].reshape(len(ids), -1))
    assert frame["topk_weights"].iloc[0].dtype == np.float16


def test_shards_open_in_duckdb_as_they_are(folder):
    duckdb = pytest.importorskip("duckdb")
    directory, whole = folder
    rows = duckdb.sql(
        f"select dataset_name, count(*), sum(topk_ids[1]) from '{directory}/shards/*.parquet' "
        "group by 1 order by 1"
    ).fetchall()
    expected = [
        (name, int(mask.sum()), int(whole["topk_ids"][mask, 0, 0].sum()))
        for name in ("one", "two")
        for mask in [whole["dataset"] == name]
    ]
    assert rows == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_shards_open_in_datasets_as_they_are(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    directory, whole = folder
    files = sorted(str(path) for path in (directory / "shards").iterdir())
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == len(whole["token_id"])
    np.testing.assert_array_equal(loaded["token_id"][:], whole["token_id"])
    np.testing.assert_array_equal(loaded[7]["topk_ids"], whole["topk_ids"][7].reshape(-1))
