"""Fine-tunes a packaged sentence encoder on packaged movie reviews within 30 % of full fine-tuning's FLOPs.

    python examples/demo.py            # about two minutes of training on two cores
    python examples/demo.py --short    # a few seconds, for a look at the machinery

Prints what RGFT reached and what it cost, beside full fine-tuning timed in the same process and the committed results
of the bench, and draws where the model erred over time.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from rgft import Config
from rgft.cli.picture import draw_error_map
from rgft.run import Run, Settings, StepReport
from rgft.tasks.demo import demo_task

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BUDGET = 0.30
TIMED_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="320 sentences, and more probes than their share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="learning rate  [default: by rule]")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()

    task = demo_task(train_size=320 if arguments.short else 2000, seed=arguments.seed)
    settings = Settings(lr=arguments.lr or "auto", epochs=3)
    # A look more than by default, for the picture; 1.5 % of a short run would not pay for one.
    probe = {"max_fraction": 0.15 if arguments.short else 0.015}
    config = Config(budget=BUDGET, classifier_lr_multiplier=10.0, seed=arguments.seed, probe=probe)
    print(
        f"{len(task.train):,} training and {len(task.test or ()):,} test sentences; budget {BUDGET:.0%} of full FLOPs"
    )

    full_step = time_full_steps(task, settings, steps=3 if arguments.short else TIMED_STEPS)
    run = Run(task, config, settings, observers=[show_progress])
    started = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - started
    scores = run.evaluate(task.test or [])
    summary = run.guide.summary()
    plan, history = run.guide.plan, run.guide.map_history
    steady = median(run.result({}).step_seconds[-TIMED_STEPS:])
    run.close()

    flops = summary["flops"]
    show_table(scores, flops["fraction_of_full"], arguments.short)
    print(
        f"\nRGFT: {summary['steps']} steps in {seconds:.0f} s, cut at depth {plan.cut} ({plan.reason}); "
        f"scoring {flops['scoring_fraction']:.2%} of what was spent\n"
        f"a step in the last third took {steady:.2f} s, a full fine-tuning step of the same process {full_step:.2f} s: "
        f"{steady / full_step:.2f} of it; the ledger says {flops['fraction_of_same_batches']:.2f} on average over all "
        "steps. What the clock has and FLOPs have not: the optimizer's pass over the weights, padding, Python"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "ledger.json").write_text(json.dumps(summary, indent=1))
    picture = draw_error_map(history, arguments.output / "error_map.png")
    print(f"error map over {len(history)} probes: {picture}; ledger: {arguments.output / 'ledger.json'}")


def time_full_steps(task: Any, settings: Settings, *, steps: int) -> float:
    """Median seconds of full fine-tuning steps, on a copy of the model that is thrown away."""
    twin = copy.copy(task)
    twin.model = copy.deepcopy(task.model)
    times: list[float] = []

    class Enough(Exception):
        pass

    def stop(report: StepReport) -> None:
        times.append(report.step_seconds)
        if len(times) == steps + 2:  # two to warm up
            raise Enough

    run = Run(twin, Config(preset="full"), settings, observers=[stop])
    try:
        run.train()
    except Enough:
        pass
    finally:
        run.close()
    return median(times[2:])


def show_progress(report: StepReport) -> None:
    if report.step % 10 == 0:
        left = report.seconds / report.progress - report.seconds
        top = ", ".join(name.rpartition(".")[2] for name, _ in report.top)
        captured = "" if report.captured is None else f", captured {report.captured:.0%}"
        print(
            f"step {report.step:4d}  loss {report.loss:.3f}  spent {report.progress:4.0%} of the budget, {left:3.0f} s "
            f"left  {report.active} of {report.components} components on{captured}  errs most: {top}",
            flush=True,
        )


def show_table(scores: dict[str, float], fraction: float, is_short: bool) -> None:
    rows = [("RGFT, this run" + (" (short)" if is_short else ""), fraction, [scores["accuracy"]], [scores["loss"]])]
    for label, title in (("rgft", "RGFT"), ("lora", "LoRA r 8"), ("full-stopped", "full, stopped"), ("full", "full")):
        results = [
            json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"rotten_tomatoes*/{label}--final--*.json"))
        ]
        if results:
            rows.append(
                (
                    f"{title}, committed result, {len(results)} seeds",
                    mean(r["ledger"]["flops"]["fraction_of_full"] for r in results),
                    [r["metrics"]["test"]["accuracy"] for r in results],
                    [r["metrics"]["test"]["loss"] for r in results],
                )
            )
    print(f"\n{'':44}{'FLOPs':>8}{'accuracy':>16}{'held-out loss':>18}")
    for title, share, accuracies, losses in rows:
        print(f"{title:44}{share:8.2f}{spread(accuracies):>16}{spread(losses):>18}")


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    main()
