"""`rgft train` and `rgft map` on texts and conversations, with a saved tiny LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rgft.cli.preparing import prepare_task
from rgft.cli.request import RunSettings
from rgft.cli.train import stored_request
from rgft.tasks.base import PreparedTask
from rgft.telemetry.run_folder import RunFolder
from tests.decoders import WORDS, save_decoder, word_tokenizer
from tests.gguf_files import TOKENS, tiny_llama, write_gguf
from tests.integration.cli_inputs import invoke, refused, used_as_the_card_says

LETTERS = "abcdefghij"


def texts(path: Path, count: int = 160) -> str:
    """Each letter is followed by the next one: easily learnt."""
    lines = [" ".join(LETTERS[(i + j) % 10] for j in range(8)) + f" {LETTERS[i % 7]}" for i in range(count)]
    path.write_text("\n\n".join(lines))
    return str(path)


def conversations(path: Path, count: int = 160) -> str:
    """The answer is yes after an a, else no."""
    rows = []
    for i in range(count):
        word = "a" if i % 2 else "b"
        question = f"{LETTERS[i % 10]} {LETTERS[i // 10 % 10]} {LETTERS[i // 3 % 10]} {word}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes" if i % 2 else "no"}]
        rows.append({"messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    model = save_decoder(folder / "model")
    shared = ["--model", model, "--batch-size", "8", "--lr", "5e-3", "--max-length", "16", "--seed", "1"]
    return {
        "language-modelling": [*shared, "--data", texts(folder / "t.txt"), "--task", "language-modelling"],
        "chat": [*shared, "--data", conversations(folder / "c.jsonl"), "--task", "chat"],
    }


def trained(options: list[str], output: Path, *more: str) -> dict[str, Any]:
    return json.loads(invoke("train", *options, "--output", str(output), "--json", "--quiet", *more).stdout)


def test_who_trains_by_pairs_without_asking_is_told(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", width=128)
    options = ["--model", model, "--data", texts(tmp_path / "t.txt"), "--task", "language-modelling"]
    options += ["--max-length", "16", "--batch-size", "8", "--lr", "1e-3"]
    shown = invoke("train", *options, "--output", str(tmp_path / "x"), "--dry-run")
    assert "low-rank pairs of rank 8 (alpha 16) in place of dense dW: 3 of" in shown.stdout
    assert "learning rate: 0.001 (0.02 of low-rank pairs)" in shown.stdout
    run = invoke("train", *options, "--output", str(tmp_path / "run"), "--budget", "0.1", "--json")
    assert "layers train by low-rank pairs of rank 8, at 20 × the learning rate" in run.stderr
    pairs = json.loads(run.stdout)["low_rank"]
    assert (pairs["rank"], pairs["lr_multiplier"]) == (8, 20.0)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Learning rate 0.001 (0.02 of low-rank pairs)" in card
    dense = trained([*options, "--set", "update.low_rank=null"], tmp_path / "dense", "--budget", "0.1")
    assert dense["low_rank"] is None


@pytest.mark.parametrize("select", ["unbiased", "top"])
def test_skipped_tokens_and_examples_are_shown(inputs: dict[str, list[str]], tmp_path: Path, select: str) -> None:
    skips = ("examples.tokens=0.5", "examples.prune=0.3", f"examples.select={select}")
    options = [*inputs["language-modelling"], "--epochs", "3", "--budget", "1.0", "--output", str(tmp_path / "run")]
    options += [part for setting in skips for part in ("--set", setting)]
    dry = invoke("train", *options, "--dry-run").stdout
    assert "well-learnt examples with probability 0.3 (unbiased)" in " ".join(dry.split())
    assert ("BIASED" in dry) == (select == "top")
    shown = " ".join(invoke("train", *options).stdout.split())
    assert "examples skipped" in shown
    assert ("tokens skipped (BIASED)" in shown) == (select == "top")
    report = RunFolder.open(tmp_path / "run").read_json("ledger.json")
    assert report["data"]["targets_skipped"] > 0 < report["data"]["examples_skipped"]
    assert abs(report["audit"]["error"]) < 0.02
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "well-learnt token was skipped" in card
    assert ("BIASED" in card) == (select == "top")


@pytest.mark.parametrize("task", ["language-modelling", "chat"])
def test_a_run_learns_and_leaves_a_plain_model(inputs: dict[str, list[str]], tmp_path: Path, task: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = trained(inputs[task], tmp_path / "run", "--budget", "0.6", "--epochs", "8")
    assert 0.3 < report["flops"]["fraction_of_full"] <= 0.6
    assert abs(report["audit"]["error"]) < 0.02
    found = report["metrics"]["validation"]
    # 20 words: perplexity 20 before. One of the 9 letters of a text is drawn; of an answer nothing is.
    assert found["perplexity"] < (4.0 if task == "language-modelling" else 1.5)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item(), rel=1e-4)
    assert found["token_accuracy"] > 0.6
    losses = [r.data["loss"] for r in RunFolder.open(tmp_path / "run").read_records() if r.type == "step"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model = AutoModelForCausalLM.from_pretrained(report["model"])
    tokenizer = AutoTokenizer.from_pretrained(report["model"])
    if task == "chat":
        for word, answer in (("a", "yes"), ("b", "no")):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"c d e {word}"}], add_generation_prompt=True, return_tensors="pt",
                return_dict=True,
            )  # fmt: skip
            said = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            assert tokenizer.decode(said).split() == [answer, "<|end|>"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    (answer,) = used_as_the_card_says(Path(report["model"]))
    assert answer["generated_text"]


@pytest.mark.parametrize("task", ["language-modelling", "chat"])
def test_the_frozen_prefix_is_read_from_the_cache(inputs: dict[str, list[str]], tmp_path: Path, task: str) -> None:
    # Neither run comes to the end of so large a budget, so that both make the same steps.
    fixed = ("--set", "mask.frozen_fraction=0.6", "--epochs", "4", "--budget", "1.0")
    report = trained(inputs[task], tmp_path / "run", *fixed)
    plain = trained(inputs[task], tmp_path / "plain", *fixed, "--set", "execution.cache=none")
    assert report["flops"]["saved"]["forward_cached"] > 0.0
    assert plain["flops"]["saved"]["forward_cached"] == 0.0
    assert report["steps"] == plain["steps"]
    assert report["metrics"]["validation"]["loss"] == pytest.approx(plain["metrics"]["validation"]["loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_is_computed_where_a_token_is_learnt(
    inputs: dict[str, list[str]], tmp_path: Path, precision: str
) -> None:
    options = (
        "--epochs",
        "3",
        "--budget",
        "1.0",
        "--set",
        f"precision={precision}",
        "--set",
        "mask.frozen_fraction=0.6",
    )
    report = trained(inputs["chat"], tmp_path / "run", *options)
    plain = trained(inputs["chat"], tmp_path / "plain", *options, "--set", "execution.positions=all")
    assert abs(report["audit"]["error"]) < 0.001
    flops = report["flops"]
    # Two tokens of ten are learnt: the answer and the end of the turn.
    share = flops["head_at_targets"] / (flops["head_at_targets"] + flops["saved"]["unread_positions"])
    assert share == pytest.approx(0.2)
    assert plain["flops"]["head_at_targets"] == plain["flops"]["saved"]["unread_positions"] == 0.0
    assert flops["full"] == plain["flops"]["full"]
    assert report["steps"] == plain["steps"]
    tolerance = {"fp32": 1e-3, "bf16": 2e-2}[precision]
    assert report["metrics"]["validation"]["loss"] == pytest.approx(
        plain["metrics"]["validation"]["loss"], rel=tolerance
    )


def test_a_stopped_run_goes_on_bit_for_bit(
    inputs: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rgft.run import Run

    whole = trained(inputs["chat"], tmp_path / "whole", "--epochs", "2")
    own = Run._step

    def stopping(self: Run, *args: Any) -> None:
        own(self, *args)
        if self.guide.step_count == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", stopping)
        refused(
            "train", *inputs["chat"], "--output", str(tmp_path / "part"), "--epochs", "2", "--checkpoint-every", "5",
            "--quiet", code=130, said="interrupted",
        )  # fmt: skip
    assert stored_request(tmp_path / "part")["settings"]["task"] == "chat"
    again = json.loads(
        invoke("train", "--resume", "--output", str(tmp_path / "part"), "--json", "--quiet").stdout
    )  # fmt: skip
    assert again["metrics"] == whole["metrics"]
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("task", ["language-modelling", "chat"])
def test_previews_and_maps(inputs: dict[str, list[str]], tmp_path: Path, task: str) -> None:
    options = inputs[task]
    dry = ("train", *options, "--output", str(tmp_path / "run"), "--dry-run")
    preview = json.loads(invoke(*dry, "--json").stdout)
    assert preview["run_plan"]["head_at_targets"]
    assert "the language model's head only where a token is learnt" in invoke(*dry).stdout
    assert preview["model"]["family"] == "llama"
    assert not (tmp_path / "run").exists()
    place = options.index("--batch-size")
    options = [*options[:place], *options[place + 2 :]]
    measured = json.loads(invoke("map", *options, "--probes", "2", "--probe-size", "8", "--json").stdout)
    assert {row["kind"] for row in measured["components"]} >= {"layer", "embedding", "lm_head"}


def test_settings_of_other_tasks_are_refused(inputs: dict[str, list[str]], tmp_path: Path) -> None:
    said = refused(
        "train", *inputs["chat"], "--output", str(tmp_path / "run"), "--text", "body", "--set", "packing=false"
    )  # fmt: skip
    assert "text: expected only with text-classification or regression or language-modelling" in said
    assert "packing: expected only with language-modelling" in said
    said = refused(
        "train", *inputs["language-modelling"], "--output", str(tmp_path / "run"), "--text", "a", "--text", "b"
    )  # fmt: skip
    assert "text: expected one column for language-modelling, found a, b" in said


def other_decoder(name: str, folder: Path) -> str:
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    ends = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, **ends,
    }  # fmt: skip
    models = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **ends)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**shape, head_dim=8)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=2)),
    }
    models[name]().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("gemma", True), ("mixtral", False)])
def test_other_decoders_and_tied_embeddings(
    inputs: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    tasks: list[PreparedTask] = []

    def prepared(settings: RunSettings) -> PreparedTask:
        tasks.append(prepare_task(settings))
        return tasks[-1]

    monkeypatch.setattr("rgft.cli.train.prepare_task", prepared)
    options = [*inputs["chat"], "--model", other_decoder(name, tmp_path / name)]
    report = trained(options, tmp_path / "run", "--budget", "0.6", "--epochs", "4")
    assert 0.3 < report["flops"]["fraction_of_full"] <= 0.6
    assert report["audit"]["audits"] >= 1
    assert abs(report["audit"]["error"]) < 0.02
    losses = [r.data["loss"] for r in RunFolder.open(tmp_path / "run").read_records() if r.type == "step"]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    loaded = AutoModelForCausalLM.from_pretrained(report["model"])
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    own = tasks[0].model.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())


def test_a_gguf_file_is_tuned_into_a_plain_model(
    inputs: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf")
    monkeypatch.setenv("RGFT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    report = trained([*inputs["language-modelling"], "--model", str(file)], tmp_path / "run", "--budget", "0.5")
    assert "quantization_config" not in json.loads((Path(report["model"]) / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(report["model"]).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(report["model"])("yes")["input_ids"] == [TOKENS.index("yes")]
