"""What training did to what the model could do before: on a general corpus, and on another task.

A language model has a loss on a general corpus, and forgetting is how much it rises. A sentence encoder has none: its
pre-training head is not part of it. For encoders two other things are measured, and called what they are: how far the
similarities of general texts drift, which is change for better or worse, and how much of another task a linear probe
still finds in the features, which is forgetting in the narrower sense.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgft.bench.measures.corpus import general_texts, require_unseen
from rgft.bench.tasks import bench_task
from rgft.evaluation import evaluate
from rgft.tasks.base import PreparedTask
from rgft.tasks.fingerprint import part_of

#: Texts of the probe's task: fitted on, and scored.
PROBE_FIT, PROBE_TEST = 400, 400
MAX_TOKENS = 128
ROWS = 64


@dataclass(frozen=True, kw_only=True)
class GeneralQuality:
    """What is kept of the model before training, to be held against the trained one.

    Attributes:
        texts, corpus: of which corpus.
        probe: see `Extra`.
        before: what was measured then.
    """

    texts: tuple[str, ...]
    corpus: str
    probe: str | None
    before: Mapping[str, Any]

    @classmethod
    def of(
        cls, task: PreparedTask, *, texts: int, corpus: str = "docstrings", probe: str | None = None
    ) -> GeneralQuality:
        """Measures a task's model before training. Draws no random numbers of torch's and leaves the model as it is.

        Args:
            task: with its plain model.
            texts, corpus: how many general texts, and of which corpus.
            probe: see `Extra`.

        Raises:
            DataError: the corpus has fewer texts, or the task trains on some of them.
        """
        chosen = general_texts(texts, corpus) if _reads_texts(task) and texts else []
        if chosen:
            require_unseen(chosen, task, corpus)
        empty = cls(texts=tuple(chosen), corpus=corpus, probe=probe, before={})
        return replace(empty, before=empty.measure(task, task.model))

    def compare(self, task: PreparedTask) -> dict[str, Any]:
        """Measures the trained model, without its guide.

        Returns:
            The `corpus`, and `data`: number and fingerprint of its `texts` (with the version of Python, since they may
            be its docstrings) and of the `probe`'s examples.
            Of a language model `general_loss` (before, after, and `forgetting`, their difference, in nats per token).
            Of an encoder `similarity_drift`: 1 − Spearman's ρ between the cosines of all pairs of general texts before
            and after (0: their order is as it was; 1: nothing of it is left), and `probe`: accuracy of a logistic
            regression on the features, before and after, and `forgetting`, how much it fell. Of any other model, or
            where a figure is undefined, `undefined`: name → why.
        """
        before, after = self.before, self.measure(task, task.model)
        found: dict[str, Any] = {"corpus": self.corpus} if self.texts else {}
        if data := {
            **({"texts": {**part_of(self.texts), "python": platform.python_version()}} if self.texts else {}),
            **({"probe": before["probe_data"]} if "probe_data" in before else {}),
        }:
            found["data"] = data
        undefined: dict[str, str] = {**before.get("undefined", {}), **after.get("undefined", {})}
        if "general_loss" in before:
            found["general_loss"] = _change(before["general_loss"], after["general_loss"], sign=1.0)
        if "similarities" in before:
            drift = _drift(before["similarities"], after["similarities"])
            if drift is None:
                undefined["similarity_drift"] = "all pairs of texts are equally similar"
            else:
                found["similarity_drift"] = drift
        if "probe_accuracy" in before:
            found["probe"] = {
                "task": self.probe, **_change(before["probe_accuracy"], after["probe_accuracy"], sign=-1.0),
            }  # fmt: skip
        return {**found, **({"undefined": undefined} if undefined else {})}

    def measure(self, task: PreparedTask, model: nn.Module) -> dict[str, Any]:
        """What the model, as it is, can do."""
        found: dict[str, Any] = {}
        if task.loss_at_targets is not None:
            undefined = {"probe": "a linear probe is fitted on encoders only"} if self.probe else {}
            if self.texts:
                found["general_loss"] = _language_model_loss(task, model, self.texts)
            return {**found, "undefined": undefined}
        if not _reads_texts(task):
            return {"undefined": {"forgetting": "the model is neither a language model nor an encoder of texts"}}
        if self.texts:
            features = text_features(model, task.processor, self.texts)
            found["similarities"] = _pair_similarities(features)
        if self.probe is not None:
            fit, score = _probe_examples(self.probe)
            found["probe_accuracy"] = _probe_accuracy(model, fit, score)
            found["probe_data"] = part_of([*fit, *score])
        return found


def _reads_texts(task: PreparedTask) -> bool:
    """Whether the model is a language model or an encoder, and a tokenizer makes its inputs."""
    config = getattr(task.model, "config", None)
    has_tokenizer = hasattr(task.processor, "get_vocab") and hasattr(task.model, "base_model")
    return has_tokenizer and not getattr(config, "is_encoder_decoder", False)


@torch.no_grad()
def text_features(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Mean of the last hidden states over the tokens of each text, [N, D], in eval mode."""
    return _features(model, _token_ids(model, tokenizer, texts))


