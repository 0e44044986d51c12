"""Energy of a run, in joules: measured by the hardware's own counters where there are any, else seconds × watts.

An estimate is called one wherever it is shown. Counters count a whole processor or accelerator, and so what else runs
on it, too. They are read once a step, never more often, and without waiting for the device: what a device still has to
do is found in the next reading.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

log = logging.getLogger("rgft")

Source = Literal["measured", "estimated"]

#: Watts of a device where nothing is measured and none are given: typical of a desktop's or a server's processor under
#: load, of an accelerator in a server, of a laptop's. Replace them by `energy.watts`.
DEFAULT_WATTS: Mapping[str, float] = {"cpu": 85.0, "cuda": 300.0, "xpu": 300.0, "mps": 30.0}
OTHER_WATTS = 85.0

#: Grams of CO2 equivalent per kWh: the world's electricity in 2024 (Ember, Global Electricity Review 2025).
WORLD_CARBON_INTENSITY = 473.0

JOULES_PER_KWH = 3.6e6


class EnergyCounter(Protocol):
    """What counts energy.

    Attributes:
        name: what it is, in words.
    """

    name: str

    def joules(self) -> float:
        """Energy since it was made, never falling.

        Raises:
            OSError: it cannot be read (any more).
        """
        ...


class RaplCounter:
    """Running average power limit: processor packages and their memory, as Linux shows them.

    Each domain has its own counter in microjoules, which begins anew at its `max_energy_range_uj`; of memory it is
    inside a package's folder and beside its energy.

    Args:
        root: folder of the power caps.

    Raises:
        OSError: there are none, or they may not be read (often only root may).
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        # A package is `intel-rapl:0` (of AMD's, too), its domains `intel-rapl:0:1`.
        packages = [d for d in sorted(root.glob("intel-rapl:*")) if d.name.count(":") == 1 and _named(d, "package")]
        memories = [d for d in sorted(root.glob("intel-rapl:*:*")) if _named(d, "dram")]
        if not packages:
            raise FileNotFoundError(f"no processor package under {root}")
        self._ranges = {d: _integer(d / "max_energy_range_uj") for d in (*packages, *memories)}
        self._seen = {d: _integer(d / "energy_uj") for d in self._ranges}
        self._microjoules = 0
        self.name = f"RAPL, {len(packages)} processor package{'s' if len(packages) > 1 else ''}" + (
            " and memory" if memories else ""
        )

    def joules(self) -> float:
        now = {domain: _integer(domain / "energy_uj") for domain in self._ranges}  # all of them, or none is counted
        for domain, value in now.items():
            passed = value - self._seen[domain]
            # From its highest value a counter goes on at zero.
            self._microjoules += passed if passed >= 0 else passed + self._ranges[domain] + 1
        self._seen = now
        return self._microjoules / 1e6


def _named(domain: Path, name: str) -> bool:
    return (domain / "name").read_text().startswith(name)


def _integer(file: Path) -> int:
    text = file.read_text().strip()
    try:
        return int(text)
    except ValueError as error:
        raise OSError(f"{file}: expected a number of microjoules, found {text!r}") from error


class NvmlCounter:
    """The total energy counter of NVIDIA GPUs (Volta and later).

    Args:
        device: "cuda" or "cuda:1"; without a number all GPUs that the process sees.

    Raises:
        OSError: the package nvidia-ml-py, the driver or the counter is missing.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            pynvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError("nvidia-ml-py is not installed (rgft[energy])") from error
        self._nvml = pynvml
        numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
        try:
            pynvml.nvmlInit()
            # By identity: NVML's own numbers know nothing of CUDA_VISIBLE_DEVICES.
            self._handles = [
                pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in numbers
            ]
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error
        self._first = self._millijoules()
        self.name = f"NVML, {len(self._handles)} GPU{'s' if len(self._handles) > 1 else ''}"

    def _millijoules(self) -> int:
        try:
            return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def joules(self) -> float:
        return (self._millijoules() - self._first) / 1e3


def counter_of(device: torch.device) -> EnergyCounter:
    """What counts the energy of a device.

    Raises:
        OSError: nothing does.
    """
    if device.type == "cuda":
        return NvmlCounter(device)
    if device.type == "cpu":
        return RaplCounter()
    raise OSError(f"no counter is known of {device.type}")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Energy of a stretch of time.

    Attributes:
        joules: by part.
        source: how it was found.
        note: how, in words.
    """

    joules: dict[str, float]
    source: Source
    note: str


