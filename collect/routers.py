"""Finds a model's routers by watching one tiny pass: what they are, what they return, what feeds
them.

Knows no family by name: a router is a module that returns (logits [T, E], weights [T, k], ids [T,
k]). Owns no recording; `capture` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .errors import NoRoutersError
from .schema import ModelShape

Scoring = Literal["softmax", "sigmoid", "probabilities"]
_PROBE_TOKENS = 8
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Router:
    """One layer's router, the norm whose output it reads (None where that is not one module's)."""

    layer_idx: int
    name: str
    module: nn.Module
    norm: nn.Module | None


@dataclass(frozen=True, slots=True)
class RouterSet:
    """All routers of a model in the order in which a pass asks them.

    `scoring` tells what the first returned tensor holds: logits that a softmax or a sigmoid turns
    into scores, or probabilities already. It is found by comparing both with the weights returned.
    """

    routers: tuple[Router, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    scoring: Scoring

    def check(self, shape: ModelShape) -> None:
        """NoRoutersError where the model does not route as `shape` says."""
        found = (len(self.routers), self.num_experts, self.top_k, self.hidden_size)
        stated = (shape.num_moe_layers, shape.num_experts, shape.top_k, shape.hidden_size)
        if found != stated:
            raise NoRoutersError(
                f"the model routes with {_words(found)}, its shape says {_words(stated)}; "
                "load the model whose configuration this is"
            )

    def log_probs(self, scores: torch.Tensor) -> torch.Tensor:
        """What the routers return first, [..., E], as natural log-probabilities in float32."""
        scores = scores.float()
        if self.scoring == "softmax":
            return scores.log_softmax(dim=-1)
        if self.scoring == "sigmoid":
            logs = nn.functional.logsigmoid(scores)
            return logs - logs.logsumexp(dim=-1, keepdim=True)
        return (scores / scores.sum(dim=-1, keepdim=True)).log()

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Routers and norms as `layer_{l}.{name}` and `layer_{l}.norm.{name}`, with metadata.

        Metadata has `scoring`, `top_k`, and `layer_{l}.norm.eps` where the norm states one.
        """
        tensors: dict[str, torch.Tensor] = {}
        metadata = {"scoring": self.scoring, "top_k": str(self.top_k)}
        for router in self.routers:
            prefix = f"layer_{router.layer_idx}"
            metadata[f"{prefix}.name"] = router.name
            for name, tensor in _state(router.module).items():
                tensors[f"{prefix}.{name}"] = tensor
            if router.norm is not None:
                for name, tensor in _state(router.norm).items():
                    tensors[f"{prefix}.norm.{name}"] = tensor
                eps = getattr(router.norm, "variance_epsilon", getattr(router.norm, "eps", None))
                if eps is not None:
                    metadata[f"{prefix}.norm.eps"] = repr(float(eps))
        return tensors, metadata


@dataclass(slots=True)
class _Call:
    module: nn.Module
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    norm: nn.Module | None