def _token_ids(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as many as the model has positions for."""
    most = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))
    return [tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in texts]


@torch.no_grad()
def _features(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    body = plain.base_model
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[Tensor] = []
    try:
        for start in range(0, len(rows), ROWS):
            ids = [torch.tensor(rows[index]) for index in order[start : start + ROWS]]
            ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
            mask_BT = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
            states_BTD = body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
            weights_BT1 = mask_BT.unsqueeze(-1).float()
            found.append(((states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)).cpu())
    finally:
        model.train(was_training)
    features = torch.cat(found)
    return features[torch.tensor(order).argsort()]


def _pair_similarities(features: Tensor) -> np.ndarray:
    """Cosine of every pair, [N (N − 1) / 2]."""
    unit = nn.functional.normalize(features.double(), dim=-1)
    cosines = unit @ unit.T
    above = torch.triu_indices(len(unit), len(unit), offset=1)
    return cosines[above[0], above[1]].numpy()


def _drift(before: np.ndarray, after: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    x, y = rankdata(before), rankdata(after)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return 1.0 - float(x @ y) / norm if norm > 0.0 else None


def _probe_accuracy(model: nn.Module, fit: Sequence[Any], score: Sequence[Any]) -> float:
    """Accuracy of a logistic regression on frozen features of another task."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = _features(model, [row["input_ids"] for row in (*fit, *score)]).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(features[: len(fit)], [row["labels"] for row in fit])
    return float(classifier.score(features[len(fit) :], [row["labels"] for row in score]))


def _probe_examples(name: str) -> tuple[list[Any], list[Any]]:
    """What is fitted on, and what is scored: the same for all runs."""
    with torch.random.fork_rng(devices=[]):
        other = bench_task({"name": name, "train_size": PROBE_FIT}, seed=0)
    assert other.test is not None
    drawn = random.Random("probe").sample(range(len(other.test)), min(PROBE_TEST, len(other.test)))
    fit = [other.train[index] for index in range(min(PROBE_FIT, len(other.train)))]
    return fit, [other.test[index] for index in drawn]


def _language_model_loss(task: PreparedTask, model: nn.Module, texts: Sequence[str]) -> float:
    rows = _token_ids(model, task.processor, texts)
    data = [{"input_ids": ids, "labels": ids} for ids in rows if len(ids) > 1]
    measured = replace(task, model=model)

    def loss(network: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        device = next(network.parameters()).device
        return task.loss(network, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    return evaluate(measured, data, batch_size=8, loss=loss)["loss"]


def _change(before: float, after: float, *, sign: float) -> dict[str, float]:
    return {"before": before, "after": after, "forgetting": sign * (after - before)}