class EnergyMeter:
    """Says what energy went into the parts of a run, from the seconds that they took.

    What a counter counted is divided among the parts by their seconds, and among these and the time that is no part of
    the run (a loop's own work between steps). When it can be read no longer, the rest is estimated, at the power that
    was measured before.

    Args:
        counter: None estimates from the start.
        watts: of an estimate.
        note: what these watts are, in words.
        clock: seconds.
    """

    def __init__(
        self, counter: EnergyCounter | None, *, watts: float, note: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._counter, self.watts, self._note, self._clock = counter, watts, note, clock
        self._counted, self._time = 0.0, clock()
        self._measured = (0.0, 0.0)  # joules and seconds so far
        self._seen: dict[str, float] = {}

    @classmethod
    def of(cls, device: torch.device, *, watts: float | None, measures: bool = True) -> EnergyMeter:
        """The best there is for a device.

        Args:
            device: that the run trains on.
            watts: of the device, where nothing counts them; None: `DEFAULT_WATTS`.
            measures: whether to look for a counter.
        """
        known = DEFAULT_WATTS.get(device.type, OTHER_WATTS)
        power = f"{known if watts is None else watts:g} W{f', assumed of {device.type}' if watts is None else ''}"
        counter, reason = None, ""
        if measures:
            try:
                counter = counter_of(device)
                counter.joules()
                if watts is not None:
                    log.warning(
                        "energy.watts: %g has no effect, as %s measures; energy.counter 'none' estimates", watts,
                        counter.name,
                    )  # fmt: skip
            except OSError as error:
                counter, reason = None, f"; {_short(error)}"
        return cls(counter, watts=known if watts is None else watts, note=f"{power} × seconds{reason}")

    @property
    def is_measuring(self) -> bool:
        return self._counter is not None

    def begin(self, seconds: Mapping[Any, float]) -> None:
        """Goes on from here: what the parts have taken so far is paid for."""
        self._seen, self._time = dict(seconds), self._clock()
        if self._counter is not None:
            with suppress(OSError):  # which the next reading finds, too
                self._counted = self._counter.joules()

    def spent(self, seconds: Mapping[Any, float]) -> Spent:
        """Energy since the last call, or `begin`.

        Args:
            seconds: that the parts have taken so far.
        """
        taken = {part: total - self._seen.get(part, 0.0) for part, total in seconds.items()}
        self._seen, now = dict(seconds), self._clock()
        passed, self._time = max(now - self._time, sum(taken.values())), now
        watts = self._read(passed) if self._counter is not None else None
        source: Source = "estimated" if watts is None else "measured"
        note = self._note if watts is None or self._counter is None else self._counter.name
        watts = self.watts if watts is None else watts
        return Spent(joules={part: watts * s for part, s in taken.items()}, source=source, note=note)

    def _read(self, passed: float) -> float | None:
        """Mean power since the last reading, which was so many seconds ago."""
        assert self._counter is not None
        try:
            counted = self._counter.joules()
        except OSError as error:
            joules, seconds = self._measured
            self.watts = joules / seconds if joules > 0.0 and seconds > 0.0 else self.watts
            self._note = f"{self.watts:.3g} W as measured before × seconds; {_short(error)}"
            log.warning(
                "energy: %s can be read no longer (%s); from here on it is estimated", self._counter.name, error
            )
            self._counter = None
            return None
        joules, self._counted = counted - self._counted, counted
        self._measured = (self._measured[0] + joules, self._measured[1] + passed)
        return joules / passed if passed > 0.0 else 0.0


def _short(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.filename or 'the counter'} may not be read"
    return str(error)


def co2_grams(joules: float, intensity: float) -> float:
    """Grams of CO2 equivalent.

    Args:
        joules: of electricity.
        intensity: grams per kWh.
    """
    return joules / JOULES_PER_KWH * intensity


def energy_text(joules: float) -> str:
    """Energy as it is read best: joules, Wh or kWh."""
    if joules < 3600.0:
        return f"{joules:.3g} J"
    kwh = joules / JOULES_PER_KWH
    return f"{kwh:.3g} kWh" if kwh >= 1.0 else f"{1e3 * kwh:.3g} Wh"
