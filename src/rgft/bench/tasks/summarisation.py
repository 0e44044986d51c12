"""Summarisation with an encoder–decoder (T5): loss per token of the summary, ROUGE and BLEU of what is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from rgft.bench.tasks.generation import completions
from rgft.bench.tasks.splits import apart, drawn, some_of
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.files import read_rows
from rgft.tasks.models import load_seq2seq, load_tokenizer
from rgft.tasks.sequence_loss import SequenceMetric, number_of_tokens, sequence_losses
from rgft.tasks.token_loss import TokenCollator

#: A text and its summary.
Pair = tuple[str, str]

ROUGE = ("rouge1", "rouge2", "rougeL")

#: What is set apart by spaces: punctuation, full stops and commas beside what is no digit, dashes after digits.
_SPLITS_13A = tuple(
    (re.compile(pattern), spaced)
    for pattern, spaced in (
        (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "), (r"([^0-9])([\.,])", r"\1 \2 "),
        (r"([\.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 "),
    )
)  # fmt: skip


def summarisation(
    *, model: str, train_size: int, seed: int, data: str = "EdinburghNLP/xsum", validation: str | None = None,
    test: str | None = None, columns: tuple[str, str] = ("document", "summary"), prefix: str = "summarize: ",
    max_tokens: int = 512, summary_tokens: int = 64, test_size: int | None = None, validation_size: int | None = 200,
) -> PreparedTask:  # fmt: skip
    """Summaries as XSum (Narayan et al. 2018) has them: one sentence for an article.

    Args:
        model: hub name or folder of an encoder–decoder; no package carries one.
        train_size: articles, drawn from what is not held out.
        seed: of the draw; validation and test are the same for all.
        data: hub name with the splits train, validation and test, or a file with the training articles.
        validation, test: files or hub names; both are needed where `data` is a file.
        columns: with the text and its summary.
        prefix: put before each text; what T5 was trained with.
        max_tokens, summary_tokens: of a text and of a summary; longer ones are cut.
        test_size, validation_size: articles that are evaluated, the same in every run; None: all.

    Raises:
        DataError: a source or the model cannot be used, the package rouge-score is missing, or there are fewer
            articles than `train_size`.
    """
    _scorer()  # before hours of training, not after them
    sources = {"train": data, "validation": validation or data, "test": test or data}
    if len(set(sources.values())) > 1 and (validation is None or test is None):
        raise DataError("validation and test: expected both or neither, found one of them")
    splits = apart(
        {split: _pairs(source, columns, split) for split, source in sources.items()}, key=lambda pair: pair[0]
    )
    rows = {
        "train": drawn(splits["train"], train_size, seed=seed, what="articles"),
        "validation": some_of(splits["validation"], validation_size, name="validation"),
        "test": some_of(splits["test"], test_size, name="test"),
    }
    for split, some in rows.items():
        if not some:
            raise DataError(
                f"{split}: expected articles that are in no other split, found none; give files of their own"
            )
    tokenizer = load_tokenizer(model)
    network = load_seq2seq(model, pad_token_id=tokenizer.pad_token_id)
    examples = {split: _encoded(some, tokenizer, prefix, max_tokens, summary_tokens) for split, some in rows.items()}
    return PreparedTask(
        model=network, processor=tokenizer, train=examples["train"], validation=examples["validation"],
        test=examples["test"], collate=TokenCollator(tokenizer.pad_token_id), loss=sequence_losses,
        metric=SequenceMetric, weight=number_of_tokens, primary_metric="rougeL",
        judge=partial(
            overlap, tokenizer=tokenizer, prompts=[example["input_ids"] for example in examples["test"]],
            references=[summary for _, summary in rows["test"]], new_tokens=summary_tokens,
        ),
        judged_on=[summary for _, summary in rows["test"]],
    )  # fmt: skip


def overlap(
    model: nn.Module, *, tokenizer: Any, prompts: Sequence[Sequence[int]], references: Sequence[str], new_tokens: int
) -> dict[str, float]:
    """ROUGE-1, ROUGE-2, ROUGE-L and BLEU of summaries written greedily."""
    written = [texts[0] for texts in completions(model, tokenizer, prompts, new_tokens=new_tokens)]
    return {**rouge_scores(written, references), "bleu": bleu_score(written, references)}


def rouge_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE (Lin 2004): F1 with stemming, in the mean over pairs, as `rouge1`, `rouge2`, `rougeL`."""
    scorer = _scorer()
    scores = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


def bleu_score(written: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of all texts together (Papineni et al. 2002), 0…1.

    Tokens are those of mteval-13a. If no n-gram of some length is found, half a hit is counted, and for the next such
    length a quarter (Chen and Cherry 2014, method 3). It is a hundredth of sacreBLEU's, but where texts of fewer than
    four tokens are written: of these NLTK counts one n-gram that is wrong for each length that they do not have.
    """
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu  # pyright: ignore[reportMissingImports]

    found: Any = corpus_bleu(
        [[_tokens_13a(reference)] for reference in references], [_tokens_13a(text) for text in written],
        smoothing_function=SmoothingFunction().method3,
    )  # fmt: skip
    return float(found)


def _tokens_13a(text: str) -> list[str]:
    """Words and punctuation; full stops and commas stay in numbers (NIST's mteval-v13a.pl, without its entities)."""
    text = f" {text} "
    for pattern, spaced in _SPLITS_13A:
        text = pattern.sub(spaced, text)
    return text.split()


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError(
            f"this needs the package {error.name}, which is not installed: run pip install 'rgft[bench]'"
        ) from error
    return RougeScorer(ROUGE, use_stemmer=True)


def _pairs(source: str, columns: tuple[str, str], split: str) -> list[Pair]:
    pairs: list[Pair] = []
    for number, row in enumerate(read_rows(source, columns, split=split), start=1):
        text, summary = row[columns[0]], row[columns[1]]
        if not all(isinstance(value, str) and value.strip() for value in (text, summary)):
            raise DataError(
                f"{source} ({split}), row {number}: expected a text and its summary in {' and '.join(columns)}; remove "
                "or fill such rows"
            )
        pairs.append((text.strip(), summary.strip()))
    return pairs


def _encoded(
    pairs: Sequence[Pair], tokenizer: Any, prefix: str, max_tokens: int, summary_tokens: int
) -> list[dict[str, list[int]]]:
    texts = tokenizer([prefix + text for text, _ in pairs], truncation=True, max_length=max_tokens)["input_ids"]
    summaries = tokenizer(
        text_target=[summary for _, summary in pairs], truncation=True, max_length=summary_tokens
    )["input_ids"]  # fmt: skip
    return [{"input_ids": text, "labels": labels} for text, labels in zip(texts, summaries, strict=True)]
