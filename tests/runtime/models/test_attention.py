"""Attention over a ragged batch: each sequence as if alone, in pieces as in one; refusals."""

from types import SimpleNamespace

import engines
import pytest
import torch
from engines import prompt_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.runtime.errors import UnsupportedModelError
from outrider.runtime.models.attention import NoOtherState, RaggedAttention, SequenceKv, Span
from outrider.runtime.request import SamplingParams
from outrider.runtime.scheduler import BatchLimits, Scheduler

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)


class OneLayer(torch.nn.Module):
    """As much of a model as RaggedAttention asks for."""

    def __init__(self, num_layers: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=num_layers, model_type="made-up")
        self.layer_idx = 0


def truth(query, keys, values, *, window, sinks):
    """[H, T, D] against [G, T, D] in float64: one query at a time, over what it may see."""
    outputs = []
    groups = query.shape[0] // keys.shape[0]
    for head in range(query.shape[0]):
        for position in range(query.shape[1]):
            first = 0 if window is None else max(0, position - window + 1)
            seen = keys[head // groups, first : position + 1].double()
            scores = seen @ query[head, position].double() * query.shape[2] ** -0.5
            if sinks is not None:
                scores = torch.cat([scores, sinks[head, None].double()])
            weights = scores.softmax(0)[: position + 1 - first]
            outputs.append(weights @ values[head // groups, first : position + 1].double())
    return torch.stack(outputs).reshape(query.shape[0], query.shape[1], -1)


@st.composite
def batches(draw):
    """Lengths of sequences, and passes that each bring some of them some tokens further."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    done = [0] * len(lengths)
    passes = []
    while done != lengths:
        left = [n - d for n, d in zip(lengths, done, strict=True)]
        held_back = [draw(st.integers(0, n)) if len(passes) < 5 else 0 for n in left]
        takes = [n - held for n, held in zip(left, held_back, strict=True)]
        if any(takes):
            passes.append(takes)
            done = [d + t for d, t in zip(done, takes, strict=True)]
    return lengths, passes


@settings(max_examples=60, deadline=None)
@example(batch=([300, 3], [[250, 2], [7, 1], [43, 0]]), groups=2, window=9, has_sinks=False)
@example(batch=([300], [[256], [1], [43]]), groups=1, window=None, has_sinks=True)
@given(
    batch=batches(),
    groups=st.sampled_from([1, 2, 4]),
    window=st.one_of(st.none(), st.integers(1, 6)),
    has_sinks=st.booleans(),
)
def test_any_pieces_in_any_company_are_attention_over_the_whole(batch, groups, window, has_sinks):
    lengths, passes = batch
    heads, dim, value_dim = 4, 8, 6
    generator = torch.Generator().manual_seed(sum(lengths))
    sinks = torch.randn(heads, generator=generator) if has_sinks else None
    texts = [
        (
            torch.randn(heads, n, dim, generator=generator),
            torch.randn(heads // groups, n, dim, generator=generator),
            torch.randn(heads // groups, n, value_dim, generator=generator),
        )
        for n in lengths
    ]
    model = OneLayer()
    attention = RaggedAttention(model)
    caches = [SequenceKv() for _ in lengths]
    outputs = [[] for _ in lengths]
    for takes in passes:
        spans, rows, start = [], [], 0
        for index, take in enumerate(takes):
            if take:
                spans.append(Span(caches[index], start, start + take))
                rows.append((index, caches[index].length, take))
                start += take
        query, keys, values = (
            torch.cat([texts[i][part][:, done : done + n] for i, done, n in rows], 1)[None]
            for part in range(3)
        )
        with attention.over(spans):
            output = attention.attend(
                model, query, keys, values, scaling=None, sliding_window=window, sinks=sinks
            )
        assert output.shape == (1, start, heads, value_dim)
        for (index, _, _), span in zip(rows, spans, strict=True):
            outputs[index].append(output[0, span.start : span.end].transpose(0, 1))
    for index, (query, keys, values) in enumerate(texts):
        assert caches[index].length == lengths[index]
        got = torch.cat(outputs[index], 1).double()
        want = truth(query, keys, values, window=window, sinks=sinks)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_cache_grows_by_steps_and_says_what_it_holds():
    kv = SequenceKv()
    assert kv.nbytes == 0
    row = torch.ones(1, 2, 1, 4)
    for position in range(257):
        keys, values = kv.append(0, row * position, row[..., :3] * position)
        kv.advance(1)
        assert keys.shape == (1, 2, position + 1, 4)
        assert values.shape == (1, 2, position + 1, 3)
    assert torch.equal(keys[0, 0, :, 0], torch.arange(257.0))
    assert kv.nbytes == 512 * 2 * (4 + 3) * 4


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    model = OneLayer()
    attention = RaggedAttention(model)
    kv = SequenceKv()
    row = torch.ones(1, 1, 1, 4)
    with pytest.raises(RuntimeError, match="lost"), attention.over([Span(kv, 0, 1)]):
        attention.attend(model, row, row, row, scaling=None, sliding_window=None, sinks=None)
        raise RuntimeError("lost")
    assert kv.length == 0
    with attention.over([Span(kv, 0, 1)]):
        again = attention.attend(
            model, row, row, 2 * row, scaling=None, sliding_window=None, sinks=None
        )
    assert kv.length == 1
    assert torch.equal(again, 2 * row)


def test_a_layer_that_keeps_no_keys_is_refused():
    attention = RaggedAttention(OneLayer(num_layers=2))
    row = torch.ones(1, 1, 1, 4)
    with (
        pytest.raises(UnsupportedModelError, match="1 of 2 layers use attention"),
        attention.over([Span(SequenceKv(), 0, 1)]),
    ):
        attention.attend(OneLayer(), row, row, row, scaling=None, sliding_window=None, sinks=None)


def test_keys_beside_the_tokens_own_are_refused():
    # Families that compress their past hand over more keys than tokens.
    model = OneLayer()
    attention = RaggedAttention(model)
    row, more = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 4)
    with (
        pytest.raises(UnsupportedModelError, match="1 queries over 2 new keys"),
        attention.over([Span(SequenceKv(), 0, 1)]),
    ):
        attention.attend(model, row, more, more, scaling=None, sliding_window=None, sinks=None)


@pytest.mark.parametrize("name", ["layers", "update_indexer", "update_conv_state"])
def test_another_kind_of_state_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=f"keeps its past by '{name}'"):
        getattr(NoOtherState("made-up"), name)


PROMPTS = [prompt_of(n, seed=n) for n in (1, 2, 9, 23)]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("qwen3_moe", id="grouped-heads"),
        pytest.param("mixtral", id="sliding-window"),
        pytest.param("gpt_oss", id="sinks"),
        pytest.param("deepseek_v3", id="latent"),
    ],
)
@pytest.mark.parametrize(
    "max_num_batched_tokens",
    [pytest.param(2048, id="whole"), pytest.param(5, id="pieces-of-5")],
)
def test_prompts_side_by_side_get_what_each_gets_alone(models, family, max_num_batched_tokens):
    with models.engine(family, num_slots=7) as engine:
        alone = [engines.generate(engine, [prompt], max_tokens=5) for prompt in PROMPTS]
        engine._scheduler = Scheduler(
            BatchLimits(max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens)
        )
        together = engines.generate(engine, PROMPTS, max_tokens=5)
    assert together.token_ids == [one.token_ids[0] for one in alone]
    assert len({len(PROMPTS[0]), *map(len, together.token_ids)}) > 1
    if max_num_batched_tokens == 2048:
        first = together.logits[0]
        want = torch.cat([one.logits[0] for one in alone])
        assert ((first - want).norm(dim=1) / want.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param(
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
            id="window-in-the-mask-of-some-layers",
        ),
        pytest.param(
            "phimoe",
            {
                "intermediate_size": 48,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "sliding_window": 6,
            },
            id="window-in-the-mask-of-all-layers",
        ),
    ],
)
def test_a_window_that_only_the_mask_tells_of_is_kept(models, family, fields):
    prompt = prompt_of(20)
    with models.engine(family, fields=fields) as engine:
        generated = engines.generate(engine, [prompt], max_tokens=3)
    want = models.reference(family, **fields).logits(prompt + generated.token_ids[0])
    got = torch.cat(generated.logits)
    torch.testing.assert_close(got, want[19:-1], rtol=1e-4, atol=1e-4 * float(want.abs().max()))


MLA = {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
}


def test_a_family_with_an_index_of_keys_is_refused_and_not_run_without_it(models):
    with (
        models.engine("deepseek_v32", fields=MLA) as engine,
        pytest.raises(UnsupportedModelError, match="'deepseek_v32': a layer keeps its past by"),
    ):
        engine.generate(prompt_of(8), GREEDY)


def test_a_family_with_recurrent_layers_is_refused(models):
    fields = {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    with (
        models.engine("minimax", fields=fields) as engine,
        pytest.raises(UnsupportedModelError, match="'minimax'"),
    ):
        engine.generate(prompt_of(8), GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"softcap": 30.0}, "softcap", id="soft-capped-scores"),
        pytest.param({"dropout": 0.1}, "dropout", id="dropout"),
        pytest.param({"attention_mask": None}, "mask of its own", id="no-mask"),
        pytest.param({"attention_mask": torch.zeros(1, 1, 3, 3)}, "mask of its own", id="own-mask"),
        pytest.param(
            {"attention_mask": torch.zeros(1, 1, 1, 1)}, "mask of its own", id="own-mask-of-one"
        ),
    ],
)
def test_what_would_change_the_result_unseen_is_refused(arguments, message):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = OneLayer()
    module.outrider_attention = RaggedAttention(module)
    rows = torch.ones(1, 1, 3, 4)
    call = {"attention_mask": torch.tensor([[[[-1]]]]), "scaling": 1.0} | arguments
    with pytest.raises(UnsupportedModelError, match=message):
        ALL_ATTENTION_FUNCTIONS["outrider"](module, rows, rows, rows, **call)


@pytest.mark.parametrize(
    ("fields", "call"),
    [
        pytest.param({"attention_chunk_size": 4}, {"local_size": 4}, id="chunks"),
        pytest.param({}, {"use_vmap": True}, id="an-overlay"),
        pytest.param({}, {"allow_is_bidirectional_skip": True}, id="both-directions"),
    ],
)
def test_masks_that_are_not_causal_are_refused(fields, call):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    RaggedAttention(OneLayer())
    config = SimpleNamespace(model_type="made-up", **fields)
    with pytest.raises(UnsupportedModelError, match="'made-up': its attention masks"):
        ALL_MASK_ATTENTION_FUNCTIONS["outrider"](config=config, **call)


def test_room_is_of_one_capacity_after_growing_failed_half_way(monkeypatch):
    """Native attention strides the heads of all layers' keys and values by one number."""
    kv, like = SequenceKv(), torch.empty(1, 2, 0, 4)
    kv.room(10, num_layers=3, like=like)
    kv.advance(10)
    honest, left = SequenceKv._room, iter([True] * 3)

    def failing(self, *arguments, **named):
        if next(left, None) is None:
            raise RuntimeError("no memory left (a test says so)")
        return honest(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceKv, "_room", failing)
        with pytest.raises(RuntimeError):
            kv.room(300, num_layers=3, like=like)
    addresses, capacity = kv.room(5, num_layers=3, like=like)
    buffers = [(kv._keys[layer_idx], kv._values[layer_idx]) for layer_idx in range(3)]
    assert {buffer.shape[2] for pair in buffers for buffer in pair} == {capacity}
    assert addresses.tolist() == [[one.data_ptr() for one in pair] for pair in buffers]
