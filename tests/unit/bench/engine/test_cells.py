import pytest

from rgft.bench.engine.cells import EngineCell, all_cells, cut_at, few_cells, plan_of
from rgft.partition import partition
from tests.families import FAMILIES
from tests.unit.bench.engine.tiny import tiny_llama


def test_names_tell_all_cells_apart() -> None:
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names) == 43
    assert {cell.name for cell in few_cells()} <= set(names)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("frozen", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("dw", [1.0, 0.5, 0.25])
def test_plans_freeze_and_scatter_what_the_cell_says(granularity: str, frozen: float, dw: float) -> None:
    cell = EngineCell(kind="rgft", frozen_fraction=frozen, dw=dw, granularity=granularity)  # type: ignore[arg-type]
    parts = partition(tiny_llama(8), cell.granularity, ffn_blocks=4)
    plan = plan_of(cell, parts)
    assert plan.cut == cut_at(parts.components, frozen) == round(frozen * 8) + 1
    on = set(plan.active())
    above = [c for c in parts if c.layer is not None and c.depth >= plan.cut]
    assert all(c.name not in on for c in parts if c.depth < plan.cut)
    assert all(c.name in on for c in parts if c.layer is None and c.depth >= plan.cut)
    units = len(above) if granularity == "layer" else len(above) // (8 - round(frozen * 8))
    expected = max(1, round(dw * units)) / units
    assert sum(c.name in on for c in above) / len(above) == pytest.approx(expected)
    assert any(c.name in on for c in above if c.depth == plan.cut)  # backward runs as deep with any dw


def test_a_cut_below_everything_is_none() -> None:
    components = partition(FAMILIES["bert"].build()).components
    assert cut_at(components, 0.0) == 0
    assert plan_of(EngineCell(kind="rgft"), partition(FAMILIES["bert"].build())).cut == 0
