"""The identities that every part shares: which expert, and the shape of a model's routing."""

from dataclasses import dataclass
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert; `layer_idx` counts Mixture-of-Experts layers from 0, not all layers."""

    layer_idx: int
    expert_idx: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a trace, a predictor, a store and a model must agree on before they may be combined.

    `expert_size` is the intermediate size of one routed expert; `fingerprint` names the weights
    (see `runtime.models.checkpoint`), and is empty where only the shape is known.
    """

    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    fingerprint: str

    @property
    def num_routed_experts(self) -> int:
        """Routed experts of the whole model, over all layers."""
        return self.num_moe_layers * self.num_experts
