from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, set_seed

from rgft import Config
from rgft.errors import AttachError, BudgetError, ConfigError, NonFiniteError, OptimizerError, RGFTWarning
from rgft.guide import Guide
from rgft.integrations import RGFTCallback, enable
from rgft.integrations.trainer_checks import refuse_unsupported
from tests.families import FAMILIES
from tests.integration.trainers import HALF, Watch, arguments, assert_equal, examples, make_trainer, weights


def train_plain(folder: Path, **settings: Any) -> dict[str, Tensor]:
    trainer = make_trainer(folder, **settings)
    trainer.train()
    return weights(trainer.model)


# -------------------------------------------------------------------- nothing changes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 4},
        {"family": "llama", "max_grad_norm": 0.0, "max_steps": 5},
        {"family": "t5", "weight_decay": 0.1, "num_train_epochs": 1},
    ],
)
def test_full_preset_is_the_plain_trainer_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = train_plain(tmp_path / "plain", **settings)
    trainer = make_trainer(tmp_path / "guided", **settings)
    with pytest.warns(RGFTWarning, match="preset 'full' decides nothing"):
        guide = enable(trainer, preset="full")
    trainer.train()
    assert guide.step_count == trainer.state.global_step > 0
    assert guide.flops_fraction == pytest.approx(1.0, rel=1e-9)
    assert_equal(plain, weights(trainer.model))


def test_enabling_draws_no_random_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(200))
    set_seed(5)
    before = torch.get_rng_state()
    enable(trainer, budget=0.5, mask=HALF)
    assert torch.equal(before, torch.get_rng_state())


def test_everything_is_taken_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(200))
    model, dataset, collator = trainer.model, trainer.train_dataset, trainer.data_collator
    names = [name for name, _ in model.named_parameters()]
    callbacks = list(trainer.callback_handler.callbacks)
    enable(trainer, budget=0.3, mask=HALF, granularity="head")
    assert [name for name, _ in model.named_parameters()] != names
    trainer.train()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert trainer.train_dataset is dataset
    assert trainer.data_collator is collator
    assert trainer.callback_handler.callbacks == callbacks
    assert not {"train", "log", "training_step", "create_optimizer", "create_scheduler"} & vars(trainer).keys()
    trainer.train()  # plain, with an optimizer of its own
    assert not any(key.startswith("rgft/") for key in trainer.state.log_history[0])


# -------------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1, "max_grad_norm": 0.1},
        {"family": "llama"},
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_run_ends_within_its_budget_and_reads_the_cache(tmp_path: Path, settings: dict[str, Any]) -> None:
    family = settings.get("family", "bert")
    trainer = make_trainer(tmp_path, dataset=examples(120, kind=FAMILIES[family].kind), **settings)
    before = weights(trainer.model)
    guide = enable(
        trainer, budget=0.45, mask=HALF, execution={"positions": "all"}
    )  # else the epochs end before the budget
    seen = Watch(lambda: (guide.cache.hits, guide.ledger.spent_flops, guide.plan.cut))  # type: ignore[union-attr]
    trainer.add_callback(seen)
    trainer.train()
    plan = guide.run_plan
    assert plan is not None
    accumulation = settings.get("gradient_accumulation_steps", 1)
    one_step = (seen.seen[-1][1] - seen.seen[-2][1]) * 1.01
    assert plan.flops - one_step < guide.ledger.spent_flops <= plan.flops == pytest.approx(0.45 * plan.full_flops)
    # 120 examples, a probe pool may be aside: 15 batches at most in the first epoch
    per_epoch = -(-15 // accumulation)
    assert len(seen.seen) > per_epoch + 1
    assert seen.seen[per_epoch // 2][0] == 0
    assert seen.seen[-1][0] > 0
    assert seen.seen[-1][2] > 0
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer.model).items())


def test_the_schedule_ends_with_the_budget(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(160), warmup_steps=0.1)
    enable(trainer, budget=0.4, mask=HALF, execution={"positions": "all"})
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[0] < 0.5e-3
    assert rates[-1] < 0.05 * max(rates)
    assert len(rates) < 60  # 20 batches × 3 epochs, had it gone to the end


