"""Counters that wrap, go missing and are several; what is measured, what is estimated, and that it is said."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rgft.telemetry import energy
from rgft.telemetry.energy import EnergyMeter, NvmlCounter, RaplCounter, co2_grams, energy_text
from rgft.telemetry.ledger import Ledger

RANGE = 10_000_000  # microjoules


class Caps:
    """A folder of power caps: two packages, one of which knows its memory, and a core domain that is part of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, of in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
                         ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):  # fmt: skip
            (root / name).mkdir()
            (root / name / "name").write_text(f"{of}\n")
            (root / name / "max_energy_range_uj").write_text(f"{RANGE}\n")
            self.set(name, 0)

    def set(self, name: str, microjoules: int) -> None:
        (self.root / name / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_memory_are_added_and_wrap_each_on_its_own(tmp_path: Path) -> None:
    caps = Caps(tmp_path)
    caps.set("intel-rapl:0", 9_000_000)
    counter = RaplCounter(tmp_path)
    assert counter.name == "RAPL, 2 processor packages and memory"
    assert counter.joules() == 0.0
    caps.set("intel-rapl:0", 500_000)  # wrapped: 1,000,001 to the end, 500,000 since
    caps.set("intel-rapl:1", 2_000_000)
    caps.set("intel-rapl:0:1", 250_000)
    caps.set("intel-rapl:0:0", 700_000)  # in its package's already
    caps.set("intel-rapl:2", 9_000_000)  # the whole machine, these included
    assert counter.joules() == pytest.approx(1.500001 + 2.0 + 0.25)
    caps.set("intel-rapl:1", 1_999_999)  # nearly once around
    assert counter.joules() == pytest.approx(1.500001 + 2.0 + 0.25 + 10.0)


def test_what_cannot_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no processor package"):
        RaplCounter(tmp_path)
    Caps(tmp_path)
    counter = RaplCounter(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")
    with pytest.raises(OSError, match="expected a number of microjoules"):
        counter.joules()
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(OSError, match="energy_uj"):
        counter.joules()


class Counter:
    """Energy by hand; None cannot be read."""

    name = "a counter"

    def __init__(self) -> None:
        self.value: float | None = 0.0
        self.readings = 0

    def joules(self) -> float:
        self.readings += 1
        if self.value is None:
            raise PermissionError(13, "Permission denied", "/somewhere/energy_uj")
        return self.value


def test_measured_energy_is_divided_by_seconds() -> None:
    counter, now = Counter(), [0.0]
    meter = EnergyMeter(counter, watts=7.0, note="7 W", clock=lambda: now[0])
    meter.begin({"step": 0.0, "probe": 0.0})
    counter.value, now[0] = 100.0, 10.0  # of ten seconds, five and three are the run's
    spent = meter.spent({"step": 5.0, "probe": 3.0})
    assert spent.source == "measured"
    assert spent.joules == pytest.approx({"step": 50.0, "probe": 30.0})
    counter.value, now[0] = 160.0, 12.0
    assert meter.spent({"step": 7.0, "probe": 3.0}).joules == pytest.approx({"step": 60.0, "probe": 0.0})
    now[0] = 13.0  # the counter has not moved yet
    assert meter.spent({"step": 8.0, "probe": 3.0}).joules == {"step": 0.0, "probe": 0.0}


def test_a_counter_that_goes_missing_is_replaced_by_the_power_it_measured(caplog: pytest.LogCaptureFixture) -> None:
    counter, now, ledger = Counter(), [0.0], Ledger()
    meter = EnergyMeter(counter, watts=7.0, note="7 W", clock=lambda: now[0])
    meter.begin(ledger.seconds)
    counter.value, now[0] = 40.0, 2.0
    ledger.seconds["step"] = 2.0
    ledger.add_energy(meter.spent(ledger.seconds))
    assert ledger.summary()["energy"]["source"] == "measured"
    counter.value, now[0] = None, 5.0
    ledger.seconds["step"], ledger.seconds["evaluation"] = 4.0, 1.0
    ledger.add_energy(meter.spent(ledger.seconds))
    assert not meter.is_measuring
    assert "can be read no longer" in caplog.text
    ledger.seconds["step"] = 5.0
    ledger.add_energy(meter.spent(ledger.seconds))
    found = ledger.summary()["energy"]
    assert found["source"] == "measured in part"
    assert found["joules"] == pytest.approx({"step": 100.0, "evaluation": 20.0, "total": 100.0})
    assert ledger.spent_joules == pytest.approx(100.0)  # evaluation is no part of it
    assert found["kwh"] == pytest.approx(100.0 / 3.6e6)
    assert found["co2_grams"] == pytest.approx(100.0 / 3.6e6 * 473.0) == pytest.approx(co2_grams(100.0, 473.0))
    assert len(found["notes"]) == 2
    assert "20 W as measured before" in found["notes"][1]
    assert "may not be read" in found["notes"][1]
    assert Ledger.from_dict(ledger.to_dict()) == ledger


def test_estimates_say_what_they_assume(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(device: torch.device) -> Any:
        raise FileNotFoundError("no processor package under /sys")

    monkeypatch.setattr(energy, "counter_of", nothing)
    for watts, expected in ((None, "85 W, assumed of cpu × seconds"), (20.0, "20 W × seconds")):
        meter = EnergyMeter.of(torch.device("cpu"), watts=watts)
        meter.begin({})
        spent = meter.spent({"step": 2.0})
        assert (spent.source, spent.joules) == ("estimated", {"step": 2.0 * (watts or 85.0)})
        assert spent.note.startswith(expected)
        assert spent.note.endswith("no processor package under /sys")


def test_gpus_are_found_by_identity_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    energies = {"GPU-a": 5_000, "GPU-b": 70_000, "GPU-c": 1}

    def read(handle: str) -> int:
        if energies[handle] < 0:
            raise Error("Not Supported")
        return energies[handle]

    fake = SimpleNamespace(
        NVMLError=Error, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # the process does not see the third
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="ab"[i]))
    counter, second = NvmlCounter(torch.device("cuda")), NvmlCounter(torch.device("cuda:1"))
    energies.update({"GPU-a": 6_000, "GPU-b": 72_000, "GPU-c": 10**9})
    assert (counter.joules(), second.joules()) == (3.0, 2.0)
    assert counter.name == "NVML, 2 GPUs"
    energies["GPU-b"] = -1
    with pytest.raises(OSError, match="NVML: Not Supported"):
        counter.joules()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match=r"rgft\[energy\]"):
        NvmlCounter(torch.device("cuda"))


def test_energy_is_written_as_it_is_read_best() -> None:
    assert [energy_text(joules) for joules in (12.3, 7200.0, 7.2e6)] == ["12.3 J", "2 Wh", "2 kWh"]
