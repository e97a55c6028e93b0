"""A collection from end to end on a toy model: resume, kill, memory, determinism."""

import json
import os
import random
import signal
import sys
import time
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from outrider.collect import CollectSettings, TraceReader, collect
from outrider.collect.collection import Progress
from outrider.collect.devices import CPU_BATCH_SIZE, batch_size_for, device_memory
from outrider.collect.diversity import Diversity
from outrider.collect.errors import CollectError, OutOfMemoryError, ResumeError
from outrider.collect.schema import ModelShape
from outrider.collect.settings import estimate_bytes, hidden_layers
from outrider.collect.trace import Selection, read_manifest

GIB = 1 << 30


@pytest.fixture
def run(toy, tmp_path):
    """Collect into `tmp_path / name`, 50 traces of two data sets, with changes."""

    def runner(name="T", *, model=None, tokenizer=None, corpora=None, shape=None, **changes):
        options = {
            "resume": changes.pop("resume", False),
            "progress": changes.pop("progress", None),
            "kernels": changes.pop("kernels", "torch"),
        }
        settings = {
            "traces": 50,
            "context_tokens": 24,
            "batch_size": 4,
            "seed": 5,
            "samples_per_shard": 8,
        }
        return collect(
            model or toy.ToyMoe(),
            tokenizer or toy.WordTokenizer(),
            corpora
            or [
                toy.corpus("alpha", documents=40, words=70),
                toy.corpus("beta", documents=30, words=18),
            ],
            shape=shape or toy.SHAPE,
            out=tmp_path / name,
            settings=CollectSettings(**(settings | changes)),
            model_name="toy",
            model_format="fp32",
            **options,
        )

    return runner


def _shards(directory):
    return {path.name: path.read_bytes() for path in sorted((directory / "shards").iterdir())}


def _rows(directory):
    table = pq.read_table(directory / "shards").to_pydict()
    order = np.lexsort((table["position"], table["sample_id"]))
    return {name: [values[i] for i in order] for name, values in table.items()}


def test_rows_are_what_the_model_does_to_each_sample_alone(run, toy, tmp_path):
    """An independent reference: one sample at a time, no batch, no hook, plain loops."""
    model = toy.ToyMoe()
    report = run(model=model, hidden_states="all")
    reader = TraceReader(tmp_path / "T")
    assert report.manifest.num_samples == reader.num_samples == 50
    seen = 0
    for batch in reader.batches(Selection(hidden_layers=(0, 1, 2))):
        for start, end in zip(batch.sample_offsets, batch.sample_offsets[1:], strict=False):
            assert batch.position[start:end].tolist() == list(range(end - start))
            x = model.embedding(torch.from_numpy(batch.token_id[start:end].astype(np.int64)))
            for index, layer in enumerate(model.layers):
                sums, mixed = torch.zeros_like(x[0]), []
                for step, row in enumerate(x, start=1):
                    sums = sums + row
                    mixed.append(row + sums / step)
                x = torch.stack(mixed)
                states = layer.norm(x)
                logits = states @ layer.router.weight.T
                best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :3]
                np.testing.assert_array_equal(batch.topk_ids[start:end, index], best)
                weights = logits.softmax(-1).gather(1, best)
                np.testing.assert_allclose(
                    batch.topk_weights[start:end, index], weights.detach(), rtol=2e-3, atol=1e-6
                )
                torch.testing.assert_close(
                    batch.hidden[index][start:end], states.detach(), rtol=1e-4, atol=1e-5
                )
                outputs = torch.einsum("th,tkhi->tki", states, layer.experts[best])
                x = x + torch.tanh((outputs * weights[..., None]).sum(1))
            seen += 1
    assert seen == 50
    lengths = np.diff(np.flatnonzero(np.r_[np.array(_rows(tmp_path / "T")["position"]) == 0, True]))
    assert lengths.min() >= 16 and lengths.max() == 24


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(run, tmp_path):
    run("A")
    run("B")
    run("C", seed=6)
    assert _shards(tmp_path / "A") == _shards(tmp_path / "B")
    assert _shards(tmp_path / "A") != _shards(tmp_path / "C")
    routers = [TraceReader(tmp_path / name).routers() for name in "AB"]
    assert routers[0][1] == routers[1][1]
    assert all(torch.equal(tensor, routers[1][0][name]) for name, tensor in routers[0][0].items())


