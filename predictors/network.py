"""What the learned before-the-token families share: a network that corrects the log-odds of token
statistics.

A family adds the network's own form; training is `train`'s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..collect.schema import ModelShape
from .calibration import Calibration
from .checkpoint import take
from .context import ContextFamily, Window
from .encoder import Encoder, Frames, Vocabulary, frames_of, token_profiles
from .errors import PredictorError, TrainingDataError
from .presets import Settings, make_settings
from .statistics import Statistics

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal

MIN_SAMPLES = 8
_PREFIX = "network."


class Network(nn.Module):
    """Frames and base log-odds to scores; trained on whole samples, run on single windows."""

    encoder: Encoder

    @abstractmethod
    def forward(
        self, frames: Frames, bases: Mapping[int, Tensor], last_only: bool = False
    ) -> dict[int, Tensor]:
        """Scores [B, T, L, E] by horizon, for each in `bases`; T is 1 if last_only.

        They rank the experts; `inclusion` makes probabilities of them.
        """

    @abstractmethod
    def auxiliary(
        self,
        scores: Mapping[int, Tensor],
        used: Mapping[int, Tensor],
        valid: Mapping[int, Tensor],
    ) -> Tensor:
        """A loss of the last forward's own parts, to be added to the losses of the scores.

        `used` [B, T, L, E] bool and `valid` [B, T] bool of each horizon.
        """


class NetworkFamily(ContextFamily):
    """A trained family made of `Statistics` and a network that corrects them."""

    def __init__(
        self, statistics: Statistics, network: Network, settings: Settings, hidden_layers: tuple
    ) -> None:
        assert statistics.frequencies is not None
        super().__init__(
            statistics.shape,
            frequencies=statistics.frequencies,
            # Each further layer of the encoder reaches as far again.
            context=settings.layers * (settings.context - 1) + 1,
            horizon=statistics.horizon,
            hidden_layers=hidden_layers,
        )
        self.statistics = statistics
        self.network = network.eval()
        self.settings = settings
        self.vocabulary = Vocabulary(statistics.tables[0].keys)

    @classmethod
    @abstractmethod
    def build(
        cls,
        shape: ModelShape,
        settings: Settings,
        *,
        vocabulary: int,
        num_states: int,
        constants: Mapping[str, np.ndarray],
    ) -> Network:
        """The untrained network; `constants` are what `prepare` found in the traces."""

    @classmethod
    @abstractmethod
    def prepare(cls, examples: Examples, settings: Settings) -> dict[str, np.ndarray]:
        """What the network takes from the traces as given and does not train."""

    @classmethod
    def fit(
        cls, examples: Examples, *, validation: Examples, settings: Settings, progress: Journal
    ) -> Self:
        from .train import train_network

        hidden_layers = tuple(sorted(examples.hidden)) if settings.features == "hidden" else ()
        if settings.features == "hidden" and not hidden_layers:
            raise TrainingDataError(
                "the traces have no hidden states; collect with --hidden-states ensemble or all, "
                "or train with --features routing"
            )
        num_samples = len(examples.sample_offsets) - 1
        if num_samples < MIN_SAMPLES:
            raise TrainingDataError(
                f"{num_samples} training samples, at least {MIN_SAMPLES} are needed to train "
                f"{cls.name}; collect more traces"
            )
        statistics = Statistics.fit(
            examples, validation=validation, settings=settings, progress=progress
        )
        torch.manual_seed(settings.seed)
        network = cls.build(
            examples.shape,
            settings,
            vocabulary=len(Vocabulary(statistics.tables[0].keys)),
            num_states=len(hidden_layers) * examples.shape.hidden_size,
            constants=cls.prepare(examples, settings),
        )
        made = cls(statistics, network, settings, hidden_layers)
        if hidden_layers:
            with torch.no_grad():
                network.encoder.token.weight.copy_(
                    token_profiles(examples, made.vocabulary, width=settings.width)
                )
        train_network(made, examples, validation, settings=settings, progress=progress)
        made._round()
        made.calibrate(validation)
        return made

    @torch.inference_mode()
    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        base = torch.from_numpy(self.statistics.log_odds(window, horizon))[:, None]
        frames = frames_of(window, self.vocabulary, self.shape)
        return self.network(frames, {horizon: base}, last_only=True)[horizon][:, 0].numpy()

    @property
    def parameters(self) -> int:
        return sum(one.numel() for one in self.network.parameters()) + self.statistics.parameters

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, config = self.statistics.state()
        for name, tensor in self.network.state_dict().items():
            half = tensor.half() if tensor.is_floating_point() else tensor
            tensors[_PREFIX + name] = half.numpy()
        return tensors, {
            "statistics": config,
            "settings": msgspec.to_builtins(self.settings),
            "hidden_layers": list(self.hidden_layers),
            "calibration": self.calibration.config(),
        }

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        given = {name: value for name, value in config["settings"].items() if name != "preset"}
        settings = make_settings(config["settings"]["preset"], given)
        statistics = Statistics.from_state(tensors, config["statistics"], shape)
        hidden_layers = tuple(int(layer_idx) for layer_idx in config["hidden_layers"])
        if any(not 0 <= layer_idx < shape.num_moe_layers for layer_idx in hidden_layers):
            raise PredictorError(
                f"hidden_layers are {hidden_layers}; there are 0 to {shape.num_moe_layers - 1}"
            )
        own = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
        network = cls.build(
            shape,
            settings,
            vocabulary=len(Vocabulary(statistics.tables[0].keys)),
            num_states=len(hidden_layers) * shape.hidden_size,
            constants=own,
        )
        state = {}
        for name, tensor in network.state_dict().items():
            found = take(own, name, tuple(tensor.shape))
            state[name] = torch.from_numpy(found.copy()).to(tensor.dtype)
        network.load_state_dict(state)
        made = cls(statistics, network, settings, hidden_layers)
        made.calibration = Calibration.from_config(config, shape, horizon=made.horizon)
        return made

    def _round(self) -> None:
        """Keep what a checkpoint will keep, so that a saved predictor answers as this one does."""
        with torch.no_grad():
            for tensor in self.network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half())
