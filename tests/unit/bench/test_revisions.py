"""A method whose defaults change makes other runs: its revision tells stored results of before from those of now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.methods import METHODS, Followed, Method
from rgft.config import Config
from rgft.config.presets import PRESETS

#: Method → its revision, and a digest of all its defaults then.
NOTED: dict[str, list[Any]] = json.loads(Path(__file__).with_name("revisions.json").read_text(encoding="utf-8"))


def digest_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda function: f"{function.__module__}:{function.__name__}")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def defaults_of(method: Method) -> dict[str, Any]:
    """Its own settings, and all RGFT settings that are not their fields' defaults, those of stages filled in."""
    config = method.configuration(budget=0.3, seed=0, settings={}, followed=Followed()).resolved()
    instead = {"instead": method.instead} if method.instead else {}
    return {"config": config.model_dump(exclude_defaults=True), "settings": method.settings, **instead}


def test_each_method_is_noted() -> None:
    assert list(NOTED) == sorted(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_changed_defaults_are_another_revision(name: str) -> None:
    """If this fails, raise the method's `revision` and note it with the new digest, in `revisions.json`.

    Where runs stay as they were (a new setting that is off), the digest alone is noted.
    """
    method = METHODS[name]
    assert [method.revision, digest_of(defaults_of(method))] == NOTED[name]


def test_changed_defaults_of_fields_concern_every_method() -> None:
    """If this fails because some field has another default, raise the revisions of all methods that do not set it."""
    assert digest_of(Config(preset="full").to_dict()) == "9a687a9bfe99"


def test_the_digest_sees_presets_stages_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    last_n, lora = METHODS["last_n"], METHODS["lora"]
    before = digest_of(defaults_of(last_n))
    assert digest_of(defaults_of(replace(lora, settings={**lora.settings, "rank": 4}))) != NOTED["lora"][1]
    monkeypatch.setitem(PRESETS["rgft"], "update", {"dropout": "model"})  # type: ignore[arg-type]
    assert digest_of(defaults_of(last_n)) != before
    assert digest_of(defaults_of(lora)) == NOTED["lora"][1]
