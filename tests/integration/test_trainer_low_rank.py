"""Low-rank pairs in a Transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from rgft.errors import AttachError, ConfigError
from rgft.guide import Guide
from rgft.integrations import RGFTCallback, enable
from tests.decoders import wide_decoder
from tests.families import FAMILIES
from tests.integration.trainers import HALF, assert_equal, examples, make_trainer, weights

LOW_RANK: dict[str, Any] = {"low_rank": {"rank": 3, "others": "frozen"}}


class Stop(TrainerCallback):
    """Ends training after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, granularity: Any) -> None:
    def trainer(name: str, *callbacks: TrainerCallback) -> tuple[Any, Guide]:
        made = make_trainer(
            tmp_path / name, dataset=examples(96), more={"callbacks": list(callbacks)}, save_strategy="steps",
            save_steps=1000, gradient_accumulation_steps=2,
        )  # fmt: skip
        return made, enable(made, budget=0.6, mask=HALF, granularity=granularity, update=LOW_RANK)

    whole, whole_guide = trainer("whole")
    whole.train()
    stopped, _ = trainer("stopped", Stop(4))
    stopped.train()
    resumed, guide = trainer("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step > 4
    assert guide.plan == whole_guide.plan
    assert guide.plan.pairs
    assert guide.ledger.spent_flops == whole_guide.ledger.spent_flops
    assert_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_checkpoints_are_plain_models_with_pairs_merged(tmp_path: Path, granularity: Any) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(96), save_strategy="steps", save_steps=6)
    guide = enable(trainer, preset="full", granularity=granularity, update=LOW_RANK)
    batch, seen = FAMILIES["bert"].batch(), dict[str, Any]()

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                with torch.no_grad():
                    seen["logits"] = trainer.model.eval()(**batch).logits
                trainer.model.train()
                seen["weights"] = weights(trainer.model)

    trainer.add_callback(Keep())
    before = weights(trainer.model)
    trainer.train()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert_equal(seen["weights"], weights(saved))
    assert not torch.equal(before["bert.encoder.layer.0.output.dense.weight"],
                           weights(saved)["bert.encoder.layer.0.output.dense.weight"])  # fmt: skip
    torch.testing.assert_close(saved(**batch).logits, seen["logits"], rtol=1e-5, atol=1e-6)
    assert guide._binding.low_rank is not None
    assert not [name for name, _ in trainer.model.named_parameters() if "low_rank" in name]


def test_the_best_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    """Into a model that has trained pairs by then: what is loaded takes their place."""
    trainer = make_trainer(
        tmp_path, dataset=examples(96), save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=3e-3,
        more={"eval_dataset": examples(16, seed=1)},
    )  # fmt: skip
    enable(trainer, preset="full", update=LOW_RANK)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name != f"checkpoint-{trainer.state.global_step}"  # the worst, by greater_is_better
    assert_equal(weights(trainer.model), weights(AutoModelForSequenceClassification.from_pretrained(best)))


def test_the_trainer_clips_decays_and_clears_pairs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(96), weight_decay=0.1, max_grad_norm=1e-3, max_steps=4)
    guide = enable(trainer, preset="full", update=LOW_RANK)
    low_rank = guide._binding.low_rank
    assert low_rank is not None
    norms: list[float] = []

    class Clipped(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            assert all(p.grad is not None for pairs in low_rank.pairs.values() for p in pairs)
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    class Cleared(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert all(p.grad is None for pairs in low_rank.pairs.values() for p in pairs)

    trainer.add_callback(Clipped())
    trainer.add_callback(Cleared())
    trainer.train()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
    decays = {id(p): group["weight_decay"] for group in trainer_groups(guide) for p in group["params"]}
    assert {decays[id(p)] for pairs in low_rank.pairs.values() for p in pairs} == {0.1}


def trainer_groups(guide: Guide) -> list[dict[str, Any]]:
    assert guide.optimizer is not None
    return guide.optimizer.param_groups


def test_what_needs_pairs_from_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"update.low_rank: when a callback hears of it, the optimizer exists already"
    ):
        RGFTCallback(preset="full", update=LOW_RANK)
    trainer = make_trainer(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(AttachError, match=r"the optimizer lacks the low-rank pairs of \d components.*, or train dense"):
        enable(trainer, preset="full", update=LOW_RANK)
    assert "_rgft_guide" not in trainer.model.__dict__


def test_a_language_model_with_an_optimizer_of_the_users_trains_dense_weights(tmp_path: Path) -> None:
    model = wide_decoder()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model=model, dataset=examples(kind="tokens"), more={"optimizers": (mine, None)})
    guide = enable(trainer, budget=0.5)
    assert guide.config.update.low_rank is None
    trainer.train()
    assert guide.step_count > 0
    trainer = make_trainer(tmp_path, model=model, dataset=examples(kind="tokens"))
    guide = enable(trainer, budget=0.5)
    assert guide.config.update.pairs is not None
    guide.detach()
