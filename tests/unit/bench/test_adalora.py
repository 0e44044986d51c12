"""AdaLoRA's allocator is really called, with gradients, and takes ranks away until its target is left."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.methods import method
from rgft.cli.preparing import prepare_task
from rgft.cli.request import read_request
from rgft.run import Run, Settings
from tests.integration.cli_inputs import save_inputs


def test_ranks_move_to_where_they_matter(tmp_path: Path) -> None:
    save_inputs(tmp_path, rows=120)
    task = prepare_task(
        read_request(flags={"model": str(tmp_path / "model"), "data": str(tmp_path / "data.csv")}).settings
    )
    adalora = method("adalora")
    plain = task.loss
    model: Any = adalora.prepare(task.model, {"rank": 2})
    task.model, task.loss = model, adalora.loss_of(plain, {"rank": 2})
    config = adalora.configuration(budget=0.6, seed=0, settings={})
    run = Run(task, config, Settings(lr=1e-2, epochs=4, batch_size=8), full_flops=1e13)
    run.prepare()
    adalora.begin(run)
    steps = model.peft_config["default"].total_step
    assert steps == run.batches_in_full  # so small a model never spends such a budget
    run.train()
    assert run.guide.step_count == steps
    ranks = {name: int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name}
    assert sum(ranks.values()) == 2 * len(ranks)  # of 3 each in the beginning
    assert len(set(ranks.values())) > 1
    batch = task.collate([task.train[0], task.train[1]])
    with torch.no_grad():
        model.train()
        both = []
        for loss in (task.loss, plain):
            torch.manual_seed(0)  # of dropout
            both.append(loss(model, batch))
        with_term = (both[0] - both[1]).tolist()
        model.eval()
        assert torch.equal(task.loss(model, batch), plain(model, batch))
    assert with_term == pytest.approx([with_term[0]] * 2)
    assert with_term[0] > 0.0
    run.close()
