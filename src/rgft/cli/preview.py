"""What a run would do and cost, before anything runs: components, the plan to begin with, FLOPs by depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rgft.allocation.base import Situation
from rgft.allocation.budget import affords
from rgft.assembly import build_policy
from rgft.cli.progress import short
from rgft.cost import CostModel, StepCost
from rgft.guide import Guide
from rgft.learning_rate import rate_text
from rgft.run import Run
from rgft.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console


def preview(run: Run) -> dict[str, Any]:
    """Components, run plan, first plan and costs of a run that was prepared; trains nothing.

    Returns:
        Fit for JSON. `components`; `run_plan`; `first_plan`: what would be decided before anything is scored;
        `steps_in_full`: optimizer steps of full fine-tuning; `learning_rates`: what the run takes, or searches among;
        where it follows the rule (`is_rate_by_rule`), of the first plan; `by_depth`: for a cut at each depth, what lies
        there, what a step on a typical batch costs (the prefix computed, and read from the cache), and, where it was
        read, what a linear map of that layer's output leaves unexplained of the targets.
    """
    guide = run.guide
    assert guide.run_plan is not None
    assert guide.costs is not None
    situation = replace(guide.situation(), batches=run.batches_in_full, batches_per_epoch=run.batches_in_epoch)
    left = guide.flops_left
    assert left is not None  # what was read out before the first step is spent
    probes = guide.run_plan.probes * guide.costs.probe_flops(guide.run_plan.probe_size, situation.tokens, weights=True)
    policy = build_policy(guide.config)
    first = guide.plan if policy is None else policy.decide(situation)
    by_depth = _by_depth(run, guide.costs, replace(situation, flops_allowed=max(0.0, left - probes)))
    return {
        "model": {"components": len(guide.partition), "parameters": guide.partition.numel,
                  "family": guide.partition.family, "granularity": guide.partition.granularity},
        "components": [
            {"name": c.name, "kind": c.kind, "depth": c.depth, "parameters": c.numel} for c in guide.partition
        ],
        "run_plan": guide.run_plan.to_dict(),
        "learning_rates": _learning_rates(
            run, next(row["steps"] for row in by_depth if row["depth"] >= first.cut), first.cut
        ),
        "is_rate_by_rule": run.settings.is_lr_by_rule,
        "budget": guide.run_plan.flops / guide.run_plan.full_flops,
        "low_rank": low_rank(guide),
        "first_plan": {"cut": first.cut, "active": list(first.active(0)), "reason": first.reason},
        "steps_in_full": -(-run.batches_in_full // run.settings.accumulation),
        "typical_batch": {"rows": situation.rows, "tokens": situation.tokens},
        "by_depth": by_depth,
    }  # fmt: skip


def _learning_rates(run: Run, steps: int, cut: int) -> list[float]:
    settings = run.settings
    passes = steps * settings.accumulation / run.batches_in_epoch
    lr = run.rate_for(passes, steps=steps, trained=run.guide.partition.share_above(cut))
    return list(settings.candidate_lrs(lr)) if settings.is_lr_searched else [lr]


def low_rank(guide: Guide) -> dict[str, Any] | None:
    """What is trained by low-rank pairs, and how; None: nothing."""
    settings = guide.config.update.pairs
    return settings and {
        "rank": settings.rank, "alpha": settings.alpha, "lr_multiplier": settings.lr_multiplier,
        "components": list(guide.plan.low_rank or ()),
    }  # fmt: skip


def _by_depth(run: Run, costs: CostModel, situation: Situation) -> list[dict[str, Any]]:
    partition, rows, tokens = run.guide.partition, situation.rows, situation.tokens
    full = costs.full_step(rows, tokens).total
    at: dict[int, StepCost] = defaultdict(lambda: StepCost(forward=0.0, dx=0.0, dw=0.0))
    depth_of = {component.name: component.depth for component in partition}
    for name, cost in costs.by_component(rows, tokens).items():
        depth = depth_of.get(name, 0)
        old = at[depth]
        at[depth] = StepCost(forward=old.forward + cost.forward, dx=old.dx + cost.dx, dw=old.dw + cost.dw)
    readout = run.guide.readout
    table: list[dict[str, Any]] = []
    for depth in sorted({component.depth for component in partition}):
        above = frozenset(component.name for component in partition.above(depth))
        step = costs.step_flops(above, rows=rows, tokens=tokens).total
        cached = costs.step_flops(above, rows=rows, tokens=tokens, cached_below=depth).total
        here = [component for component in partition if component.depth == depth]
        table.append(
            {
                "depth": depth,
                "layer": here[0].layer or ", ".join(component.name for component in here),
                "parameters": sum(component.numel for component in here),
                "forward_flops": at[depth].forward, "dx_flops": at[depth].dx, "dw_flops": at[depth].dw,
                "step_fraction": step / full,
                "cached_step_fraction": cached / full if run.guide.cache is not None else None,
                "steps": int(affords(situation, depth)[1]),
                "unexplained": readout.unexplained.get(here[0].layer) if readout and here[0].layer else None,
            }
        )  # fmt: skip
    return table


def show(data: dict[str, Any], console: Console) -> None:
    """Prints `preview` as tables."""
    from rich.table import Table

    model, plan = data["model"], data["run_plan"]
    components = Table("component", "kind", "depth", "parameters", title=(
        f"{model['components']} components ({model['granularity']}, {model['family']}), "
        f"{model['parameters']:,} parameters"
    ))  # fmt: skip
    active = set(data["first_plan"]["active"])
    for item in data["components"]:
        mark = "" if item["name"] in active else "[dim]"
        components.add_row(
            mark + item["name"], item["kind"], str(item["depth"]), f"{item['parameters']:,}"
        )  # fmt: skip
    console.print(components)
    title = (
        f"Cost by depth: FLOPs of a full step on {data['typical_batch']['rows']} × {data['typical_batch']['tokens']} "
        "tokens; a step cut there, as a share of it; steps the budget buys"
    )
    is_read = any(row["unexplained"] is not None for row in data["by_depth"])
    if is_read:
        title += "; share of the targets that a linear map of the layer's output leaves unexplained, the readout"
    names = ("cut", "at this depth", "F", "dX", "dW", "step", "cached", "steps", *(("unexplained",) if is_read else ()))
    costs = Table(*names, title=title)
    for row in data["by_depth"]:
        cached, left = row["cached_step_fraction"], row["unexplained"]
        costs.add_row(
            str(row["depth"]), short(row["layer"]), f"{row['forward_flops']:.2g}", f"{row['dx_flops']:.2g}",
            f"{row['dw_flops']:.2g}", f"{row['step_fraction']:.2f}", "" if cached is None else f"{cached:.2f}",
            f"{row['steps']:,}", *(("" if left is None else f"{left:.2f}",) if is_read else ()),
        )  # fmt: skip
    console.print(costs)
    if plan["memory"] is not None:
        console.print(memory_text(plan["memory"]), highlight=False, soft_wrap=True)
    if data["low_rank"] is not None:
        pairs = data["low_rank"]
        console.print(
            f"low-rank pairs of rank {pairs['rank']} (alpha {pairs['alpha']:g}) in place of dense dW: "
            f"{len(pairs['components'])} of {model['components']} components; \"step\" and \"cached\" count them",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    position = plan["position"]
    skipping = "" if position is None else f"; past the last attention only position {position}, which the loss reads"
    if plan["head_at_targets"]:
        skipping = "; the language model's head only where a token is learnt"
    if plan["computed_share"] < 1.0:
        skipping += f"; rows of like length together: {plan['computed_share']:.0%} of all positions"
    skipping += f"; skipped from the second epoch on: {plan['skips']}" if plan["skips"] else ""
    multiplier = None if data["low_rank"] is None else data["low_rank"]["lr_multiplier"]
    rates = ", ".join(rate_text(rate, multiplier) for rate in data["learning_rates"])
    about = "about " if data["is_rate_by_rule"] else ""
    probes = f"probes included: {plan['probes']} of {plan['probe_size']} examples" if plan["probes"] else "no probes"
    among = f"searched inside the budget among {about}" if len(data["learning_rates"]) > 1 else about
    console.print(
        f"full fine-tuning: {plan['full_flops']:.4g} FLOPs, {data['steps_in_full']:,} steps\n"
        f"this run: at most {plan['flops']:.4g} FLOPs ({data['budget']:.1%}), {probes}; "
        f"cache: {plan['cache']}{skipping}\n"
        f"learning rate: {among}{rates}\n"
        f"first plan, before anything is scored: cut at depth {data['first_plan']['cut']}, "
        f"{len(active)} of {model['components']} components on ({data['first_plan']['reason']})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def memory_text(plan: Mapping[str, Any]) -> str:
    """What a memory budget made of a run."""
    choices = plan["choices"] or ["everything as it is"]
    return (
        f"memory: at most {size_text(plan['needed'])} of {size_text(plan['limit'])} for a step on the largest batch, "
        f"{plan['rows']} × {plan['tokens']}\n" + "\n".join(f"  {choice}" for choice in choices)
    )