@pytest.mark.parametrize("stop_at", [1, 9, 25, 41])
def test_an_interrupted_run_resumes_to_the_same_shards(run, tmp_path, stop_at):
    class Stop(Exception):
        pass

    told = []

    def stop(progress):
        told.append(progress)
        if sum(1 for _ in told) == stop_at // 4 + 1:
            raise Stop

    run("whole")
    with pytest.raises(Stop):
        run(progress=stop)
    finished = read_manifest(tmp_path / "T").num_finished
    assert finished % 8 in (0, 1)
    report = run(resume=True)
    assert report.manifest.complete and report.new_traces == 50 - finished
    assert _shards(tmp_path / "T") == _shards(tmp_path / "whole")
    assert report.overall == run("again").overall


def test_resuming_what_is_finished_runs_nothing(run, toy, tmp_path):
    run()
    before = _shards(tmp_path / "T")
    model = toy.ToyMoe()
    report = run(model=model, resume=True)
    assert report.new_traces == 0 and _shards(tmp_path / "T") == before
    assert model.batch_sizes == [1]  # the probe for routers


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_9_at_any_moment_then_resume_gives_the_same_rows(toy, tmp_path):
    """A forked collector: importing torch anew for each kill would take the test a minute."""

    def start(out, *, pause, resume):
        child = os.fork()
        if child:
            return child
        try:
            toy.collect_slowly(out, traces=60, seed=3, pause_s=pause, resume=resume)
            os._exit(0)
        finally:
            os._exit(1)

    def finish(child):
        assert os.waitpid(child, 0)[1] == 0

    finish(start(tmp_path / "whole", pause=0, resume=False))
    chance = random.Random(0)
    out, resume = tmp_path / "T", False
    for _ in range(5):
        child = start(out, pause=0.03, resume=resume)
        began = time.monotonic()
        while not (out / "manifest.json").exists():
            time.sleep(0.01)
            assert time.monotonic() - began < 60
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        TraceReader(out).verify()
        resume = True
    assert read_manifest(out).num_finished < 60
    finish(start(out, pause=0, resume=True))
    assert _rows(out) == _rows(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))


def test_out_of_memory_replays_the_whole_shard_at_half(run, toy, tmp_path):
    model = toy.ToyMoe(max_batch=3)
    run("small", batch_size=3, samples_per_shard=24)
    model.batch_sizes.clear()
    report = run(model=model, batch_size=12, samples_per_shard=24)
    # Probe; the first shard fails at 12 and at 6, and begins anew at 3; nothing is tried larger
    # again.
    assert model.batch_sizes[:4] == [1, 12, 6, 3] and set(model.batch_sizes[3:]) <= {3, 2, 1}
    assert {shard.batch_size for shard in report.manifest.shards} == {3}
    assert "batch size 3" in (tmp_path / "T" / "collection.log").read_text()
    assert _rows(tmp_path / "T") == _rows(tmp_path / "small")


def test_a_later_shard_that_does_not_fit_is_run_again_from_its_start(run, toy, tmp_path):
    model = toy.ToyMoe()

    def shrink(progress):
        if progress.done == 12:
            model.max_batch = 2

    report = run(model=model, progress=shrink)
    sizes = [shard.batch_size for shard in report.manifest.shards]
    assert sizes[0] == 4 and set(sizes[1:]) == {2}
    assert _rows(tmp_path / "T")["sample_id"] == sorted(_rows(tmp_path / "T")["sample_id"])
    resumed = run(resume=True)
    assert [shard.batch_size for shard in resumed.manifest.shards] == sizes


def test_a_resume_goes_on_at_the_batch_size_that_memory_allowed(run, toy, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.done == 20:
            raise Stop

    with pytest.raises(Stop):
        run(model=toy.ToyMoe(max_batch=2), progress=stop)
    assert read_manifest(tmp_path / "T").num_finished == 16
    roomy = toy.ToyMoe()
    report = run(model=roomy, resume=True)
    assert {shard.batch_size for shard in report.manifest.shards} == {2}
    assert max(roomy.batch_sizes) == 2


def test_not_even_one_sample_fits(run, toy):
    class Never(toy.ToyMoe):
        def forward(self, input_ids, attention_mask=None, use_cache=False):
            if input_ids.shape[1] > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids)

    with pytest.raises(OutOfMemoryError, match="not even one sample of 24 tokens") as caught:
        run(model=Never())
    assert caught.value.exit_code == 4


def test_other_errors_of_the_model_are_not_taken_for_memory(run, toy):
    class Broken(toy.ToyMoe):
        def forward(self, input_ids, attention_mask=None, use_cache=False):
            if input_ids.shape[1] > 8:
                raise RuntimeError("shapes do not match")
            return super().forward(input_ids)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(model=Broken())


def test_resume_refuses_what_would_not_continue(run, toy):
    run()
    other_text = [
        toy.corpus("alpha", documents=40, words=70, first=1),
        toy.corpus("beta", documents=30, words=18),
    ]
    changed = ModelShape(3, 12, 3, 16, 8, "toy-1")
    for change, named in (
        ({"seed": 6}, "seed: 5, now 6"),
        ({"traces": 52}, "traces of alpha: 25, now 26"),
        ({"corpora": other_text}, "the text of alpha"),
        ({"corpora": other_text[:1], "traces": 25}, "datasets: alpha, beta, now alpha"),
        ({"shape": changed}, "shape.fingerprint: 'toy-0', now 'toy-1'"),
        ({"probabilities": "none"}, "probabilities: 'log8', now 'none'"),
        ({"context_tokens": 20}, "context_tokens: 24, now 20"),
        ({"hidden_states": "none"}, r"hidden_layers: \(1, 2\), now \(\)"),
        ({"model": toy.ToyMoe().double()}, "dtype: 'float32', now 'float64'"),
        ({"kernels": "avx2"}, "kernels: 'torch', now 'avx2'"),
    ):
        with pytest.raises(ResumeError, match=named):
            run(resume=True, **change)


