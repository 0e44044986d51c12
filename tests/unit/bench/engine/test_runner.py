import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from rgft.bench.engine import runner, tables
from rgft.bench.engine.cells import EngineCell, few_cells
from rgft.bench.engine.stepping import stepper
from rgft.bench.engine.workloads import WORKLOADS, workload
from rgft.cost.elements import Elements
from rgft.cost.rates import SHAPES, Rates, measure_products, measure_rates, product_shapes
from rgft.errors import ConfigError, DataError
from tests.unit.bench.engine.tiny import TINY

CPU = torch.device("cpu")


def test_every_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STEPS", 2)
    monkeypatch.setattr(
        runner,
        "measure_rates",
        lambda *a: Rates(**{field.name: 1e9 for field in fields(Rates)}),
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
        parts += [result["drawn_elements"], result["fresh_elements"]]
        assert result["predicted_seconds"] == pytest.approx(sum(parts) / 1e9)
    table = tables.steps(tmp_path)
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
    rates = measure_rates(CPU, torch.float32, {(64, 32, 32): 1.0, (64, 32, 64): 3.0})
    assert rates.product_flops > 1e7
    elements = Elements(written=rates.written_elements, drawn=rates.drawn_elements, fresh=rates.fresh_elements)
    seconds = rates.seconds(rates.product_flops, updated=rates.optimizer_elements, elements=elements)
    assert seconds == pytest.approx(5.0)


def test_products_are_those_that_the_model_makes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.convolution = nn.Embedding(50, 8), nn.Conv2d(3, 4, 3, padding=1)
            self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 20_000)

        def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            self.convolution(image)
            return self.outer(self.inner(self.inner(self.table(ids)).view(-1, 8)))

    with torch.device("meta"):
        model, ids, image = Model(), torch.zeros(2, 5, dtype=torch.long), torch.zeros(6, 3, 7, 7)
    assert product_shapes(model, lambda: model(ids, image)) == {
        (20, 16, 16384): 2.0 * 20 * 16 * 20_000,
        (294, 27, 4): 2.0 * 294 * 27 * 4,
        (20, 8, 16): 2.0 * 20 * 8 * 16,
        (10, 8, 16): 2.0 * 10 * 8 * 16,
    }
    assert product_shapes(nn.ReLU(), lambda: None) == SHAPES


def test_the_rate_of_products_weighs_shapes_by_their_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each product takes a second, whatever its shape.
    monkeypatch.setattr("rgft.cost.rates.timed", lambda work, device: 1.0)
    small, large = (8, 8, 8), (16, 16, 16)
    rate = measure_products(CPU, torch.float32, {small: 3.0, large: 1.0})
    assert rate == pytest.approx(4.0 / (3.0 / (2 * 8**3) + 1.0 / (2 * 16**3)))


def test_unknown_workloads_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of minilm, smollm2"):
        workload("bert")
    with pytest.raises(DataError, match="expected results of the engine bench"):
        tables.steps(tmp_path)
    for text in ("{}", "[]", '{"schema": "rg'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=r"a.json: .* found a damaged file"):
            tables.steps(tmp_path)


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