@dataclass(slots=True)
class _Watch:
    """Hooks on every module of one pass. Outputs of norms are kept so that no address is reused."""

    calls: list[_Call] = field(default_factory=list)
    norms: dict[int, tuple[nn.Module, torch.Tensor]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            if "norm" in type(module).__name__.lower():
                self.norms[output.data_ptr()] = (module, output)
            return
        if not _is_routing(output) or not inputs or not isinstance(inputs[0], torch.Tensor):
            return
        norm = self.norms.get(inputs[0].data_ptr())
        self.calls.append(_Call(module, output, None if norm is None else norm[0]))


def find_routers(model: nn.Module) -> RouterSet:
    """Run one pass of eight tokens and return the model's routers. Blocks for that pass.

    NoRoutersError where nothing routes (a dense model), or where layers route differently.
    """
    watch = _Watch()
    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        device = model_device(model)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        token_ids = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0) % vocabulary
        with torch.inference_mode():
            decoder(model)(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not watch.calls:
        raise NoRoutersError(
            f"{type(model).__name__} has no routers that return (logits, weights, ids): "
            "it is a dense model, or of a family that routes in a way not supported; traces need "
            "routed experts"
        )
    return _router_set(model, watch.calls)


def decoder(model: nn.Module) -> Any:
    """The model without its output head, which routing does not need."""
    return getattr(model, "base_model", model)


def model_device(model: nn.Module) -> torch.device:
    """Where token ids must be to enter the model."""
    embeddings = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return embeddings if embeddings.type != "meta" else torch.device("cpu")


def _is_routing(output: Any) -> bool:
    if not isinstance(output, tuple) or len(output) != 3:
        return False
    if not all(isinstance(part, torch.Tensor) and part.dim() == 2 for part in output):
        return False
    scores, weights, ids = output
    return (
        scores.is_floating_point()
        and weights.is_floating_point()
        and not ids.is_floating_point()
        and len(scores) == len(weights) == len(ids)
        and scores.shape[1] > ids.shape[1]
    )


def _router_set(model: nn.Module, calls: Sequence[_Call]) -> RouterSet:
    names = {id(module): name for name, module in model.named_modules()}
    sizes = {(call.outputs[0].shape[1], call.outputs[2].shape[1]) for call in calls}
    if len(sizes) != 1 or len({id(call.module) for call in calls}) != len(calls):
        described = ", ".join(f"{experts} experts top-{top_k}" for experts, top_k in sorted(sizes))
        raise NoRoutersError(
            f"the layers of {type(model).__name__} route differently ({described}); "
            "traces need one number of experts and one top-k"
        )
    num_experts, top_k = sizes.pop()
    routers = tuple(
        Router(layer_idx, names[id(call.module)], call.module, call.norm)
        for layer_idx, call in enumerate(calls)
    )
    return RouterSet(
        routers=routers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=int(model.get_input_embeddings().weight.shape[1]),  # type: ignore[operator]
        scoring=_scoring(calls),
    )


def _scoring(calls: Sequence[_Call]) -> Scoring:
    """Which reading of the scores explains the weights best, up to a factor a token."""
    errors: dict[Scoring, float] = {"probabilities": 0.0, "softmax": 0.0, "sigmoid": 0.0}
    for call in calls:
        scores, weights, ids = (
            call.outputs[0].float(),
            call.outputs[1].float(),
            call.outputs[2].long(),
        )
        weights = topk_weights(weights, ids)
        looks_normal = bool((scores >= 0).all()) and bool(
            ((scores.sum(dim=-1) - 1).abs() < _TOLERANCE).all()
        )
        if not looks_normal:
            errors["probabilities"] = float("inf")
        candidates: dict[Scoring, torch.Tensor] = {
            "probabilities": scores,
            "softmax": scores.softmax(dim=-1),
            "sigmoid": scores.sigmoid(),
        }
        for name, candidate in candidates.items():
            chosen = candidate.gather(1, ids)
            if ids.shape[1] > 1:
                chosen, weights = _share(chosen), _share(weights)
            errors[name] += float((chosen - weights).abs().max())
    return min(errors, key=lambda name: errors[name])


def topk_weights(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weights [T, k] of `ids`, also where a router returns them spread over all experts [T, E]."""
    return weights if weights.shape == ids.shape else weights.gather(1, ids)


def _share(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    aligned: Any = nullcontext()
    if any(tensor.is_meta for tensor in tensors.values()):
        # An offloaded module holds its weights only while it runs; accelerate can bring them back.
        from accelerate.utils import align_module_device

        aligned = align_module_device(module)
    with aligned:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _words(sizes: tuple[int, int, int, int]) -> str:
    layers, experts, top_k, hidden = sizes
    return f"{layers} layers of {experts} experts, top-{top_k}, hidden size {hidden}"
