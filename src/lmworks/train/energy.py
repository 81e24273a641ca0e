"""Energy of the processor packages, from the counters that Linux shows (RAPL). A GPU's energy is not in them."""

from __future__ import annotations

from pathlib import Path

import torch

COUNTERS = Path("/sys/class/powercap")


class Meter:
    """Joules that the packages took between two readings; all processes of the machine together."""

    def __init__(self, device: torch.device, folder: Path = COUNTERS) -> None:
        packages = sorted(folder.glob("*-rapl:[0-9]*")) if device.type == "cpu" else []
        self._zones = [
            zone for zone in packages if zone.name.count(":") == 1
        ]  # not their cores, which are part of them
        self._last = self._read()
        counted = self._zones if self._last is not None else []
        self._wholes = [int((zone / "max_energy_range_uj").read_text()) + 1 for zone in counted]

    def joules(self) -> float | None:
        """Since the last reading; None when there is no counter, or none that this user may read."""
        now = self._read()
        if now is None or self._last is None:
            return None
        spent = 0
        for whole, before, after in zip(self._wholes, self._last, now, strict=True):
            spent += (after - before) % whole  # the counter starts again at 0
        self._last = now
        return spent / 1e6

    def _read(self) -> list[int] | None:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self._zones] or None
        except OSError:
            return None
