"""What a finished run reached and spent, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rgft.cli.progress import duration
from rgft.learning_rate import rate_text
from rgft.sizes import size_text
from rgft.telemetry.energy import energy_text

if TYPE_CHECKING:
    from rich.console import Console


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report of `rgft train`."""
    from rich.table import Table

    if report["metrics"]:
        scores = Table("split", "metric", "value")
        for split, values in report["metrics"].items():
            for name, value in values.items():
                scores.add_row(split, name, f"{value:.4f}")
        console.print(scores)
    flops, saved, audit = report["flops"], report["flops"]["saved"], report["audit"]
    whole = flops["full"] or flops["same_batches_in_full"]
    table = Table("FLOPs", "", "of full fine-tuning")
    skipped = _skipped(saved, is_biased=report.get("data", {}).get("targets_are_biased", False))
    padding = (("padding", -saved["padding"]),) if saved["padding"] else ()
    rows = (
        ("full fine-tuning, same batches", flops["same_batches_in_full"]), *padding,
        ("dW skipped", -saved["dw_skipped"]), ("dX truncated", -saved["dx_truncated"]),
        ("F cached", -saved["forward_cached"]), ("positions not read", -saved["unread_positions"]),
        *skipped, ("probes", flops["probes"]), ("readout", flops.get("readout", 0.0)),
        ("cache filling", flops["cache_filling"]), ("search", flops["search"]), ("spent", flops["spent"]),
    )  # fmt: skip
    added = (
        ("computed twice", flops["recomputed"]), ("low-rank pairs", flops["low_rank_pairs"]),
        ("optimizer's products", flops["optimizer"]),
    )  # fmt: skip
    place = 5 + len(padding) + len(skipped)
    rows = (*rows[:place], *(row for row in added if row[1]), *rows[place:])
    if flops["head_at_targets"]:
        rows = (*rows, ("of it a language model's head", flops["head_at_targets"]))
    for name, value in rows:
        table.add_row(name, f"{value:.4g}", f"{value / whole:.1%}")
    console.print(table)
    if report["search"] is not None:
        pairs = report["low_rank"]
        found = rate_text(report["lr"], None if pairs is None else pairs["lr_multiplier"])
        tried = ", ".join(f"{rate:g}" for rate, _ in report["search"]["rounds"][0]["losses"])
        console.print(f"learning rate {found}, found among {tried}", highlight=False)
    counted = "" if audit["error"] is None else f"; counted in {audit['audits']} passes, off by {audit['error']:+.2%}"
    console.print(
        f"{report['steps']} steps in {duration(report['seconds']['total'])}, cut at depth {report['plan']['cut']} "
        f"({report['plan']['reason']}){counted}\n{_energy(report['energy'])}{_memory(report['memory'])}"
        f"model: {report['model']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _energy(energy: Mapping[str, Any]) -> str:
    """A line about energy, which says whether it was measured."""
    if energy["source"] is None:
        return ""
    notes = "; ".join(note.partition(": ")[2] for note in energy["notes"])
    return (
        f"energy, {energy['source']}: {energy_text(energy['joules']['total'])} ({energy['kwh']:.3g} kWh), "
        f"{energy['co2_grams']:.3g} g CO2 at {energy['carbon_intensity']:g} g/kWh ({notes})\n"
    )


def _skipped(saved: Mapping[str, float], *, is_biased: bool) -> list[tuple[str, float]]:
    """Rows about what was skipped as learnt well, if anything was."""
    label = "tokens skipped (BIASED)" if is_biased else "tokens skipped"
    rows = [("examples skipped", -saved.get("examples_skipped", 0.0)), (label, -saved.get("targets_skipped", 0.0))]
    return [(what, flops) for what, flops in rows if flops]


def _memory(memory: Mapping[str, Any]) -> str:
    """A line about the memory budget, if there was one."""
    if "limit_bytes" not in memory:
        return ""
    limit, forecast, found = (memory[key] for key in ("limit_bytes", "forecast_bytes", "measured_bytes"))
    measured = "not measured" if found is None else f"measured {size_text(found)}"
    kept = "" if memory["is_within"] is not False else ": THE LIMIT WAS EXCEEDED"
    return f"memory of a step: {measured}, forecast {size_text(forecast)}, limit {size_text(limit)}{kept}\n"


def show_nested(data: Mapping[str, Any], console: Console, *, indent: int = 0) -> None:
    """Prints nested settings, one per line."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            console.print(f"{' ' * indent}{key}:", highlight=False)
            show_nested(value, console, indent=indent + 2)
        else:
            console.print(f"{' ' * indent}{key}: {value}", highlight=False, markup=False, soft_wrap=True)
