"""General corpora that are everywhere: prose of Python's standard library, and of the packaged news."""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from rgft.bench.measures.overlap import found_again
from rgft.bench.tasks.news import bbc_splits
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask

#: Characters of a text: long enough to mean something, short enough to be read whole.
SHORTEST, LONGEST = 60, 600
#: Words in a row in common with a training example that make a text one that is trained on (Brown et al. 2020,
#: appendix C).
COMMON_WORDS = 13
#: Modules of the library's own tests, and what is not part of it.
_SKIPPED = frozenset({"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__"})


def general_texts(count: int, corpus: str = "docstrings") -> list[str]:
    """Texts of a corpus, the same ones for all runs.

    They are English prose, general in that the task that is trained on is not about them, not in being a sample of the
    language.

    Args:
        count: of texts.
        corpus: key of `CORPORA`.

    Raises:
        DataError: there are fewer, or the corpus is in a package that is not installed.
    """
    texts = CORPORA[corpus]()
    if count > len(texts):
        raise DataError(
            f"evaluate.general_texts: expected at most {len(texts)}, which {corpus!r} has under Python "
            f"{sys.version.split()[0]}, found {count}"
        )
    return random.Random("general texts").sample(texts, count)


def require_unseen(texts: Sequence[str], task: PreparedTask, corpus: str) -> None:
    """Refuses a corpus that the task trains on: what is learnt there is no forgetting.

    Raises:
        DataError: a text has `COMMON_WORDS` words in a row in common with a training example, or is part of one.
    """
    rows = (task.train[index]["input_ids"] for index in range(len(task.train)))
    trained_on = (_words(task.processor.decode(ids, skip_special_tokens=True)) for ids in rows)
    again = found_again([_words(text) for text in texts], trained_on, run=COMMON_WORDS)
    if any(again):
        others = ", ".join(repr(name) for name in CORPORA if name != corpus)
        raise DataError(
            f"evaluate.general_corpus: expected texts that are not trained on, found {sum(again)} of {len(texts)} of "
            f"{corpus!r} in the training split, first {texts[again.index(True)]!r:.80}; take another corpus: {others}"
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def _news() -> list[str]:
    """Paragraphs of BBC's articles."""
    splits, _ = bbc_splits()
    lines = (line for rows in splits.values() for article, _ in rows for line in article.split("\n"))
    return sorted({text for line in lines if _is_general(text := " ".join(line.split()))})


@cache
def _docstrings() -> list[str]:
    """First paragraphs of docstrings of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for path in sorted(root.glob("**/*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            found.update(_paragraphs(path))
    return sorted(found)


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if _is_general(first):
                yield first


def _is_general(text: str) -> bool:
    return SHORTEST <= len(text) <= LONGEST and text.isascii()


#: Name → its texts.
CORPORA: Mapping[str, Callable[[], list[str]]] = {"docstrings": _docstrings, "news": _news}
