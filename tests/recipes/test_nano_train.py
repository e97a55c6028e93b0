"""A run that was cut off ends as one that was not; the schedule ends at zero, in time."""

import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from outrider.runtime.models.deepseek import DeepseekConfig
from recipes.nano.corpus import DOMAINS
from recipes.nano.data import Windows, bytes_per_token
from recipes.nano.export import export
from recipes.nano.train import Plan, Trainer, progress_of

CONFIG = DeepseekConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=4,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    max_position_embeddings=64,
    aux_loss_alpha=0.01,
    bos_token_id=0,
    eos_token_id=0,
)


def plan(**changes: object) -> Plan:
    small = {
        "workers": 1,
        "tokens": 3840,
        "length": 32,
        "constant_length": 16,
        "validation_windows": 2,
        "warmup_steps": 2,
    }
    return Plan(**(small | changes))


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step(1.0) for _ in range(steps)]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tokens: Path, tmp_path: Path) -> None:
    whole = losses(Trainer(tokens, tmp_path / "whole", plan(), config=CONFIG), 6)
    first = Trainer(tokens, tmp_path / "cut", plan(), config=CONFIG)
    before = losses(first, 3)
    first.save()
    losses(first, 1)  # lost with the process: it was not saved
    after = losses(Trainer(tokens, tmp_path / "cut", plan(), config=CONFIG), 3)
    assert before + after == whole


def test_workers_that_share_a_step_make_the_same_step(tokens: Path, tmp_path: Path) -> None:
    alone = Trainer(tokens, tmp_path / "alone", plan(), config=CONFIG)
    shared = Trainer(tokens, tmp_path / "shared", plan(workers=3), config=CONFIG)
    assert losses(shared, 4) == pytest.approx(losses(alone, 4), rel=1e-5)
    for mine, theirs in zip(alone.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    first, *twins = shared.crew.workers
    for twin in twins:
        pairs = zip(first.model.parameters(), twin.model.parameters(), strict=True)
        assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)


def test_training_lowers_the_loss_and_ends_decayed(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(tokens, tmp_path, plan(tokens=9600), config=CONFIG)
    trainer.run()
    log = (tmp_path / "train.log").read_text().splitlines()
    steps = [dict(item.split("=") for item in line.split()[1:]) for line in log if " step=" in line]
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"])
    rates = [float(step["rate"]) for step in steps]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1.0 and rates[-1] < 0.2
    assert trainer.progress.history[-1]["tokens"] == trainer.progress.tokens == 9600


def test_a_longer_run_goes_on_from_before_the_decay(tokens: Path, tmp_path: Path) -> None:
    Trainer(tokens, tmp_path / "twice", plan(), config=CONFIG).run()
    longer = plan(tokens=5760)
    second = Trainer(tokens, tmp_path / "twice", longer, config=CONFIG)
    begun = second.progress.tokens
    assert 0 < begun < 3840
    second.run()
    once = Trainer(tokens, tmp_path / "once", longer, config=CONFIG)
    once.run()
    assert second.progress.history[-1] == once.progress.history[-1]
    assert progress_of(second.undecayed_file).tokens > begun


def test_an_ended_run_stays_as_it_is(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(tokens, tmp_path, plan(), config=CONFIG)
    trainer.run()
    again = Trainer(tokens, tmp_path, plan(), config=CONFIG)
    assert again.run()
    assert again.progress.step == trainer.progress.step
    pairs = zip(again.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_run_without_time_left_ends(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(tokens, tmp_path, plan(tokens=10**9, until=time.time() + 0.5), config=CONFIG)
    trainer.run()
    assert 0 < trainer.progress.tokens < 10**9
    assert trainer.state_file.exists()


def test_the_exported_checkpoint_is_the_trained_model(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("recipes.nano.export.CONFIG", CONFIG)
    trainer = Trainer(tokens, tmp_path / "run", plan(), config=CONFIG)
    trainer.run()
    folder = export(trainer.state_file, tokens, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    ids = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
    trainer.model.set_experts_implementation("eager")
    with torch.no_grad():
        ours, theirs = trainer.model(ids).logits, loaded.float()(ids).logits
    # bf16 keeps 8 bits of each weight; a flipped expert would move the logits further than this.
    assert (ours - theirs).norm() < 0.05 * ours.norm()
    assert '"rope_theta": 10000' in (folder / "config.json").read_text()


def test_batches_serve_the_domains_in_turn_and_every_window_once_a_pass(tokens: Path) -> None:
    windows = Windows(tokens, "train", length=32)
    count = windows.count(DOMAINS[0])
    seen = torch.cat([windows.batch(step, sequences=6) for step in range(count)])
    for place, domain in enumerate(DOMAINS):
        served = {tuple(row) for row in seen[place::6].tolist()}
        assert served == {tuple(windows.window(domain, number).tolist()) for number in range(count)}


def test_bytes_per_token_adds_up_to_the_text(tokens: Path) -> None:
    lengths = bytes_per_token(tokens)
    text = "one two – ünï 👍 three"
    ids = Tokenizer.from_file(str(tokens / "tokenizer.json")).encode(text).ids
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[0] == 0