@pytest.mark.parametrize("accumulation", [1, 2])
def test_warm_up_is_in_optimizer_steps(tmp_path: Path, accumulation: int) -> None:
    trainer = make_trainer(
        tmp_path, dataset=examples(160), warmup_steps=4, lr_scheduler_type="constant_with_warmup",
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    enable(trainer, budget=0.5, preset="full")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [rate < 0.99e-3 for rate in rates[:6]] == [True] * 4 + [False] * 2


def test_a_schedule_that_cannot_follow_the_budget_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(160), lr_scheduler_type="polynomial")
    enable(trainer, budget=0.4, mask=HALF)
    with pytest.warns(RGFTWarning, match="'polynomial'.*not with the budget"):
        trainer.train()


def test_off_components_do_not_move(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120), weight_decay=0.1)
    guide = enable(trainer, budget=0.3, mask=HALF)
    model = trainer.model

    def look() -> tuple[frozenset[str], dict[str, Tensor]]:
        return guide.active, {name: p.detach().clone() for name, p in model.named_parameters()}

    watch = Watch(look)
    trainer.add_callback(watch)
    trainer.train()
    names = {c.name: [part.parameter for part in c.slices] for c in guide.partition}
    checked = 0
    for (_, before), (active, after) in zip(watch.seen, watch.seen[1:], strict=False):
        for component, parameters in names.items():
            moved = [name for name in parameters if not torch.equal(before[name], after[name])]
            if component not in active:
                assert not moved
                checked += 1
            elif component == "classifier":
                assert moved
    assert checked > 20


def test_the_prefix_stays_in_eval_mode_though_the_trainer_calls_train(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80))
    guide = enable(trainer, budget=0.4, mask=HALF, warmup_fraction=0.5, execution={"cache": "none"})
    seen: set[tuple[bool, bool]] = set()
    dropout = trainer.model.bert.encoder.layer[0].output.dropout
    dropout.register_forward_hook(lambda module, args, output: seen.add((guide.plan.cut > 1, module.training)))
    trainer.train()
    assert seen == {(False, True), (True, False)}


def test_what_is_logged(tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    trainer = make_trainer(tmp_path, dataset=examples(120), more={"callbacks": [Tracker()]})
    enable(trainer, budget=0.5, mask=HALF, warmup_fraction=0.5, execution={"positions": "all"})
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    keys = {"rgft/budget_spent", "rgft/flops_fraction", "rgft/active_components", "rgft/cut"}
    assert all(keys <= entry.keys() for entry in steps)
    assert all(isinstance(value, float) for entry in steps for key, value in entry.items() if key.startswith("rgft/"))
    assert [entry["rgft/budget_spent"] for entry in steps] == sorted(entry["rgft/budget_spent"] for entry in steps)
    assert 0.9 < steps[-1]["rgft/budget_spent"] <= 1.0
    assert 0.0 < steps[-1]["rgft/captured_share"] <= 1.0
    assert steps[-1]["rgft/cut"] > 0
    assert keys <= reported[0].keys()
    json.dumps(trainer.state.log_history)


# -------------------------------------------------------------------- beside training


def test_evaluation_and_generation_in_between_change_nothing(tmp_path: Path) -> None:
    class Generate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % 4 == 0:
                model.eval()
                model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)

    def trained(name: str, **settings: Any) -> tuple[dict[str, Tensor], float]:
        more = {"eval_dataset": examples(16, kind="lm", seed=1)} if settings else {}
        more |= {"callbacks": [Generate()]} if settings else {}
        trainer = make_trainer(tmp_path / name, family="llama", dataset=examples(120, kind="lm"), more=more, **settings)
        guide = enable(trainer, budget=0.4, mask=HALF)
        trainer.train()
        return weights(trainer.model), guide.ledger.spent_flops

    plain, spent = trained("plain")
    watched, spent_watched = trained("watched", eval_strategy="steps", eval_steps=3)
    assert spent == spent_watched
    assert_equal(plain, watched)


