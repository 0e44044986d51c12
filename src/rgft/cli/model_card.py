"""The model card: what a saved model is, how it was made, what it reached and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgft.cli.request import RunSettings, TaskName
from rgft.learning_rate import rate_text

#: Task → the hub's name of the pipeline that runs such a model.
PIPELINES: Mapping[TaskName, str] = {
    "text-classification": "text-classification", "regression": "text-classification",
    "language-modelling": "text-generation", "chat": "text-generation", "image-classification": "image-classification",
}  # fmt: skip


def model_card(
    settings: RunSettings, *, metrics: Mapping[str, Mapping[str, float]], ledger: Mapping[str, Any], lr: float,
    pairs: Mapping[str, Any] | None, version: str,
) -> str:  # fmt: skip
    """The text of `README.md`, with front-matter as model hubs read it.

    Args:
        settings: of the run.
        metrics: split → name → value.
        ledger: its summary.
        lr: learning rate at multiplier 1.
        pairs: the low-rank pairs that layers were trained by (`rgft.cli.preview.low_rank`); None: none.
        version: of RGFT.
    """
    import yaml

    is_local = Path(settings.model).expanduser().exists()
    front: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": PIPELINES[settings.task], "tags": ["rgft"],
    }  # fmt: skip
    if not is_local:
        front["base_model"] = settings.model
    names = sorted({name for values in metrics.values() for name in values} - {"loss"})
    if names:
        front["metrics"] = names
    base = Path(settings.model).name if is_local else settings.model
    flops, parameters = ledger["flops"], ledger["parameters"]
    share = flops["fraction_of_full"]
    rates = rate_text(lr, None if pairs is None else pairs["lr_multiplier"])
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, fine-tuned with RGFT",
        "",
        f"Fine-tuned for {settings.task} with Residual-Guided Fine-Tuning {version}, which spends compute only on the "
        "parts of the model that cause the remaining error.",
        "",
        "## Results",
        "",
        "| split | metric | value |",
        "|---|---|---:|",
        *(f"| {split} | {name} | {value:.4f} |" for split, values in metrics.items() for name, value in values.items()),
        "",
        "## Cost",
        "",
        f"- {flops['spent']:.4g} FLOPs of training and scoring"
        + ("" if share is None else f", {share:.1%} of full fine-tuning's {flops['full']:.4g} on the same data"),
        f"- {ledger['steps']} steps of {settings.batch_size * settings.accumulation} examples; "
        f"{parameters['updated_per_step']:,.0f} parameters updated per step, {parameters['updated_in_all']:,} in all",
        f"- {ledger['seconds']['total']:.0f} s, evaluation not counted",
        f"- {ledger['energy']['kwh']:.3g} kWh and {ledger['energy']['co2_grams']:.3g} g CO2, "
        f"{ledger['energy']['source']}",
        *([f"- layers trained by low-rank pairs of rank {pairs['rank']}, merged into the weights"] if pairs else ()),
        *_skipped(ledger.get("data", {})),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'model = pipeline("{PIPELINES[settings.task]}", model="path/of/this/folder")',
        f"model({_example(settings)})",
        "```",
        "",
        f"Learning rate {rates}, seed {settings.seed}; all settings are in the run's `config.json`.",
        "",
    ]
    return "\n".join(lines)


def _example(settings: RunSettings) -> str:
    """What the task's pipeline is called with."""
    match settings.task:
        case "text-classification" | "regression" if len(settings.text) == 2:
            return '{"text": "a text", "text_pair": "another"}, truncation=True'
        case "text-classification" | "regression":
            return '"a text", truncation=True'
        case "language-modelling":
            return '"the beginning of a text"'
        case "chat":
            return '[{"role": "user", "content": "a question"}]'
        case "image-classification":
            return '"image.png"'


def _skipped(data: Mapping[str, Any]) -> list[str]:
    """What training left out because it was learnt well, if it did."""
    lines: list[str] = []
    if data.get("examples_skipped"):
        lines.append(f"- {data['examples_skipped']:,} times a well-learnt example was skipped, without bias")
    if data.get("targets_skipped"):
        how = "BIASED: the loss was another one than the mean" if data["targets_are_biased"] else "without bias"
        lines.append(f"- {data['targets_skipped']:,} times a well-learnt token was skipped, {how}")
    return lines
