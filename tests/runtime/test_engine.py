"""The engine whole: batches, streams, stops, interrupts, failing disks; each leaves it usable."""

import gc
import os
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from engines import prompt_of

from outrider.kernels import native
from outrider.runtime import ChatMessage, Engine, GenerationRequest, SamplingParams
from outrider.runtime.errors import OutriderError, TransferError, UsageError
from outrider.runtime.experts.thread_transfer import ThreadTransfer

FAMILY = "qwen2_moe"
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TEXTS = ["the film", "t", "that was the best of the films", "w" * 30]


def check_idle(engine: Engine) -> None:
    """Nothing is pinned, being read for nobody, or still queued."""
    cache = engine.tier.executor.cache
    cache.check()
    engine.tier.executor.prefetcher.close()
    assert cache.num_loading == 0
    assert not any(entry.num_pins for entry in cache._entries.values())
    assert engine.step() == {}


@pytest.fixture
def engine(models):
    """One with slots for a third of the experts; whatever a test does, it must end idle."""
    with models.engine(FAMILY, num_slots=10) as engine:
        yield engine
        if not engine._is_closed:
            check_idle(engine)


@pytest.fixture(scope="module")
def expected(models):
    """Greedy tokens of TEXTS, each alone, with all experts resident."""
    with models.engine(FAMILY, prefetch="off") as engine:
        return [engine.generate(text, GREEDY)[0].token_ids for text in TEXTS]


# --- batches ---------------------------------------------------------------------------------


def test_prompts_at_once_get_what_each_gets_alone_in_their_order(engine, expected):
    results = engine.generate(TEXTS, GREEDY)
    assert [result.token_ids for result in results] == expected
    assert len({result.token_ids for result in results}) == len(TEXTS)
    for text, result in zip(TEXTS, results, strict=True):
        ids = engine.tokenizer(text)["input_ids"]
        assert list(result.prompt_token_ids) == ids
        assert result.usage == {"prompt_tokens": len(ids), "completion_tokens": 6}


def test_more_prompts_than_run_at_once_are_all_served(engine, expected):
    results = engine.generate(TEXTS * 4, GREEDY)
    assert [result.token_ids for result in results] == expected * 4


def test_one_prompt_may_be_text_ids_or_messages(engine, expected):
    ids = engine.tokenizer(TEXTS[0])["input_ids"]
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    forms = [
        TEXTS[0],
        ids,
        tuple(ids),
        [np.int64(one) for one in ids],
        np.array(ids),
        [ChatMessage(role="user", content=TEXTS[0])],
    ]
    for form in forms:
        (result,) = engine.generate(form, GREEDY)
        assert result.token_ids == expected[0]
    assert [one.token_ids for one in engine.generate(forms, GREEDY)] == [expected[0]] * len(forms)


def test_no_prompts_are_no_results(engine):
    assert engine.generate([], GREEDY) == []


def test_a_seed_repeats_whatever_is_resident(models, engine):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5)
    first = engine.generate(TEXTS[0], params)[0].token_ids
    assert engine.generate(TEXTS[0], params)[0].token_ids == first
    others = {
        engine.generate(TEXTS[0], SamplingParams(max_tokens=8, seed=seed))[0].token_ids
        for seed in range(5)
    }
    assert len(others) > 1
    with models.engine(FAMILY, num_slots=1, prefetch="off") as other:
        assert other.generate(TEXTS[0], params)[0].token_ids == first


def test_log_probabilities_are_those_of_the_reference(models, engine):
    (got,) = engine.logprobs([prompt_of(12)])
    logits = models.reference(FAMILY).logits(prompt_of(12))
    want = logits.log_softmax(1)[torch.arange(11), torch.tensor(prompt_of(12)[1:])]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert engine.logprobs([]) == []
    assert engine.logprobs([[5]])[0].shape == (0,)


# --- ends ------------------------------------------------------------------------------------


def test_a_text_ends_at_its_length(engine):
    (result,) = engine.generate(TEXTS[0], SamplingParams(max_tokens=3, temperature=0.0))
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


