"""`rgft plan`: costs of a model that need not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.decoders import save_decoder
from tests.integration.cli_inputs import invoke, refused, save_inputs


def test_ways_of_training_a_classifier(tmp_path: Path) -> None:
    save_inputs(tmp_path, rows=4)
    config = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "model.safetensors").unlink()  # weights are not needed
    options = ["--model", str(config.parent), "--tokens", "16", "--examples", "100", "--epochs", "4"]
    found = json.loads(invoke("plan", *options, "--budget", "0.4", "--json").stdout)
    ways = {(way["name"], round(way["frozen_fraction"], 2)): way for way in found["ways"]}
    assert set(ways) == {("rgft", 0.0), ("lora", 0.0), ("rgft", 0.33), ("rgft", 0.67)}
    full, half = ways["rgft", 0.0], ways["rgft", 0.67]
    assert full["fraction_of_full"] == pytest.approx(1.0)
    assert full["epochs_in_budget"] == pytest.approx(1.6)
    assert half["epochs_in_budget"] > 2.0
    # Rank 8 on the six linear layers of each of three layers of width 32 and 48, and on the pooler.
    assert ways["lora", 0.0]["trained_parameters"] == 8 * (3 * (4 * (32 + 32) + 2 * (32 + 48)) + 32 + 32)
    assert half["trained_parameters"] < full["trained_parameters"]
    counts = full["memory"]["moments"] - 2 * full["memory"]["gradients"]
    assert 0 < counts < 4 * 100  # a number for each of its tensors
    assert full["memory"]["gradients"] == 4 * full["trained_parameters"]
    assert 0.0 < half["seconds"] < full["seconds"]
    assert found["steps"] == 16
    shown = invoke("plan", *options, "--device", "none").stdout
    assert "RGFT 67%" in shown
    assert max(len(line) for line in shown.splitlines() if "RGFT" in line) <= 80


def test_a_decoder_by_its_configuration_alone(tmp_path: Path) -> None:
    config = Path(save_decoder(tmp_path / "model")) / "config.json"
    options = ["--model", str(config), "--task", "language-modelling", "--tokens", "16", "--batch-size", "4"]
    single = json.loads(invoke("plan", *options, "--device", "none", "--json").stdout)
    half = json.loads(invoke("plan", *options, "--device", "none", "--dtype", "bf16", "--json").stdout)
    assert single["ways"][0]["memory"]["weights"] == pytest.approx(2 * half["ways"][0]["memory"]["weights"], rel=0.05)
    assert single["ways"][0]["flops"] == half["ways"][0]["flops"]
    assert single["ways"][0]["seconds"] is None


def test_another_optimizer_than_adamw(tmp_path: Path) -> None:
    config = Path(save_decoder(tmp_path / "model")) / "config.json"
    options = ["--model", str(config), "--task", "language-modelling", "--tokens", "16", "--batch-size", "4"]
    options += ["--device", "none", "--memory", "1GB", "--budget", "0.5"]

    def found(name: str, *more: str) -> dict[str, Any]:
        return json.loads(invoke("plan", *options, "--optimizer", name, "--json", *more).stdout)

    adamw, muon = (found(name, "--low-rank", "2") for name in ("adamw", "muon"))
    assert (adamw["optimizer"], muon["optimizer"]) == ("adamw", "muon")
    for way, usual in zip(muon["ways"], adamw["ways"], strict=True):
        has_matrices = not way["rank"]  # of weights; pairs beside them are AdamW's
        assert usual["optimizer_flops"] == 0.0
        assert (way["optimizer_flops"] > 0.0) == has_matrices
        assert (way["flops"] > usual["flops"]) == has_matrices
        assert (way["memory"]["moments"] < usual["memory"]["moments"]) == has_matrices
    assert muon["ways"][0]["needed"] < adamw["ways"][0]["needed"]
    assert muon["ways"][0]["epochs_in_budget"] < adamw["ways"][0]["epochs_in_budget"]
    by_pairs, (adamw, muon) = adamw, (found("adamw"), found("muon"))
    assert muon["under_limit"]["plan"]["parts"]["moments"] < adamw["under_limit"]["plan"]["parts"]["moments"]
    assert by_pairs["under_limit"]["plan"]["parts"]["moments"] < muon["under_limit"]["plan"]["parts"]["moments"]
    assert "optimizer: expected one of adamw, sgd" in refused("plan", *options, "--optimizer", "adam")


def test_a_language_model_is_planned_as_it_is_trained(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", width=128)
    options = ["--model", model, "--task", "language-modelling", "--tokens", "16", "--batch-size", "4"]
    options += ["--device", "none", "--memory", "1GB"]
    found = json.loads(invoke("plan", *options, "--json").stdout)
    assert {way["rank"] for way in found["ways"] if way["name"] == "rgft"} == {0, 8}
    assert found["under_limit"]["rank"] == 8
    shown = invoke("plan", *options).stdout
    assert "RGFT 67%, pairs of 8" in shown
    assert "RGFT by pairs of 8, memory: at most" in shown


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    config = str(Path(save_decoder(tmp_path / "model")) / "config.json")
    assert "expected fp32 or bf16, found 'fp8'" in refused("plan", "--model", config, "--dtype", "fp8")
    assert "0 < budget <= 1, found 3.0" in refused("plan", "--model", config, "--budget", "3")
    assert "expected one of text-classification" in refused("plan", "--model", config, "--task", "speech")
    assert "expected a hub name, a folder or a config.json" in refused("plan", "--model", str(tmp_path / "nothing"))


def test_what_train_would_refuse(tmp_path: Path) -> None:
    from transformers import GPT2Config

    save_inputs(tmp_path, rows=4)  # an encoder of 32 positions
    encoder, decoder = tmp_path / "model", tmp_path / "gpt2"
    GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=32).save_pretrained(decoder)
    for options in (["--model", str(encoder)], ["--model", str(decoder), "--task", "language-modelling"]):
        found = refused("plan", *options, "--tokens", "33", "--device", "none")
        assert "tokens: the model has 32 positions, found an example of 33 tokens; give --tokens 32 or less" in found
        invoke("plan", *options, "--tokens", "32", "--device", "none")
    found = refused("plan", "--model", str(encoder / "config.json"), "--task", "language-modelling", "--tokens", "16")
    assert "expected a decoder, found BertLMHeadModel" in found
