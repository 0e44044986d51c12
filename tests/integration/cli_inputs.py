"""What a user of the command line has: a saved model and a file of labelled rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from rgft.cli.app import app

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *"abcdefghij"]


def save_inputs(folder: Path, *, rows: int = 200) -> list[str]:
    """Saves a tiny random BERT and a CSV whose label is the first word; returns the options that name them."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    write_rows(folder / "data.csv", [(text(i), ("good", "bad")[i % 2]) for i in range(rows)])
    return ["--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--batch-size", "8", "--lr", "1e-3"]


def text(i: int) -> str:
    return f"{('good', 'bad')[i % 2]} {' '.join('abcdefghij'[int(d)] for d in f'{i:03d}')}"


def write_rows(path: Path, rows: list[tuple[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def used_as_the_card_says(model: Path) -> Any:
    """What the last line of the code in a saved model's card gives."""
    code = (model / "README.md").read_text().split("```python\n")[1].split("```")[0].strip()
    *lines, last = code.replace("path/of/this/folder", str(model)).splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return eval(last, names)


def invoke(*arguments: str) -> Any:
    """Runs a command that ends well."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refused(*arguments: str, code: int = 2, said: str = "error") -> str:
    """What a command that ends with `code` says: a message on standard error, and nothing else."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    assert f"{said}: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr
