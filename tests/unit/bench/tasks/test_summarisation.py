import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.tasks import bench_task
from rgft.config import Config
from rgft.errors import DataError
from rgft.run import Run, Settings
from rgft.tasks.sequence_loss import SequenceMetric, sequence_losses
from tests.decoders import WORDS, word_tokenizer

pytest.importorskip("rouge_score", reason="needs rgft[bench]")

TEXTS = [" ".join(letters) for letters in product("abcdefghij", repeat=3)]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=3, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(folder: Path, model: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "summarisation", "model": model, "train_size": 40, "prefix": "", **more}
    for name, texts in (("data", TEXTS[:60]), ("validation", TEXTS[55:70]), ("test", TEXTS[65:80])):
        path = folder / f"{name}.jsonl"
        rows = [{"document": text, "summary": " ".join(text.split()[: 1 + i % 2])} for i, text in enumerate(texts)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        found[name] = str(path)
    return found


def test_splits_loss_and_scores(t5: str, tmp_path: Path) -> None:
    task = bench_task(settings(tmp_path, t5), seed=0)
    assert task.validation is not None
    assert task.test is not None
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 10, 15)
    batch = task.collate([task.train[i] for i in range(6)])
    task.model.eval()
    with torch.no_grad():
        losses = sequence_losses(task.model, batch)
        theirs = task.model(**batch)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), theirs.loss)
    metric = SequenceMetric()
    metric.update(theirs.logits, batch)
    assert metric.compute()["perplexity"] == pytest.approx(float(theirs.loss.exp()), rel=1e-5)
    run = Run(task, Config.from_dict({"budget": 0.4, "seed": 0}), Settings(lr=1e-2, epochs=4.0, batch_size=8))
    try:
        run.train()
        with run.guide.evaluating():
            assert task.judge is not None
            scores = task.judge(task.model)
    finally:
        run.close()
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "bleu"}
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    assert task.judge(task.model) == scores  # the guide, attached, changes nothing of what is written


def test_rouge() -> None:
    from rgft.bench.tasks.summarisation import rouge_scores

    found = rouge_scores(["the cat sat", "dogs run"], ["the cat sat down", "a dog runs"])
    # Of three words three are among four; of two, stemmed, two are among three.
    assert found["rouge1"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert found["rouge2"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_bleu() -> None:
    from rgft.bench.tasks.summarisation import bleu_score

    texts = ["The cat sat on a mat, at 3.5 metres.", "Dogs ran"]
    references = ["The cat sat on the mat at 3.5 metres.", "Dogs ran away"]
    # Of 11 + 2 tokens 9 + 2 are there, and so on; the second text has no 3-gram, for which NLTK counts one.
    precisions = [11 / 13, 7 / 11, 4 / 10, 2 / 9]
    assert bleu_score(texts, references) == pytest.approx(math.prod(precisions) ** (1 / 4))
    assert bleu_score(references[:1], references[:1]) == pytest.approx(1.0)
    # What sacreBLEU 2.6.0 says of it: no 3-gram and no 4-gram is found, and one token is missing.
    assert bleu_score(["a b c d x"], ["a b x c d y"]) == pytest.approx(0.2615611844567672)
    assert bleu_score([""], ["a b"]) == 0.0


def test_what_cannot_be_used(t5: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(tmp_path, t5)
    del made["test"]
    with pytest.raises(DataError, match="expected both or neither"):
        bench_task(made, seed=0)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataError, match=r"pip install 'rgft\[bench\]'"):
        bench_task(made, seed=0)
