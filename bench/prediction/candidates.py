"""Who is judged: predictors by name, fitted now where that takes no training, or from a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...collect.trace import TraceReader
from ...predictors.base import NAMES, Predictor, PredictorFactory, TrainedFamily, family_class
from ...predictors.checkpoint import load_predictor
from ...predictors.errors import PredictorError
from ...predictors.examples import Examples
from ...predictors.journal import Journal
from ...predictors.lookahead import LookaheadPredictor
from ...predictors.oracle import REACH, Oracle
from ...predictors.presets import Settings
from ...predictors.random import RandomPredictor
from ...runtime.errors import InvalidDataError, UsageError
from .replay import IN_PASS, PRE_ATTENTION

REFERENCE = "statistics"
"""What `brier_skill` is measured against; always fitted, shown only where it is asked for."""

FITTED_NOW = ("frequent", "cluster", "pattern", REFERENCE, "lookahead-corrected", "pre-attention")
NEED_NO_TRAINING = ("random", "frequent", "lookahead", "oracle", *FITTED_NOW[1:])
MAX_FIT_TOKENS = 400_000
"""Enough for counts and least squares; a family that wants more is trained into a folder."""

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One predictor to be judged: how to make one for a sequence, and what it needs.

    `hidden_layers` are the router inputs it must be given. `parameters` counts the numbers in its
    trained state; gates borrowed from the model are not its own.
    """

    name: str
    make: Callable[[], Predictor]
    hidden_layers: tuple[int, ...] = ()
    parameters: int = 0
    fitted_on: str = "nothing"
    moment: str = IN_PASS


class Candidates:
    """Makes candidates for the traces of one model; training examples are read once, when needed.

    `train` and `validation` splits only: no test document is ever read here.
    """

    def __init__(
        self, readers: Sequence[TraceReader], *, seed: int = 0, tell: Tell | None = None
    ) -> None:
        self._readers = readers
        self._shape = readers[0].shape
        self._seed = seed
        self._tell = tell
        self._examples = lru_cache(maxsize=2)(self._read_examples)

    def of(self, name: str) -> Candidate:
        """The candidate of a name or folder. UsageError lists the names; PredictorError otherwise.

        Blocks while it is fitted or read.
        """
        every_layer = tuple(range(self._shape.num_moe_layers))
        if name == "random":
            random = RandomPredictor(self._shape, seed=self._seed)
            return Candidate(name, lambda: random)
        if name == "oracle":
            return Candidate(name, lambda: Oracle(self._shape), hidden_layers=every_layer)
        if name == "lookahead":
            gates, scoring = self._gates(name)
            return Candidate(
                name,
                lambda: LookaheadPredictor(
                    self._shape,
                    gates,
                    depth=min(REACH, self._shape.num_moe_layers),
                    scoring=scoring,  # type: ignore[arg-type]
                    tokens="last",
                ),
                hidden_layers=every_layer,
            )
        if name in FITTED_NOW:
            return self._from(name, self.fitted(name), fitted_on="train split, now")
        folder = Path(name)
        if name not in NAMES and (folder.is_dir() or "/" in name):
            factory = load_predictor(folder, self._shape)
            return self._from(_folder_name(factory, folder), factory, fitted_on=str(folder))
        if name in NAMES:
            raise UsageError(
                f"predictor {name!r} must be trained first: outrider train TRACES --predictor "
                f"{name} --out DIR, then --predictor DIR; these need no training: "
                f"{', '.join(NEED_NO_TRAINING)}"
            )
        raise UsageError(
            f"predictor {name!r} is unknown; known are {', '.join(sorted(NAMES))}, or a folder "
            "made by outrider train"
        )

    def _from(self, name: str, factory: PredictorFactory, *, fitted_on: str) -> Candidate:
        gates, scoring = self._gates(name) if factory.needs_gates else (None, "softmax")
        is_pre_attention = factory.name == "pre-attention"
        return Candidate(
            name,
            lambda: factory.make(gates, scoring=scoring, tokens="last"),
            hidden_layers=tuple(factory.hidden_layers),
            parameters=_num_parameters(factory),
            fitted_on=fitted_on,
            moment=PRE_ATTENTION if is_pre_attention else IN_PASS,
        )

    def fitted(self, name: str) -> TrainedFamily:
        """The family of one of FITTED_NOW, fitted to the train split. Blocks on it."""
        needs_states = name in ("lookahead-corrected", "pre-attention")
        layers = tuple(range(self._shape.num_moe_layers)) if needs_states else ()
        if needs_states:
            self.refuse_missing_states(name, layers)
        train, validation = self._examples(layers)
        return family_class(name).fit(
            train,
            validation=validation,
            settings=Settings(features="routing", seed=self._seed),
            progress=Journal(tell=self._tell),
        )

    def refuse_missing_states(self, name: str, layers: Sequence[int]) -> None:
        """InvalidDataError where the traces lack a router input that predictor `name` is given."""
        for reader in self._readers:
            missing = sorted(set(layers) - set(reader.manifest.hidden_layers))
            if missing:
                recorded = ", ".join(map(str, reader.manifest.hidden_layers)) or "none"
                raise InvalidDataError(
                    f"predictor {name!r} needs the router inputs of MoE layers "
                    f"{', '.join(map(str, missing))}, which {str(reader.directory)!r} does not "
                    f"hold (recorded: {recorded}); collect with --hidden-states all"
                )

    def _read_examples(self, layers: tuple[int, ...]) -> tuple[Examples, Examples]:
        train, validation = (
            Examples.read(self._readers, split, hidden_layers=layers, max_tokens=MAX_FIT_TOKENS)
            for split in ("train", "validation")
        )
        return train, validation

    def _gates(self, name: str) -> tuple[list, str]:
        tensors, metadata = self._readers[0].routers()
        gates = []
        for layer_idx in range(self._shape.num_moe_layers):
            prefix = f"layer_{layer_idx}"
            weight = tensors.get(f"{prefix}.weight")
            if weight is None:
                raise InvalidDataError(
                    f"predictor {name!r} needs the model's gates, and the routers of "
                    f"{str(self._readers[0].directory)!r} are not plain ones (layer {layer_idx} "
                    "has no weight)"
                )
            bias = tensors.get(f"{prefix}.bias", tensors.get(f"{prefix}.e_score_correction_bias"))
            gates.append((weight, bias))
        return gates, "sigmoid" if metadata.get("scoring") == "sigmoid" else "softmax"


def _folder_name(factory: PredictorFactory, folder: Path) -> str:
    """The family, with the folder's name where that says more."""
    return factory.name if folder.name == factory.name else f"{factory.name} ({folder.name})"


def _num_parameters(factory: PredictorFactory) -> int:
    state = getattr(factory, "state", None)
    if state is None:
        return 0
    try:
        tensors, _ = state()
    except PredictorError:
        return 0
    return sum(int(np.asarray(tensor).size) for tensor in tensors.values())
