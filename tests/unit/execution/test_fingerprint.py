"""What makes cached states others: anything that the prefix computes from."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rgft.execution.fingerprint import prefix_fingerprint, row_digests
from rgft.partition import partition
from tests.families import FAMILIES


class Scaled(nn.Module):
    """A module with a plain attribute and a buffer that is in no state_dict."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scaling = inner, {"default": 2.0}
        self.register_buffer("feature", torch.zeros(3), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * self.scaling["default"]


def bert() -> Any:
    model: Any = FAMILIES["bert"].build()
    model.bert.embeddings = Scaled(model.bert.embeddings)
    return model


def fingerprint(model: nn.Module, cut: int = 2, storage: str = "None") -> str:
    return prefix_fingerprint(model, partition(model), cut, storage)


def weight(model: Any) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-3


def buffer(model: Any) -> None:
    model.bert.embeddings.feature += 1.0


def attribute(model: Any) -> None:
    model.bert.embeddings.scaling["default"] = 3.0


def configuration(model: Any) -> None:
    model.config.hidden_act = "relu"


def code(model: Any) -> None:
    class Other(Scaled):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs) + 1.0

    Other.__name__ = "Scaled"
    model.bert.embeddings.__class__ = Other


def precision(model: Any) -> None:
    model.to(torch.bfloat16)


def classifier(model: Any) -> None:
    model.classifier = nn.Linear(32, 7)
    model.num_labels = 3


def hooks(model: Any) -> None:
    model.bert.encoder.layer[0].register_forward_hook(lambda *args: None)
    model.eval()


def last_layer(model: Any) -> None:
    nn.init.normal_(model.bert.encoder.layer[1].output.dense.weight)


@pytest.mark.parametrize("change", [weight, buffer, attribute, configuration, code, precision])
def test_what_the_prefix_computes_from_counts(change: Callable[[Any], None]) -> None:
    model = bert()
    other = copy.deepcopy(model)
    assert fingerprint(other) == fingerprint(model)
    change(other)
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("change", [classifier, last_layer, hooks])
def test_what_lies_above_does_not(change: Callable[[Any], None]) -> None:
    model = bert()
    other = copy.deepcopy(model)
    change(other)
    assert fingerprint(other) == fingerprint(model)


def test_cut_and_way_of_storing_count() -> None:
    model = bert()
    assert len({fingerprint(model), fingerprint(model, cut=3), fingerprint(model, storage="torch.int8")}) == 3


def digests(change: Callable[[dict[str, Any]], None] = lambda batch: None, *, spans: bool = True) -> list[bytes]:
    batch: dict[str, Any] = FAMILIES["bert"].batch(rows=3, tokens=6)
    batch["attention_mask"][:] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    change(batch)
    return row_digests(3, (), batch, [(0, 6), (0, 4), (0, 6)] if spans else None)


def test_a_row_is_its_content_without_padding_and_labels() -> None:
    def change(batch: dict[str, Any]) -> None:
        batch["input_ids"][1, 4:] = 7
        batch["labels"] += 1

    assert digests(change) == digests()
    assert len(set(digests())) == 3
    assert digests(change, spans=False)[1] != digests(spans=False)[1]


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.arange(6)[None]}, {"use_bias": True}, {"more": {"token_type_ids": torch.ones(3, 6)}},
        {"more": [torch.ones(3)]},
    ],
)  # fmt: skip
def test_everything_else_that_is_given_counts(extra: dict[str, Any]) -> None:
    changed = digests(lambda batch: batch.update(extra))
    assert all(a != b for a, b in zip(changed, digests(), strict=True))


def test_rows_inside_a_mapping_are_told_apart() -> None:
    batch = FAMILIES["bert"].batch(rows=3, tokens=6)
    assert len(set(row_digests(3, (batch,), {}, None))) == 3


def test_autocast_counts() -> None:
    plain = digests()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(a != b for a, b in zip(digests(), plain, strict=True))


IN_ANOTHER_PROCESS = """
import torch
from torch import nn
from rgft.execution.fingerprint import prefix_fingerprint, row_digests
from rgft.partition import partition

model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 2)
for parameter in model.parameters():
    nn.init.ones_(parameter)
model.words = {f"word {number}" for number in range(20)}
model.layers[0].words = model.words
print(prefix_fingerprint(model, partition(model), 2, "None"), row_digests(1, (), {"words": model.words}, None)[0].hex())
"""


def test_it_is_the_same_in_every_process() -> None:
    """Also where attributes are sets, whose order differs between processes."""
    found = {
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1
    assert len(found.pop().split()) == 2