def test_a_text_ends_at_an_end_token_unless_that_is_ignored(engine, expected):
    engine.loaded.end_token_ids, kept = frozenset([expected[0][2]]), engine.loaded.end_token_ids
    try:
        (result,) = engine.generate(TEXTS[0], SamplingParams(max_tokens=6, temperature=0.0))
        assert (result.token_ids, result.finish_reason) == (expected[0][:3], "stop")
        assert engine.generate(TEXTS[0], GREEDY)[0].token_ids == expected[0]
    finally:
        engine.loaded.end_token_ids = kept


def test_a_text_ends_at_a_stop_token(engine, expected):
    params = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=[expected[0][1]])
    (result,) = engine.generate(TEXTS[0], params)
    assert (result.token_ids, result.finish_reason) == (expected[0][:2], "stop")


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_stop_string_ends_a_text_and_no_part_of_it_is_shown(engine, at, length):
    long = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    whole = "".join(chunk.text for chunk in engine.stream(TEXTS[2], SamplingParams(**long)))
    start = int(at * len(whole))
    stop = whole[start : start + length]
    chunks = list(engine.stream(TEXTS[2], SamplingParams(**long, stop=[stop])))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    (result,) = engine.generate(TEXTS[2], SamplingParams(**long, stop=[stop]))
    assert (result.text, result.finish_reason) == (text, "stop")


# --- streams ---------------------------------------------------------------------------------


def drain(stream):
    """Chunks of a stream and its value."""
    chunks = []
    while True:
        try:
            chunks.append(next(stream))
        except StopIteration as end:
            return chunks, end.value


def test_a_stream_brings_the_tokens_and_text_of_generate(engine):
    (want,) = engine.generate(TEXTS[2], GREEDY)
    chunks, result = drain(engine.stream(TEXTS[2], GREEDY))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == want.token_ids
    assert "".join(chunk.text for chunk in chunks) == want.text == result.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["length"]
    assert result.token_ids == want.token_ids


def test_streams_taken_in_turns_lose_nothing(engine):
    wanted = [engine.generate(text, GREEDY)[0] for text in TEXTS[:3]]
    streams = [engine.stream(text, GREEDY) for text in TEXTS[:3]]
    got = [[] for _ in streams]
    open_ones = dict(enumerate(streams))
    while open_ones:
        for index, stream in list(open_ones.items()):
            try:
                got[index].append(next(stream))
            except StopIteration:
                del open_ones[index]
    for chunks, want in zip(got, wanted, strict=True):
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == want.token_ids
        assert "".join(chunk.text for chunk in chunks) == want.text
        assert chunks[-1].finish_reason == "length"


def test_a_stream_beside_generate_loses_nothing(engine, expected):
    stream = engine.stream(TEXTS[0], GREEDY)
    first = next(stream)
    assert [one.token_ids for one in engine.generate(TEXTS[1:], GREEDY)] == expected[1:]
    chunks, result = drain(stream)
    tokens = tuple(token for chunk in [first, *chunks] for token in chunk.token_ids)
    assert tokens == result.token_ids == expected[0]


def test_leaving_a_stream_cancels_it(engine, expected):
    long = SamplingParams(max_tokens=100, temperature=0.0)
    for _ in engine.stream(TEXTS[0], long):
        break
    gc.collect()
    check_idle(engine)
    stream = engine.stream(TEXTS[1], long)
    next(stream)
    stream.close()
    check_idle(engine)
    assert engine.generate(TEXTS[0], GREEDY)[0].token_ids == expected[0]


def test_what_has_ended_keeps_no_memory(engine):
    held = []
    sequence_of = engine._sequence

    def watched(*arguments):
        sequence = sequence_of(*arguments)
        held.append(weakref.ref(sequence.kv))
        return sequence

    engine._sequence = watched
    engine.generate(TEXTS, GREEDY)
    for _ in engine.stream(TEXTS[0], GREEDY):
        break
    gc.collect()
    assert len(held) == len(TEXTS) + 1
    assert [one for one in held if one() is not None] == []