def test_evaluation_sees_what_the_plain_model_gives(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120), more={"eval_dataset": examples(24, seed=1)})
    enable(trainer, budget=0.4, mask=HALF, granularity="head")
    losses: list[float] = []
    trainer.add_callback(Watch(lambda: losses.append(trainer.evaluate()["eval_loss"])))
    trainer.train()
    fresh = FAMILIES["bert"].build(seed=3)
    fresh.load_state_dict(trainer.model.state_dict())
    other = make_trainer(tmp_path / "other", model=fresh, more={"eval_dataset": examples(24, seed=1)})
    assert other.evaluate()["eval_loss"] == losses[-1]


# -------------------------------------------------------------------- saving and resuming


@pytest.mark.parametrize(
    ("stop", "settings", "config"),
    [
        (3, {}, {"budget": 0.4}),
        (9, {"gradient_accumulation_steps": 2}, {"budget": 0.6, "granularity": "head"}),
        (14, {"family": "llama"}, {"budget": 0.5, "probe": {"interval": 5, "size": 4}}),
        (7, {"num_train_epochs": 1}, {"preset": "proposal_b"}),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, stop: int, settings: dict[str, Any], config: dict[str, Any]
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                control.should_training_stop = control.should_save = True

    def trainer(name: str, callbacks: list[TrainerCallback]) -> tuple[Any, Guide]:
        dataset = examples(96, kind=FAMILIES[settings.get("family", "bert")].kind)
        made = make_trainer(
            tmp_path / name, dataset=dataset, more={"callbacks": callbacks}, save_strategy="steps", save_steps=1000,
            **settings,
        )  # fmt: skip
        return made, enable(made, **config)

    whole, whole_guide = trainer("whole", [])
    whole.train()
    stopped, _ = trainer("stopped", [Stop()])
    stopped.train()
    assert (tmp_path / "stopped" / f"checkpoint-{stop}" / "rgft_state.pt").is_file()
    resumed, guide = trainer("stopped", [])
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step > stop
    assert guide.plan == whole_guide.plan
    assert guide.error_map == whole_guide.error_map
    assert guide.ledger.spent_flops == whole_guide.ledger.spent_flops
    assert_equal(weights(whole.model), weights(resumed.model))


def test_resuming_without_rgfts_state_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    trainer = make_trainer(tmp_path, dataset=examples(64))
    enable(trainer, budget=0.9)
    with pytest.raises(AttachError, match="checkpoint was written without RGFT"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80), save_strategy="steps", save_steps=4, max_steps=8)
    enable(trainer, budget=0.9)
    trainer.train()
    trainer = make_trainer(tmp_path, dataset=examples(80), max_steps=8)
    enable(trainer, budget=0.8)
    with pytest.raises(ConfigError, match="another configuration"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_saved_models_load_plainly_and_are_what_was_trained(tmp_path: Path, granularity: Any) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120), save_strategy="steps", save_steps=6)
    enable(trainer, budget=0.4, mask=HALF, granularity=granularity)
    at_six: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                at_six.update(weights(trainer.model))

    trainer.add_callback(Keep())
    trainer.train()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert_equal(at_six, weights(saved))
    trainer.save_model(str(tmp_path / "final"))
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert_equal(weights(trainer.model), weights(final))
    # The run's last step is saved too, as the Trainer does at its own last step.
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_the_last_evaluation_and_checkpoint_see_the_averaged_weights(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, save_strategy="steps", save_steps=1000, eval_strategy="steps", eval_steps=1000,
        more={"eval_dataset": examples(16, seed=1)},
    )  # fmt: skip
    guide = enable(trainer, budget=0.5, mask=HALF, update={"average_last": 0.5})
    iterates: list[tuple[float, dict[str, torch.Tensor]]] = []
    step = guide.end_step

    def recorded() -> None:
        step()
        iterates.append((guide.progress, weights(guide.model)))

    guide.end_step = recorded  # type: ignore[method-assign]
    trainer.train()
    chosen = [values for progress, values in iterates if progress > 0.5]
    assert 3 <= len(chosen) < len(iterates)
    final = weights(trainer.model)  # type: ignore[arg-type]
    for name, value in final.items():
        expected = torch.stack([values[name] for values in chosen]).double().mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    saved = type(trainer.model).from_pretrained(checkpoint)  # type: ignore[union-attr]
    assert_equal(weights(saved), final)
    (evaluated,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == evaluated


# -------------------------------------------------------------------- optimizers


def test_the_fused_default_steps_heads(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120))
    model: Any = trainer.model
    before = [(name, id(p), p.stride()) for name, p in model.named_parameters()]
    assert trainer.args.optim == "adamw_torch_fused"
    guide = enable(trainer, budget=0.4, mask=HALF, granularity="head")
    output = model.bert.encoder.layer[1].attention.output.dense
    kinds = Watch(lambda: [(group["fused"], group["foreach"]) for group in trainer.optimizer.param_groups])
    strides = Watch(lambda: {view.stride() for name, view in output.named_parameters() if name.endswith("weight")})
    for watch in (kinds, strides):
        trainer.add_callback(watch)
    trainer.train()
    assert {kind for seen in kinds.seen for kind in seen} == {(True, None)}
    assert all(seen == {(1, 32)} for seen in strides.seen)
    assert guide.plan.cut > 0
    assert [(name, id(p), p.stride()) for name, p in model.named_parameters()] == before


