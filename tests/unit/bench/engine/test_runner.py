import json
from pathlib import Path

import pytest
import torch

from rgft.bench.engine import runner
from rgft.bench.engine.cells import EngineCell, few_cells
from rgft.bench.engine.stepping import stepper
from rgft.bench.engine.workloads import WORKLOADS, workload
from rgft.cost.elements import Elements
from rgft.cost.rates import Rates, measure_rates
from rgft.errors import ConfigError, DataError
from tests.unit.bench.engine.tiny import TINY

CPU = torch.device("cpu")


def test_every_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STEPS", 2)
    monkeypatch.setattr(
        runner,
        "measure_rates",
        lambda *a: Rates(product_flops=1e9, optimizer_elements=1e9, written_elements=1e9, drawn_elements=1e9),
    )
    assert list(runner.run_engine(TINY, tmp_path, device=CPU, stop_after_seconds=0.0)) == []
    paths = list(runner.run_engine(TINY, tmp_path, device=CPU))
    assert [path.stem for path in paths] == [cell.name for cell in few_cells()]
    assert list(runner.run_engine(TINY, tmp_path, device=CPU)) == []
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    full = results["full"]
    assert full["flops_of_full"] == pytest.approx(1.0, rel=1e-6)
    frozen, cached = results["rgft-frozen50-dw100-layer-nocache"], results["rgft-frozen50-dw100-layer-cache"]
    # By hand: half the layers without dX and dW. The plain loop, which freezes the same, does the same products.
    assert frozen["flops"] == pytest.approx(results["frozen-frozen50"]["flops"], rel=1e-6)
    assert cached["flops"] < frozen["flops"] < full["flops"]
    assert results["lora"]["updated_parameters"] < frozen["updated_parameters"] < full["updated_parameters"]
    assert frozen["memory"]["gradients"] == 4 * frozen["updated_parameters"]
    assert frozen["memory"]["activations"] < full["memory"]["activations"]
    for result in results.values():
        assert len(result["step_seconds"]) == len(result["full_step_seconds"]) == 2
        parts = [result[name] for name in ("flops", "updated_parameters", "written_elements")]
        assert all(part > 0 for part in parts)
        parts.append(result["drawn_elements"])
        assert result["predicted_seconds"] == pytest.approx(sum(parts) / 1e9)
    table = runner.table(tmp_path)
    assert table.count("| tiny |") == len(results)


@pytest.mark.parametrize("cell", list(few_cells()), ids=lambda cell: cell.name)
def test_steps_train_what_the_cell_says(cell: EngineCell) -> None:
    made = stepper(cell, TINY, CPU)
    for _ in range(made.warm_up):
        made.step()
    before = [p.detach().clone() for group in made.optimizer.param_groups for p in group["params"]]
    made.step()
    after = [p for group in made.optimizer.param_groups for p in group["params"]]
    moved = sum(p.numel() for old, p in zip(before, after, strict=True) if not torch.equal(old, p))
    updated = sum(p.numel() for p in after if p in made.optimizer.state)
    assert 0 < moved <= updated
    made.close()
    assert not hasattr(made.model, "_rgft_guide")


def test_rates_are_of_this_machine() -> None:
    rates = measure_rates(CPU, torch.float32, ((64, 32, 32),))
    assert rates.product_flops > 1e7
    elements = Elements(written=rates.written_elements, drawn=rates.drawn_elements)
    seconds = rates.seconds(rates.product_flops, updated=rates.optimizer_elements, elements=elements)
    assert seconds == pytest.approx(4.0)


def test_unknown_workloads_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of minilm, smollm2"):
        workload("bert")
    with pytest.raises(DataError, match="expected results of the engine bench"):
        runner.table(tmp_path)


@pytest.mark.parametrize("name", ["smollm2", "llama_1b", "vit_b", "resnet_50"])
def test_examples_fit_their_models(name: str) -> None:
    with torch.device("meta"):
        model = WORKLOADS[name].build()
    example = WORKLOADS[name].example(0, model)
    # Transformers looks into a mask, which has no values here.
    batch = {key: value[None].to("meta") for key, value in example.items() if key != "attention_mask"}
    assert model(**batch).loss.shape == ()
    names = {part for module, _ in model.named_modules() for part in module.split(".")[-1:]}
    assert set(WORKLOADS[name].lora_targets) <= names
    assert set(WORKLOADS[name].head) <= names
