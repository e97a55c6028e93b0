"""From a training state to a checkpoint folder as DeepSeek-MoE publishes its own: bf16, one tensor
per expert matrix.

Owns the folder's contents. The model card that lies in it is `card`'s.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from outrider.runtime.models.deepseek import DeepseekForCausalLM

from .train import CONFIG, progress_of

FIGURES = "training.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Figures:
    """What the card must know of the run and cannot measure."""

    steps: int
    tokens: int
    seconds: float
    decayed: bool
    validation: list[dict[str, float]]


def export(state: Path, tokens: Path, out: Path) -> Path:
    """Writes the model of a state file into folder `out`, replacing what is there; -> `out`.

    `tokens` is the folder with the tokenizer. FileNotFoundError before the first state is saved.
    """
    if not state.exists():
        raise FileNotFoundError(
            f"no training state at {str(state)!r}; train first (python -m recipes.nano train)"
        )
    model = DeepseekForCausalLM(CONFIG)
    progress = progress_of(state)
    with safe_open(state, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.to(dtype=torch.bfloat16).save_pretrained(partial)
    _publish_config(partial / "config.json")
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokens / name, partial / name)
    figures = Figures(
        steps=progress.step,
        tokens=progress.tokens,
        seconds=round(progress.train_seconds, 1),
        decayed=progress.tokens == progress.target,
        validation=progress.history,
    )
    (partial / FIGURES).write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
    _replace(partial, out)
    return out


def _publish_config(path: Path) -> None:
    """Spells the rotary embedding as published configurations do; transformers reads both, other
    programs this.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(partial: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)  # the weights' writer keeps them to their owner
        path.replace(out / path.name)
    partial.rmdir()