def test_fused_and_unfused_steps_of_heads_are_alike(tmp_path: Path) -> None:
    ends: list[dict[str, Tensor]] = []
    start: dict[str, Tensor] = {}
    for optim in ("adamw_torch", "adamw_torch_fused"):
        set_seed(0)
        trainer = make_trainer(
            tmp_path, dataset=examples(120), optim=optim, weight_decay=0.1, max_steps=12,
            gradient_accumulation_steps=2, max_grad_norm=0.1,
        )  # fmt: skip
        start = weights(trainer.model)
        guide = enable(trainer, budget=0.5, mask=HALF, granularity="head", ffn_blocks=2)
        trainer.train()
        assert guide.plan.cut > 0
        ends.append(weights(trainer.model))
    floating = [name for name, value in start.items() if value.is_floating_point()]
    moved, apart = (
        sum(float((ends[0][name] - other[name]).square().sum()) for name in floating) ** 0.5
        for other in (start, ends[1])
    )
    assert 0.0 < apart < 1e-3 * moved


class Wrapped(nn.Module):
    """A model that is no PreTrainedModel: the Trainer gives its state to safetensors as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FAMILIES["bert"].build()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_checkpoints_of_any_module_while_a_fused_optimizer_steps_heads(tmp_path: Path) -> None:
    model = Wrapped()
    trainer = make_trainer(tmp_path, model=model, dataset=examples(120), save_strategy="steps", save_steps=5)
    enable(trainer, budget=0.5, mask=HALF, granularity="head")
    output = model.inner.get_submodule("bert.encoder.layer.1.attention.output.dense")
    seen = Watch(lambda: ({p.stride() for p in output.parameters() if p.dim() == 2}, weights(model)))
    trainer.add_callback(seen)
    trainer.train()
    strides, at_five = seen.seen[4]
    assert strides == {(1, 32)}
    assert_equal(load_file(tmp_path / "checkpoint-5" / "model.safetensors"), at_five)


@pytest.mark.parametrize(("granularity", "optim"), [("layer", "adafactor"), ("head", "adafactor")])
def test_optimizers_that_slices_would_change(tmp_path: Path, granularity: Any, optim: str) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120), optim=optim)
    enable(trainer, budget=0.4, mask=HALF, granularity=granularity, signal={"name": "grad_norm"}, scaling=None)
    if granularity == "layer":
        trainer.train()
        return
    with pytest.raises(OptimizerError, match="Adafactor keeps one statistic"):
        trainer.train()
    assert not any(hasattr(m, "_rgft_guide") for m in [trainer.model])


def test_weight_decay_follows_the_trainers_own_rule(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(120), weight_decay=0.1)
    enable(trainer, budget=0.5, mask=HALF, granularity="head")
    found: dict[str, float] = {}

    def look() -> None:
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            found.update({names[id(p)]: group["weight_decay"] for p in group["params"]})

    trainer.add_callback(Watch(look))
    trainer.train()
    assert {name for name, decay in found.items() if decay} == {
        name for name in found if not ("bias" in name or "LayerNorm" in name)
    }


def test_an_optimizer_of_the_users(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    mine = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = make_trainer(tmp_path, model=model, dataset=examples(120), more={"optimizers": (mine, None)})
    guide = enable(trainer, budget=0.4, mask=HALF)
    trainer.train()
    assert guide.step_count > 10
    part = torch.optim.SGD(model.classifier.parameters(), lr=0.1)  # type: ignore[union-attr]
    trainer = make_trainer(tmp_path, model=model, dataset=examples(120), more={"optimizers": (part, None)})
    with pytest.raises(AttachError, match="the optimizer lacks parameters of 4 components"):
        enable(trainer, budget=0.4, mask=HALF)
    assert all(p.requires_grad for p in model.parameters())
    assert Guide(model) is not None  # nothing was left attached


# -------------------------------------------------------------------- data


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Map-style, not of the datasets library, of different lengths and with a field that no model knows."""

    def __init__(self, count: int) -> None:
        self.rows = list(examples(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 4 + index % 6
        row = {key: value[:length] if isinstance(value, list) else value for key, value in self.rows[index].items()}
        return {**row, "remark": str(index)}


class Pad:
    """A tokenizer-like padding collator without a tokenizer."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        assert all(row.keys() == {"input_ids", "attention_mask", "labels"} for row in rows), rows[0].keys()
        return {
            "input_ids": torch.tensor([row["input_ids"] + [1] * (width - len(row["input_ids"])) for row in rows]),
            "attention_mask": torch.tensor(
                [row["attention_mask"] + [0] * (width - len(row["input_ids"])) for row in rows]
            ),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_other_data_sets_and_collators(tmp_path: Path, workers: int) -> None:
    trainer = make_trainer(
        tmp_path, dataset=Texts(120), more={"data_collator": Pad()}, dataloader_num_workers=workers,
        dataloader_pin_memory=False, num_train_epochs=3,
    )  # fmt: skip
    guide = enable(trainer, budget=0.5, mask=HALF)
    trainer.train()
    assert guide.cache is not None
    assert guide.cache.hits > 0
    assert guide.flops_fraction <= 0.5


def test_probes_are_never_trained_on(tmp_path: Path) -> None:
    dataset = examples(160)
    trainer = make_trainer(tmp_path, dataset=dataset)
    guide = enable(trainer, budget=0.5, mask=HALF, probe={"interval": 4, "size": 4})
    seen: set[int] = set()
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *a, **k: (
        seen.update(inputs["rgft_example"].tolist()),
        step(model, inputs, *a, **k),
    )[1]
    trainer.train()
    assert guide.ledger.probe_flops > 0
    assert len(trainer.train_dataset) == 160
    assert seen < set(range(160))
    assert len(seen) == 160 - 16


def test_examples_that_differ_each_time_are_not_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def noisy(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = Pad()(rows)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.15] = 4
        return batch

    trainer = make_trainer(tmp_path, dataset=examples(120), more={"data_collator": noisy})
    with caplog.at_level(logging.WARNING, logger="rgft"):
        guide = enable(trainer, budget=0.5, mask=HALF)
    trainer.train()
    assert "no activation cache" in caplog.text
    assert guide.cache is not None
    assert guide.cache.hits == 0
    assert guide.flops_fraction <= 0.5


# -------------------------------------------------------------------- said loudly


def test_too_late_and_twice(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80))
    enable(trainer, budget=0.5, mask=HALF)
    with pytest.raises(AttachError, match="has a guide already"):
        enable(trainer, budget=0.5, mask=HALF)

    class Late(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            enable(trainer, budget=0.5, mask=HALF)

    trainer = make_trainer(tmp_path, dataset=examples(80), more={"callbacks": [Late()]})
    with pytest.raises(AttachError, match="training has begun"):
        trainer.train()
    trainer = make_trainer(tmp_path, dataset=examples(80), more={"callbacks": [RGFTCallback(budget=0.5)]})
    with pytest.raises(AttachError, match="has an RGFTCallback already"):
        enable(trainer, budget=0.5, mask=HALF)
    trainer = Trainer(args=arguments(tmp_path), train_dataset=examples(80), model_init=lambda: FAMILIES["bert"].build())
    with pytest.raises(AttachError, match="model_init"):
        enable(trainer, budget=0.5, mask=HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant",
        ),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {}}, "use_reentrant"),
    ],
)
def test_trainings_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80), **settings)
    with pytest.raises(AttachError, match=message):
        enable(trainer, budget=0.5, mask=HALF)
    assert not hasattr(trainer.model, "_rgft_guide")


def test_all_reasons_to_refuse_come_at_once() -> None:
    args = SimpleNamespace(
        world_size=2,
        n_gpu=2,
        fp16=True,
        auto_find_batch_size=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(AttachError) as error:
        refuse_unsupported(args, accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP))  # type: ignore[arg-type]
    for expected in ("2 (FSDP)", "nn.DataParallel", "Use bf16=True", "Set a batch size", "Set use_reentrant to False"):
        assert expected in str(error.value)
    args = SimpleNamespace(world_size=1, n_gpu=1, fp16=False, auto_find_batch_size=False)
    refuse_unsupported(args, accelerator=SimpleNamespace(distributed_type=DistributedType.NO))  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="DEEPSPEED"):
        refuse_unsupported(args, accelerator=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))  # type: ignore[arg-type]


def test_a_training_that_never_steps_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80))
    trainer._run_epoch = lambda **kwargs: setattr(trainer.control, "should_training_stop", True)
    enable(trainer, budget=0.5, mask=HALF)
    with pytest.warns(RGFTWarning, match="saw no training step"):
        trainer.train()


def test_batches_of_uneven_length_do_not_overspend(tmp_path: Path) -> None:
    for accumulation in (1, 3):
        trainer = make_trainer(
            tmp_path, dataset=Texts(160), more={"data_collator": Pad()}, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4,
        )  # fmt: skip
        guide = enable(trainer, budget=0.3, mask=HALF, execution={"positions": "all"})
        trainer.train()
        assert 0.25 < guide.flops_fraction <= 0.3
        assert trainer.state.global_step == guide.step_count


@pytest.mark.parametrize("accumulation", [1, 3])
def test_all_of_the_budget_is_all_of_the_steps(tmp_path: Path, accumulation: int) -> None:
    trainer = make_trainer(
        tmp_path, dataset=Texts(50), more={"data_collator": Pad()}, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
    )  # fmt: skip
    guide = enable(trainer, preset="full", budget=1.0)
    trainer.train()
    assert guide.step_count == trainer.state.max_steps == 3 * -(-13 // accumulation)
    assert guide.flops_fraction == 1.0


def test_streams_and_impossible_budgets_leave_nothing_attached(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80).to_iterable_dataset(), max_steps=4)
    with pytest.raises(AttachError, match="map-style"):
        enable(trainer, budget=0.5, mask=HALF)
    trainer = make_trainer(tmp_path, model=trainer.model, dataset=examples(80))
    with pytest.raises(BudgetError, match="smallest budget"):
        enable(trainer, budget=1e-4)
    with pytest.raises(ConfigError, match="config, or single settings"):
        enable(trainer, Config(), budget=0.5)
    enable(trainer, budget=0.5, mask=HALF)


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=examples(80))
    guide = enable(trainer, budget=0.5, mask=HALF)
    states: list[dict[str, Tensor]] = []

    def poison() -> None:
        states.append(weights(trainer.model))
        if len(states) == 3:
            handle.append(trainer.model.classifier.register_forward_hook(lambda m, a, out: out * float("nan")))

    handle: list[Any] = []
    trainer.add_callback(Watch(poison))
    with pytest.raises(NonFiniteError, match="step 3: the gradient of"):
        trainer.train()
    handle[0].remove()
    assert guide.step_count == 3
    assert_equal(states[-1], weights(trainer.model))
    assert not hasattr(trainer.model, "_rgft_guide")


# -------------------------------------------------------------------- the callback


def test_callback_does_its_subset(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    callback = RGFTCallback(budget=0.4, mask=HALF, warmup_fraction=0.3)
    trainer = make_trainer(
        tmp_path, model=model, dataset=examples(160), more={"callbacks": [callback]}, lr_scheduler_type="constant"
    )
    names = [name for name, _ in model.named_parameters()]
    seen: list[tuple[frozenset[str], int]] = []
    trainer.add_callback(Watch(lambda: seen.append((callback.guide.active, callback.guide.plan.cut))))  # type: ignore[union-attr]
    trainer.train()
    assert callback.guide is None
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) < 60
    assert 0.35 < steps[-1]["rgft/flops_fraction"] <= 0.4
    assert len(seen[0][0]) == 5
    assert seen[-1][1] > 0
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_callback_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, resume: bool = False, **settings: Any) -> dict[str, Tensor]:
        trainer = make_trainer(
            tmp_path / name, dataset=examples(120), more={"callbacks": [RGFTCallback(budget=0.5)]},
            lr_scheduler_type="constant", save_strategy="steps", save_steps=7, **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-7") if resume else None)
        return weights(trainer.model)

    whole = run("whole")
    assert_equal(whole, run("whole", resume=True))


def test_callback_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        RGFTCallback(granularity="head", signal="residual_dot", execution={"cache": "memory"}, scaling=None)
    assert len(error.value.problems) == 3
    assert all("enable(trainer" in problem or "cache" in problem for problem in error.value.problems)
    trainer = make_trainer(tmp_path, dataset=examples(80), more={"callbacks": [RGFTCallback(budget=0.5)]})
    with pytest.warns(RGFTWarning, match="not with the budget"):
        trainer.train()

    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.add_callback(RGFTCallback(budget=0.5))

    trainer = make_trainer(tmp_path, dataset=examples(80), more={"callbacks": [Late()]})
    with pytest.raises(AttachError, match="training has begun without RGFTCallback"):
        trainer.train()


def test_callback_refuses_an_optimizer_that_misses_parameters(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    part = torch.optim.SGD(model.classifier.parameters(), lr=0.1)  # type: ignore[union-attr]
    more = {"callbacks": [RGFTCallback(budget=0.5)], "optimizers": (part, None)}
    trainer = make_trainer(tmp_path, model=model, dataset=examples(80), more=more)
    with pytest.raises(AttachError, match="lacks parameters"):
        trainer.train()
    assert not hasattr(model, "_rgft_guide")


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adafactor", None), ("lion_32bit", "bitsandbytes"), ("adamw_bnb_8bit", "bitsandbytes"), ("rmsprop", None),
     ("schedule_free_adamw", "schedulefree")],
)  # fmt: skip
def test_the_trainers_other_optimizers(tmp_path: Path, optim: str, package: str | None) -> None:
    """They train whole components, and what is off keeps every bit, also through the Trainer's evaluations."""
    if package is not None:
        pytest.importorskip(package)
    lr = {"adafactor": 1e-2, "lion_32bit": 1e-4}.get(optim, 1e-3)
    trainer = make_trainer(
        tmp_path, optim=optim, learning_rate=lr, more={"eval_dataset": examples(8)}, eval_strategy="steps",
        eval_steps=4, lr_scheduler_type="constant",
    )  # fmt: skip
    guide = enable(trainer, budget=0.6, mask=HALF, warmup_fraction=0.5)
    seen: list[tuple[frozenset[str], dict[str, list[torch.Tensor]]]] = []

    class Weights(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            off = set(guide.partition.names) - set(guide.plan.active())
            seen.append((frozenset(off), {n: [p.detach().clone() for p in guide._binding.parameters[n]] for n in off}))

    trainer.add_callback(Weights())
    trainer.train()
    assert guide.error_map.observed
    frozen = [(off, values) for off, values in seen if off]
    assert len(frozen) > 3
    assert len({off for off, _ in frozen}) == 1
    for name in frozen[0][0]:
        for first, last in zip(frozen[0][1][name], frozen[-1][1][name], strict=True):
            assert torch.equal(first, last), name
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    weight = trainer.model.get_parameter("classifier.weight")  # type: ignore[union-attr]
    assert not torch.equal(weight, FAMILIES["bert"].build().get_parameter("classifier.weight"))
