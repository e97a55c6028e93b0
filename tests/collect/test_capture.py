"""What the hooks record against what transformers' own models really did."""

import numpy as np
import pytest
import torch

from outrider.collect.capture import RouterCapture, order_topk
from outrider.collect.errors import NoRoutersError
from outrider.collect.routers import RouterSet, find_routers
from outrider.collect.schema import ModelShape
from outrider.collect.trace.probability import decode_log8, log8_error_bound

COMMON = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_experts": 12,
        "num_experts_per_tok": 4,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 3},
}


def _model(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "router.weight" in name:
                parameter.normal_(0, 0.4)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.uniform_(-0.05, 0.05)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, _model(request.param)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    token_ids = torch.randint(0, 211, (5, 11))
    keep = torch.ones(5, 11, dtype=torch.bool)
    keep[1, 4:] = keep[3, 9:] = False
    return token_ids, keep


def _captured(model, inputs, **options):
    token_ids, keep = inputs
    routers = find_routers(model)
    with RouterCapture(routers, **options) as capture, torch.inference_mode():
        model.base_model(input_ids=token_ids, attention_mask=keep.long(), use_cache=False)
        return routers, capture.take(keep)


def test_recorded_routing_is_what_transformers_says_it_used(family, inputs):
    name, model = family
    token_ids, keep = inputs
    routers, rows = _captured(model, inputs)
    # Ids and weights as the experts were really called with them.
    used = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: used.append((args[1], args[2])))
        for module in model.modules()
        if type(module).__name__.endswith("Experts")
    ]
    with torch.inference_mode():
        output = model(
            input_ids=token_ids,
            attention_mask=keep.long(),
            use_cache=False,
            output_router_logits=True,
        )
    for hook in hooks:
        hook.remove()
    assert len(output.router_logits) == len(routers.routers) == len(used)
    kept = keep.reshape(-1)
    ids = rows.topk_ids.reshape(int(kept.sum()), len(used), routers.top_k)
    weights = rows.topk_weights.reshape(ids.shape)
    log_probs = decode_log8(rows.log_probs.reshape(len(ids), len(used), -1))
    for layer, (used_ids, used_weights) in enumerate(used):
        used_ids, used_weights = used_ids[kept], used_weights[kept]
        for row in range(len(ids)):
            pairs = zip(used_weights[row].tolist(), used_ids[row].tolist(), strict=True)
            expected = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
            assert [expert for _, expert in expected] == ids[row, layer].tolist()
            np.testing.assert_allclose(
                [weight for weight, _ in expected], weights[row, layer], rtol=1e-3
            )
        logits = output.router_logits[layer].reshape(len(kept), -1)[kept].double()
        scores = logits.sigmoid() if name == "deepseek_v3" else logits.softmax(-1)
        truth = (scores / scores.sum(-1, keepdim=True)).log().numpy()
        assert (np.abs(log_probs[:, layer] - truth) <= log8_error_bound(truth) + 1e-4).all()


def test_padding_never_changes_nor_enters_a_row(family, inputs):
    _, model = family
    token_ids, keep = inputs
    _, together = _captured(model, inputs)
    pieces = [
        _captured(model, (token_ids[i : i + 1, : int(keep[i].sum())],
                          keep[i : i + 1, : int(keep[i].sum())]))[1]
        for i in range(len(token_ids))
    ]  # fmt: skip
    assert len(together.topk_ids) == int(keep.sum())
    np.testing.assert_array_equal(
        together.topk_ids, np.concatenate([piece.topk_ids for piece in pieces])
    )


def test_hidden_states_times_the_router_give_its_logits(inputs):
    model = _model("qwen3_moe")
    routers, rows = _captured(model, inputs, hidden_layers=[0, 2], probabilities="fp16")
    tensors, metadata = routers.tensors()
    assert metadata["scoring"] == "softmax" and metadata["top_k"] == "4"
    assert set(rows.hidden) == {0, 2}
    log_probs = rows.log_probs.reshape(-1, 3, 12)
    for layer, states in rows.hidden.items():
        logits = states @ tensors[f"layer_{layer}.weight"].T
        np.testing.assert_allclose(logits.log_softmax(-1), log_probs[:, layer], atol=5e-3)


def test_the_norm_before_each_router_is_found(inputs):
    model = _model("qwen3_moe")
    routers = find_routers(model)
    tensors, metadata = routers.tensors()
    for router in routers.routers:
        expected = model.model.layers[router.layer_idx].post_attention_layernorm
        assert router.norm is expected
        assert router.name == f"model.layers.{router.layer_idx}.mlp.gate"
        assert torch.equal(tensors[f"layer_{router.layer_idx}.norm.weight"], expected.weight)
        assert float(metadata[f"layer_{router.layer_idx}.norm.eps"]) == expected.variance_epsilon


def test_biases_of_the_router_are_kept():
    tensors, _ = find_routers(_model("deepseek_v3")).tensors()
    assert tensors["layer_1.e_score_correction_bias"].abs().max() > 0
    assert "layer_0.bias" in find_routers(_model("gpt_oss")).tensors()[0]


def test_a_dense_model_is_refused():
    with pytest.raises(NoRoutersError, match="LlamaForCausalLM has no routers") as caught:
        find_routers(_model("llama"))
    assert caught.value.exit_code == 3


def test_hooks_are_gone_after_the_block_and_after_an_error(toy):
    model = toy.ToyMoe()
    routers = find_routers(model)
    with pytest.raises(RuntimeError, match="stop"), RouterCapture(routers):
        assert sum(len(module._forward_hooks) for module in model.modules()) == 3
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
    model.max_batch = 0
    with pytest.raises(torch.OutOfMemoryError):
        find_routers(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unfinished_pass_leaves_nothing_behind(toy):
    model = toy.ToyMoe(max_batch=4)
    token_ids = torch.arange(48).reshape(6, 8)
    model.max_batch = 10**9
    routers = find_routers(model)
    model.max_batch = 4
    with RouterCapture(routers) as capture, torch.inference_mode():
        with pytest.raises(torch.OutOfMemoryError):
            model(token_ids)
        with pytest.raises(ValueError, match="saw 0 tokens of 48"):
            capture.take(torch.ones(6, 8, dtype=torch.bool))
        model(token_ids[:4])
        assert len(capture.take(torch.ones(4, 8, dtype=torch.bool)).topk_ids) == 32


def test_equal_weights_are_ordered_by_id():
    ids = torch.tensor([[5, 1, 3, 2], [9, 8, 7, 6]])
    weights = torch.tensor([[0.2, 0.2, 0.4, 0.2], [0.1, 0.1, 0.1, 0.7]])
    ordered, falling = order_topk(ids, weights)
    assert ordered.tolist() == [[3, 1, 2, 5], [6, 7, 8, 9]]
    assert (falling.diff(dim=-1) <= 0).all()


def test_a_shape_that_is_not_the_models_is_refused(toy):
    routers = find_routers(toy.ToyMoe())
    routers.check(toy.SHAPE)
    wrong = ModelShape(3, 12, 2, 16, 8, "toy-0")
    with pytest.raises(
        NoRoutersError, match=r"top-3.*its shape says 3 layers of 12 experts, top-2"
    ):
        routers.check(wrong)


def test_scores_that_are_probabilities_already_are_taken_as_such(toy):
    base = find_routers(toy.ToyMoe())
    given = torch.rand(5, 12).softmax(-1)
    for scoring, scores in (("probabilities", given), ("softmax", given.log() + 3)):
        routers = RouterSet(base.routers, 12, 3, 16, scoring)
        torch.testing.assert_close(routers.log_probs(scores), given.log())