def test_requests_are_queued_and_run_by_steps(engine, expected):
    requests = [
        GenerationRequest.from_params(GREEDY, prompt=TEXTS[0]),
        GenerationRequest.from_params(
            GREEDY, prompt_token_ids=engine.tokenizer(TEXTS[1])["input_ids"]
        ),
    ]
    sequences = [engine.submit(request) for request in requests]
    texts = dict.fromkeys(sequences, "")
    while not all(sequence.is_finished for sequence in sequences):
        for sequence, piece in engine.step().items():
            texts[sequence] += piece
    for sequence, tokens in zip(sequences, expected, strict=False):
        assert tuple(sequence.token_ids) == tokens
        assert texts[sequence] == sequence.text


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        pytest.param("", {}, "prompt is empty", id="empty"),
        pytest.param([], {}, "prompt_token_ids is empty", id="no-ids"),
        pytest.param("x" * 256, {}, "context|tokens", id="longer-than-the-context"),
        pytest.param([5] * 256, {}, "256 tokens and the context 256", id="ids-longer"),
        pytest.param([5] * 200, {"max_tokens": 57}, "at most 56", id="answer-too-long"),
        pytest.param([320], {}, r"prompt_token_ids\[0\] is 320.*319", id="outside-the-vocabulary"),
        pytest.param([-1], {}, r"prompt_token_ids\[0\] is -1", id="negative"),
        pytest.param([1, 2.5], {}, r"prompt_token_ids\[1\] is 2.5", id="not-whole"),
        pytest.param([1, True], {}, r"prompt_token_ids\[1\] is True", id="a-boolean"),
        pytest.param([1, "2"], {}, r"prompt_token_ids\[1\] is '2'", id="text-among-ids"),
        pytest.param([5], {"stop_token_ids": [320]}, "stop_token_ids", id="stop-token"),
        pytest.param("a\ud800b", {}, "surrogate", id="lone-surrogate"),
        pytest.param([ChatMessage(role="user", content="hi")], {}, "chat template", id="no-chat"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_anything_does(engine, prompt, params, message):
    params = SamplingParams(**({"max_tokens": 2, "temperature": 0.0} | params))
    for call in (
        lambda: engine.stream(prompt, params),
        lambda: engine.generate([TEXTS[0], prompt], params),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert engine.step() == {}, "something had been queued"


def test_text_beyond_all_bounds_is_refused_unread(engine):
    def read(*_, **__):
        raise AssertionError("it was tokenised")

    engine.tokenizer = read
    with pytest.raises(UsageError, match=r"1048577 characters"):
        engine.generate("x" * (2**20 + 1), GREEDY)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ raise_exception('roles must alternate') }}", id="raises"),
        pytest.param("{% for m in", id="syntax"),
        pytest.param("{{ messages[7].content }}", id="index"),
        pytest.param("{% for i in range(10**9) %}x{% endfor %}", id="bomb"),
        pytest.param("{{ ''.__class__.__mro__ }}", id="escape"),
    ],
)
def test_a_chat_template_that_fails_is_a_usage_error(engine, template):
    engine.tokenizer.chat_template = template
    with pytest.raises(UsageError, match="chat template"):
        engine.generate([ChatMessage(role="user", content="hi")], GREEDY)


