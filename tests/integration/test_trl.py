"""TRL's SFTTrainer and PEFT models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rgft.errors import RGFTWarning
from rgft.integrations import enable
from tests.families import FAMILIES
from tests.integration.trainers import HALF, Watch, assert_equal, examples, make_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(56))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def texts(count: int = 64) -> Dataset:
    return Dataset.from_dict(
        {"text": [" ".join(f"w{(i * 7 + j * 3) % 56}" for j in range(6 + i % 5)) for i in range(count)]}
    )


def sft(folder: Path, model: nn.Module | None = None, **settings: Any) -> SFTTrainer:
    given = {
        "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, **settings,
    }  # fmt: skip
    args = SFTConfig(output_dir=str(folder), **given)
    model = model if model is not None else FAMILIES["llama"].build()
    return SFTTrainer(model=model, args=args, train_dataset=texts(), processing_class=tokenizer())  # type: ignore[arg-type]


def lora(family: str, **settings: Any) -> PeftModel:
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = LoraConfig(r=4, target_modules="all-linear", task_type=task, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(FAMILIES[family].build(), config)  # type: ignore[arg-type, return-value]


def test_sft_with_the_full_preset_is_plain_sft_bit_for_bit(tmp_path: Path) -> None:
    plain = sft(tmp_path / "plain", num_train_epochs=1)
    plain.train()
    guided = sft(tmp_path / "guided", num_train_epochs=1)
    with pytest.warns(RGFTWarning, match="decides nothing"):
        enable(guided, preset="full")
    guided.train()
    assert_equal(weights(plain.model), weights(guided.model))
    for mine, theirs in zip(guided.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert {key: value for key, value in mine.items() if not key.startswith("rgft/")} == theirs


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 2, "bf16": True, "gradient_checkpointing": False}, True),
        ({"packing": True, "max_length": 32}, False),
    ],
)
def test_sft_within_a_budget(tmp_path: Path, settings: dict[str, Any], cached: bool) -> None:
    trainer = sft(tmp_path, **settings)
    guide = enable(trainer, budget=0.4, mask=HALF)
    trainer.train()
    assert guide.cache is not None
    assert (guide.cache.hits > 0) == cached
    assert 0.3 < guide.flops_fraction <= 0.4
    assert guide.plan.cut > 0
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"rgft/budget_spent", "mean_token_accuracy", "num_tokens"} <= last.keys()


def test_probes_leave_trls_metrics_alone(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=8)
    guide = enable(trainer, budget=0.9, probe={"interval": 2, "size": 4})
    shown: list[float] = []
    trainer.add_callback(Watch(lambda: shown.append(trainer._total_train_tokens)))
    trainer.train()
    assert guide.ledger.probe_flops > 0
    assert trainer._metrics["eval"] == {}
    assert shown[-1] <= 8 * 8 * 12  # steps × batch × longest text: probes are not among them
    assert guide.ledger.tokens >= shown[-1]


def test_sft_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(resume: bool) -> Any:
        trainer = sft(tmp_path, save_strategy="steps", save_steps=9)
        enable(trainer, budget=0.5, mask=HALF)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9") if resume else None)
        return trainer

    whole = run(False)
    resumed = run(True)
    assert whole.state.global_step == resumed.state.global_step > 9
    assert_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("bert", {}, {}),
        ("llama", {"granularity": "adapter"}, {}),
        ("llama", {}, {"gradient_checkpointing": True}),
    ],
)
def test_peft_models(tmp_path: Path, family: str, config: dict[str, Any], settings: dict[str, Any]) -> None:
    model = lora(family)
    names = [(name, p.requires_grad) for name, p in model.named_parameters()]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    dataset = examples(64, kind=FAMILIES[family].kind)
    trainer = make_trainer(tmp_path, model=model, dataset=dataset, **settings)
    guide = enable(trainer, budget=0.35, mask=HALF, **config)
    off = Watch(lambda: (guide.active, weights(model)))
    trainer.add_callback(off)
    trainer.train()
    assert guide.cache is not None
    assert guide.cache.hits > 0
    assert guide.flops_fraction <= 0.35
    # The budget is a share of what fine-tuning the base model costs, which has no adapters.
    base = make_trainer(tmp_path / "base", family=family, dataset=dataset)
    whole = enable(base, budget=0.35, mask=HALF).run_plan
    assert guide.run_plan is not None
    assert whole is not None
    assert guide.run_plan.full_flops == whole.full_flops
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == names
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    (_, before), (active, after) = off.seen[-2:]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    idle = [c for c in guide.partition if c.name not in active]
    assert idle
    assert not moved & {part.parameter for c in idle for part in c.slices}


def test_a_peft_run_resumes_bit_for_bit_and_loads_plainly(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                control.should_training_stop = control.should_save = True

    def run(name: str, *, resume: bool = False, callbacks: tuple[TrainerCallback, ...] = ()) -> Any:
        trainer = make_trainer(
            tmp_path / name, model=lora("llama"), dataset=examples(64, kind="lm"), save_strategy="steps",
            save_steps=1000, num_train_epochs=2, more={"callbacks": list(callbacks)},
        )  # fmt: skip
        enable(trainer, budget=0.5, mask=HALF)
        trainer.train(resume_from_checkpoint=True if resume else None)
        return trainer

    whole = run("whole")
    run("stopped", callbacks=(Stop(),))
    resumed = run("stopped", resume=True)
    assert whole.state.global_step == resumed.state.global_step > 7
    assert_equal(weights(whole.model), weights(resumed.model))
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    whole.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    whole.save_model(str(tmp_path / "final"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_equal(weights(whole.model), weights(loaded))