def test_batch_size_threads_and_shards_of_the_first_run_are_used_again(run, toy, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.done == 12:
            raise Stop

    with pytest.raises(Stop):
        run(progress=stop)
    before = torch.get_num_threads()
    threads = []

    class Watching(toy.ToyMoe):
        def forward(self, *args, **kwargs):
            threads.append(torch.get_num_threads())
            return super().forward(*args, **kwargs)

    manifest = read_manifest(tmp_path / "T")
    model = Watching()
    torch.set_num_threads(2)
    try:
        report = run(model=model, resume=True, batch_size=16, samples_per_shard=32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert manifest.threads == before == 1 and set(threads[1:]) == {1}
    assert set(model.batch_sizes[1:]) <= {4, 1}
    assert {shard.num_samples for shard in report.manifest.shards} == {8, 1}


def test_progress_and_log_tell_what_happened(run, toy, tmp_path):
    told: list[Progress] = []
    report = run(progress=told.append)
    for name in ("alpha", "beta"):
        mine = [progress for progress in told if progress.dataset == name]
        assert [progress.done for progress in mine] == sorted(progress.done for progress in mine)
        assert mine[-1].done == mine[-1].total == 25 and mine[-1].traces_per_s > 0
    text = (tmp_path / "T" / "collection.log").read_text()
    for word in ("alpha: 25 traces", "beta", "unique pairs", "routing entropy", "least used"):
        assert word in text
    manifest = json.loads((tmp_path / "T" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["dtype"] == "float32" and manifest["threads"] == 1
    assert report.nbytes == sum(len(raw) for raw in _shards(tmp_path / "T").values()) + sum(
        path.stat().st_size for path in (tmp_path / "T" / "hidden").iterdir()
    )


def test_diversity_is_what_counting_by_hand_gives(rng):
    shape = ModelShape(3, 7, 2, 4, 4, "")
    ids = np.stack(
        [rng.permuted(np.tile(np.arange(5), (200, 1)), axis=1)[:, :2] for _ in range(3)], 1
    )
    counts = Diversity(shape)
    for part in np.array_split(ids, 7):
        counts.add(part)
    summary = counts.summary()
    entropy, pairs, used = 0.0, 0, 0
    for layer in range(3):
        experts, uses = np.unique(ids[:, layer], return_counts=True)
        share = uses / uses.sum()
        entropy -= (share * np.log2(share)).sum() / 3
        pairs += len({frozenset(row) for row in ids[:, layer].tolist()})
        used += len(experts)
    assert summary.tokens == 200
    assert summary.coverage == pytest.approx(used / 21)
    assert summary.routing_entropy == pytest.approx(entropy)
    assert (summary.unique_pairs, summary.experts_used) == (pairs, used)
    assert summary.least_used[2] == 0.0
    layer, expert, share = summary.most_used
    assert share == pytest.approx((ids[:, layer] == expert).sum() / 200)


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [("RTX 3090", 23.7, 8), ("A6000", 47.5, 12), ("A100-40", 39.4, 16), ("A100-80", 79.2, 20)],
)
def test_the_batch_size_follows_the_device_memory(name, gib, expected):
    assert batch_size_for("cuda", int(gib * GIB)) == expected
    assert batch_size_for("cpu", int(gib * GIB)) == CPU_BATCH_SIZE


class _Driver(types.ModuleType):
    """Stands for nvidia-ml-py: one card, found by its identity only."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-abc":
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(total=24 * GIB, used=5 * GIB)


@pytest.mark.parametrize(
    ("uuid", "used"), [("abc", 5), ("other", 2)], ids=["by-the-driver", "by-the-runtime"]
)
def test_memory_of_a_card_is_the_drivers_or_the_runtimes(monkeypatch, uuid, used):
    driver = _Driver("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    properties = types.SimpleNamespace(name="RTX 3090", uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (22 * GIB, 24 * GIB))
    found = device_memory(torch.device("cuda", 0))
    assert (found.name, found.total_bytes, found.used_bytes) == ("RTX 3090", 24 * GIB, used * GIB)
    assert not driver.is_open


def test_hidden_layers_by_name():
    assert hidden_layers("none", 27) == ()
    assert hidden_layers("ensemble", 27) == (13, 26)
    assert hidden_layers("ensemble", 1) == (0,)
    assert hidden_layers("all", 3) == (0, 1, 2)
    assert hidden_layers("5,2,5", 27) == hidden_layers([2, 5], 27) == (2, 5)
    for bad in ("some", "27", "-1", "1,x"):
        with pytest.raises(CollectError, match="none, ensemble, all, or layers from 0 to 26"):
            hidden_layers(bad, 27)


def test_settings_out_of_range_are_refused():
    for change in ({"traces": 0}, {"batch_size": 0}, {"probabilities": "fp8"}):
        with pytest.raises(CollectError, match="accepted are"):
            CollectSettings(**({"traces": 5} | change))


def test_all_layers_of_a_large_model_are_hundreds_of_gigabytes():
    shape = ModelShape(27, 64, 6, 2048, 1408, "")
    settings = CollectSettings(traces=20_000, hidden_states="all")
    assert estimate_bytes(shape, settings) > 100e9
    assert estimate_bytes(shape, CollectSettings(traces=20_000, hidden_states="none")) < 3e9
