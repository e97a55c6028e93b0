"""Forecasts made once and shared by all arms: what a predictor said of each pass of each sequence.

Knows predictors, arrays and one file per predictor; no caches.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..predictors.base import Forecast


@dataclass(frozen=True, slots=True)
class Foretold:
    """Everything one predictor says while it follows the T tokens of a routing.

    `before` [horizon, T, L, E] float16 speaks of the token's pass and of the one after, where
    `is_known` [horizon, T]; `layers` maps a layer to what is said there of the layers after it,
    [T, layers, E] float16. Either may be missing. `offsets` and `prompt_tokens` are the routing's.
    """

    offsets: np.ndarray
    prompt_tokens: int
    before: np.ndarray | None
    is_known: np.ndarray
    layers: dict[int, np.ndarray]

    def before_token(self, sequence: int, step: int) -> list[Forecast]:
        """What is known when the pass of a decode step begins: of it, and of the next."""
        if self.before is None:
            return []
        row = self._row(sequence, step)
        return [
            Forecast(step + ahead, 0, told.shape[1], told[row].astype(np.float32))
            for ahead, told in enumerate(self.before)
            if self.is_known[ahead, row]
        ]

    def in_pass(self, sequence: int, step: int, layer_idx: int) -> list[Forecast]:
        """What is said at a layer of later ones."""
        told = self.layers.get(layer_idx)
        if told is None:
            return []
        values = told[self._row(sequence, step)].astype(np.float32)
        return [Forecast(step, layer_idx + 1, layer_idx + 1 + len(values), values)]

    def _row(self, sequence: int, step: int) -> int:
        return int(self.offsets[sequence]) + self.prompt_tokens + step - 1

    def best(self, num_layers: int) -> np.ndarray | None:
        """[T, L, E]: of each layer the newest there is before its router runs; None without any."""
        if self.before is None and not self.layers:
            return None
        some = next(iter(self.layers.values())) if self.before is None else self.before[0]
        best = np.zeros((len(some), num_layers, some.shape[-1]), dtype=some.dtype)
        if self.before is not None:
            best[:] = self.before[0]
        for layer_idx, told in sorted(self.layers.items()):
            best[:, layer_idx + 1 : layer_idx + 1 + told.shape[1]] = told
        return best

    def save(self, folder: Path) -> None:
        """Write it for other processes of this run, which map the files into memory."""
        folder.mkdir(parents=True)
        np.save(folder / "offsets.npy", self.offsets)
        np.save(folder / "prompt_tokens.npy", np.array(self.prompt_tokens))
        np.save(folder / "is_known.npy", self.is_known)
        if self.before is not None:
            np.save(folder / "before.npy", self.before)
        for layer_idx, told in self.layers.items():
            np.save(folder / f"layer-{layer_idx}.npy", told)


def load_foretold(folder: Path) -> Foretold:
    """What `Foretold.save` wrote; large arrays stay on disk and are mapped."""
    layers = {int(file.stem.rpartition("-")[2]): file for file in folder.glob("layer-*.npy")}
    before = folder / "before.npy"
    return Foretold(
        offsets=_load(folder / "offsets.npy"),
        prompt_tokens=int(_load(folder / "prompt_tokens.npy")),
        before=_load(before) if before.exists() else None,
        is_known=_load(folder / "is_known.npy"),
        layers={layer_idx: _load(file) for layer_idx, file in sorted(layers.items())},
    )


def _load(file: Path) -> np.ndarray:
    # A plain array over the mapping: each slice of numpy's own kind of mapped array costs more.
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
