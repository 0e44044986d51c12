"""The figures of a ledger: nested for programs, and as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rgft.telemetry.energy import JOULES_PER_KWH, co2_grams

if TYPE_CHECKING:
    from rgft.telemetry.ledger import Ledger


def summary(ledger: Ledger, full_flops: float | None) -> dict[str, Any]:
    """See `Ledger.summary`."""
    saved = ledger.forward_cached_flops + ledger.dx_truncated_flops + ledger.dw_skipped_flops + ledger.unread_flops
    saved += ledger.examples_flops + ledger.targets_flops + ledger.padding_flops
    added = ledger.beside_flops + ledger.recomputed_flops + ledger.pair_flops + ledger.optimizer_flops
    return {
        "steps": ledger.steps,
        "flops": {
            "spent": ledger.spent_flops,
            "full": full_flops,
            "fraction_of_full": ledger.spent_flops / full_flops if full_flops else None,
            "same_batches_in_full": ledger.reference_flops,
            "fraction_of_same_batches": ledger.spent_flops / ledger.reference_flops if ledger.reference_flops else None,
            "forward": ledger.forward_flops, "dx": ledger.dx_flops, "dw": ledger.dw_flops,
            "head_at_targets": ledger.head_flops,
            "probes": ledger.probe_flops, "readout": ledger.readout_flops, "cache_filling": ledger.fill_flops,
            "search": ledger.search_flops,
            "recomputed": ledger.recomputed_flops, "low_rank_pairs": ledger.pair_flops,
            "optimizer": ledger.optimizer_flops,
            "scoring_fraction": ledger.probe_flops / ledger.spent_flops if ledger.spent_flops else None,
            "saved": {
                "dw_skipped": ledger.dw_skipped_flops, "dx_truncated": ledger.dx_truncated_flops,
                "forward_cached": ledger.forward_cached_flops, "unread_positions": ledger.unread_flops,
                "padding": ledger.padding_flops,
                "examples_skipped": ledger.examples_flops, "targets_skipped": ledger.targets_flops,
                "added": added, "net": saved - added,
            },
            "evaluation": ledger.evaluation_flops,
        },
        "audit": {
            "audits": ledger.audits, "counted": ledger.audited_flops, "modelled": ledger.audited_modelled_flops,
            "error": ledger.audit_error,
        },
        "seconds": {**ledger.seconds, "total": ledger.elapsed},
        "energy": _energy(ledger),
        "memory": {
            "peak_bytes": ledger.peak_memory_bytes, "peak_accelerator_bytes": ledger.peak_accelerator_bytes or None,
            **_against_limit(ledger),
        },
        "data": {
            "passes": ledger.passes, "examples": ledger.examples, "tokens": ledger.tokens,
            # Told by some passes only, a share would be a guess.
            "padding_tokens": ledger.padding_tokens if ledger.tokens_with_known_padding == ledger.tokens else None,
            "examples_skipped": ledger.examples_skipped, "targets_skipped": ledger.targets_skipped,
            "targets_are_biased": ledger.targets_are_biased,
        },
        "parameters": {
            "updated_in_last_step": ledger.last_updated_parameters,
            "updated_per_step": ledger.updated_parameters / ledger.steps if ledger.steps else 0.0,
            "updated_in_all": ledger.parameters_ever_updated,
            "steps_by_component": dict(ledger.component_steps),
        },
    }  # fmt: skip


def _energy(ledger: Ledger) -> dict[str, Any]:
    spent, all_joules = ledger.spent_joules, sum(ledger.joules.values())
    # Losers' energy is booked once more, as the search's, and is of either source.
    is_all, is_some = ledger.measured_joules >= all_joules * (1.0 - 1e-9), ledger.measured_joules > 0.0
    source = "measured" if is_all else "measured in part" if is_some else "estimated"
    return {
        "joules": {**ledger.joules, "total": spent}, "kwh": spent / JOULES_PER_KWH,
        "co2_grams": co2_grams(spent, ledger.carbon_intensity), "carbon_intensity": ledger.carbon_intensity,
        "source": source if ledger.joules else None, "notes": list(ledger.energy_notes),
    }  # fmt: skip


def _against_limit(ledger: Ledger) -> dict[str, Any]:
    """What a memory budget was, and what was measured; nothing without one."""
    if ledger.memory_limit_bytes is None:
        return {}
    # On an accelerator its allocator knows; on the CPU only steps that were followed.
    peak = ledger.peak_accelerator_bytes or ledger.peak_step_bytes
    before, after = ledger.resident_before_bytes, ledger.peak_memory_bytes
    return {
        "limit_bytes": ledger.memory_limit_bytes, "forecast_bytes": ledger.memory_forecast_bytes,
        "measured_bytes": peak, "is_within": None if peak is None else peak <= ledger.memory_limit_bytes,
        "resident_growth_bytes": None if before is None or after is None else after - before,
    }  # fmt: skip


def as_rows(ledger: Ledger, full_flops: float | None) -> list[tuple[str, float, float | None]]:
    """See `Ledger.as_rows`."""
    whole = full_flops or ledger.reference_flops
    rows = [
        ("full fine-tuning, same batches", ledger.reference_flops),
        ("padding", -ledger.padding_flops),
        ("dW skipped", -ledger.dw_skipped_flops),
        ("dX truncated", -ledger.dx_truncated_flops),
        ("F cached", -ledger.forward_cached_flops),
        ("positions not read", -ledger.unread_flops),
        ("examples skipped", -ledger.examples_flops),
        ("targets skipped" + ledger.bias_label, -ledger.targets_flops),
        ("computed twice", ledger.recomputed_flops),
        ("low-rank pairs", ledger.pair_flops),
        ("optimizer's products", ledger.optimizer_flops),
        ("probes", ledger.probe_flops),
        ("readout", ledger.readout_flops),
        ("cache filling", ledger.fill_flops),
        ("search", ledger.search_flops),
        ("spent", ledger.spent_flops),
    ]
    return [(what, flops, flops / whole if whole else None) for what, flops in rows]
