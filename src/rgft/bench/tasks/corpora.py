"""Which corpora examples come from, one name for each: tasks that share one are not independent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

#: What goes by another name, or holds a part of another corpus.
_CORPORA: Mapping[str, frozenset[str]] = {
    "sst2": frozenset({"rotten_tomatoes"}),  # phrases of the same reviews
    "mnli_mismatched": frozenset({"mnli"}),  # one training set
    "super_rte": frozenset({"rte"}),
    "stsb": frozenset({"stsb", "mrpc"}),  # a fifth of its pairs are of MRPC's corpus
    "wnli": frozenset({"winograd"}),
    "wsc": frozenset({"winograd"}),
    "digits": frozenset({"mnist"}),
    "topics": frozenset({"bbc"}),
}


def corpora(*names: str | None) -> frozenset[str]:
    """Names of the corpora behind data sets.

    Args:
        names: of tasks, packaged sets, hub names ("owner/name") or files; None: there is none.
    """
    return frozenset().union(*(_CORPORA.get(known, {known}) for name in names if name and (known := _plain(name))))


def _plain(name: str) -> str:
    """A hub name without its owner, files and folders as they are."""
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not PurePath(name).suffix
    return name.rpartition("/")[2].lower().replace("-", "_") if is_hub_name else name