def test_a_closed_engine_refuses(models):
    threads = threading.active_count()
    with models.engine(FAMILY, num_slots=4) as engine:
        open_stream = engine.stream(TEXTS[0], GREEDY)
        next(open_stream)
        assert threading.active_count() > threads
    assert threading.active_count() == threads
    request = GenerationRequest.from_params(GREEDY, prompt=TEXTS[0])
    for call in (
        lambda: engine.generate(TEXTS[0], GREEDY),
        lambda: engine.stream(TEXTS[0], GREEDY),
        lambda: engine.submit(request),
        lambda: engine.logprobs([[1, 2]]),
        lambda: next(open_stream),
        engine.step,
    ):
        with pytest.raises(UsageError, match="engine is closed"):
            call()
    engine.close()


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(0, 30, 4))
def test_an_interrupt_anywhere_leaves_the_engine_usable(engine, expected, monkeypatch, at):
    """Before experts of a prompt's layer, or between two native calls of a token's pass."""
    calls = []

    def interrupting(call):
        def interrupted(*arguments, **options):
            calls.append(1)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return interrupted

    with monkeypatch.context() as patch:
        places = [(engine.tier.executor.arithmetic, "outputs")]
        if native.is_available():
            places.append((engine._runner._decoder._token_pass, "_call"))
        for owner, name in places:
            patch.setattr(owner, name, interrupting(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(TEXTS, GREEDY)
    check_idle(engine)
    assert [one.token_ids for one in engine.generate(TEXTS, GREEDY)] == expected


@pytest.mark.parametrize("at", [0, 1, 7, 20])
def test_an_interrupt_while_reading_leaves_the_engine_usable(engine, expected, monkeypatch, at):
    from outrider.runtime.experts import thread_transfer

    wait, calls = thread_transfer._Copy.wait, []

    def interrupted(copy):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        wait(copy)

    with monkeypatch.context() as patch:
        patch.setattr(thread_transfer._Copy, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(TEXTS, GREEDY)
    check_idle(engine)
    assert [one.token_ids for one in engine.generate(TEXTS, GREEDY)] == expected


def test_a_file_cut_short_while_running_ends_the_request_and_not_the_engine(models, tmp_path):
    folder = shutil.copytree(models.checkpoint(FAMILY), tmp_path / "model")
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    with Engine.from_pretrained(folder, expert_memory="10%", device="cpu") as engine:
        (before,) = engine.generate(TEXTS[0], GREEDY)
        os.truncate(shard, 4096)
        with pytest.raises(TransferError, match=r"model\.safetensors"):
            engine.generate(TEXTS[0], GREEDY)
        check_idle(engine)
        stream = engine.stream(TEXTS[0], GREEDY)
        with pytest.raises(TransferError, match=r"model\.safetensors"):
            next(stream)
        check_idle(engine)
        with shard.open("r+b") as file:
            file.write(content)
        (after,) = engine.generate(TEXTS[0], GREEDY)
    assert after.token_ids == before.token_ids


def test_a_file_replaced_while_running_goes_unnoticed(models, tmp_path):
    # The one that was opened is read to the end; its successor is another model's business.
    folder = shutil.copytree(models.checkpoint(FAMILY), tmp_path / "model")
    with Engine.from_pretrained(folder, expert_memory="10%", device="cpu") as engine:
        (before,) = engine.generate(TEXTS, GREEDY)[:1]
        (folder / "new").write_bytes(b"\xff" * 100)
        (folder / "new").replace(folder / "model.safetensors")
        assert engine.generate(TEXTS[0], GREEDY)[0].token_ids == before.token_ids


def test_a_failed_read_ends_those_of_its_pass_and_no_others(engine, expected, monkeypatch):
    # Two wait behind a full batch: they run after the failure as if nothing had been.
    engine._scheduler.limits = replace(engine._scheduler.limits, max_num_seqs=2)
    submit, failures = engine.tier.transfers.submit, []

    def failing(key, slot, kind):
        if not failures:
            failures.append(key)
            raise TransferError(f"expert {key}: the disk is gone")
        return submit(key, slot, kind)

    monkeypatch.setattr(engine.tier.transfers, "submit", failing)
    sequences = [
        engine.submit(GenerationRequest.from_params(GREEDY, prompt=text)) for text in TEXTS
    ]
    while not all(sequence.is_finished for sequence in sequences):
        engine.step()
    assert [sequence.finish_reason for sequence in sequences] == ["error"] * 2 + ["length"] * 2
    assert all("the disk is gone" in str(sequence.error) for sequence in sequences[:2])
    assert [tuple(sequence.token_ids) for sequence in sequences[2:]] == expected[2:]


def test_logits_that_are_no_numbers_end_one_request_and_not_the_engine(engine, expected):
    run, poisoned = engine._runner.run, []

    def broken(batch, **options):
        output = run(batch, **options)
        if poisoned:
            return output
        poisoned.append(1)
        logits = output.logits.clone()
        logits[1] = float("nan")
        return replace(output, logits=logits)

    engine._runner.run = broken
    sequences = [
        engine.submit(GenerationRequest.from_params(GREEDY, prompt=text)) for text in TEXTS
    ]
    while not all(sequence.is_finished for sequence in sequences):
        engine.step()
    assert [sequence.finish_reason for sequence in sequences].count("error") == 1
    assert "NaN" in str(sequences[1].error)
    for index in (0, 2, 3):
        assert tuple(sequences[index].token_ids) == expected[index]


def test_slots_poisoned_before_each_load_never_reach_the_logits(models):
    with models.engine(FAMILY, prefetch="off") as engine:
        want = engines.generate(engine, [prompt_of(20)], max_tokens=6)
    with models.engine(FAMILY, num_slots=5, prefetch="on") as engine:
        arena, submit, loads = engine.tier.arena, engine.tier.transfers.submit, []

        def poisoning(key, slot, kind):
            arena.poison(slot)
            loads.append(slot)
            return submit(key, slot, kind)

        engine.tier.transfers.submit = poisoning
        for slot in range(5):
            arena.poison(slot)
        got = engines.generate(engine, [prompt_of(20)], max_tokens=6)
    assert len(loads) > 5
    assert all(map(torch.equal, got.logits, want.logits))


class BadStart:
    """A predictor that cannot even begin."""

    def __init__(self, loaded):
        self.shape = loaded.shape

    def begin(self, prompt_ids):
        raise RuntimeError("no start")


def test_a_predictor_that_cannot_begin_costs_speed_only(models, expected, caplog):
    with models.engine(FAMILY, num_slots=10, prefetch="on", make_predictor=BadStart) as engine:
        assert engine.generate(TEXTS[0], GREEDY)[0].token_ids == expected[0]
        assert engine.tier.executor.is_degraded
    assert "no start" in caplog.text


def test_a_predictor_folder_that_is_none_is_a_usage_error(models, tmp_path):
    threads = threading.active_count()
    with (
        pytest.raises(OutriderError, match=str(tmp_path)),
        models.engine(FAMILY, predictor=str(tmp_path)),
    ):
        pass
    assert threading.active_count() == threads


def test_two_engines_side_by_side_do_not_mix(models, expected):
    with (
        models.engine(FAMILY, num_slots=3) as one,
        models.engine("mixtral", num_slots=2) as two,
    ):
        (alone,) = two.generate(TEXTS[0], GREEDY)
        streams = one.stream(TEXTS[0], GREEDY), two.stream(TEXTS[0], GREEDY)
        tokens = [[], []]
        for pair in zip(*streams, strict=True):
            for got, chunk in zip(tokens, pair, strict=True):
                got += chunk.token_ids
    assert tuple(tokens[0]) == expected[0]
    assert tuple(tokens[1]) == alone.token_ids


def test_engines_leave_no_threads_and_no_files_open(models):
    def open_files():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    with models.engine(FAMILY, num_slots=3) as engine:
        engine.generate(TEXTS[0], GREEDY)
    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        with models.engine(FAMILY, num_slots=3) as engine:
            engine.generate(TEXTS[0], GREEDY)
    assert (threading.active_count(), open_files()) == (threads, files)


# --- counts ----------------------------------------------------------------------------------


def test_counts_of_a_generation_add_up(engine):
    (result,) = engine.generate(TEXTS[2], GREEDY)
    stats = result.stats
    shape = engine.loaded.shape
    assert stats.experts.total == shape.num_routed_experts
    assert stats.experts.slots == 10
    assert stats.experts.budget_bytes == 10 * stats.experts.slot_bytes
    for traffic in (stats.experts.prefill, stats.experts.decode):
        traffic.check()
    # One token a step needs exactly top_k experts a layer.
    decode_steps = len(result.token_ids) - 1
    assert stats.timings.decode_tokens == decode_steps
    assert stats.timings.prefill_tokens == len(result.prompt_token_ids)
    assert stats.experts.decode.lookups == decode_steps * shape.num_moe_layers * shape.top_k
    assert 0.0 < stats.timings.ttft_s < 60.0
    assert isinstance(engine.tier.transfers, ThreadTransfer)
