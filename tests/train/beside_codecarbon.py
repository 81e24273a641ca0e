"""Our meter and codecarbon's tracker side by side in one process, at the same load, design power and intensity.

python beside_codecarbon.py SECONDS FOLDER: prints {"ours": {kwh, kg, watts}, "theirs": ...} as JSON, PUE in all.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from codecarbon import OfflineEmissionsTracker
from codecarbon.external import hardware

from lmworks.train import sensors
from lmworks.train.energy import Meter
from lmworks.train.metering import Metering
from lmworks.train.spent import told

LOAD = 0.6
TDP = 200.0


def main(seconds: float, folder: str) -> None:
    # what both ask of the machine, held still: other work on it must not be in the comparison
    hardware.SystemCPULoadMeter.percent = lambda meter: 100 * LOAD
    sensors.machine_busy = lambda: (LOAD * time.monotonic(), time.monotonic())
    settings = Metering(intensity="300 g/kWh", pue=1.3, processor_watts=TDP)
    theirs = OfflineEmissionsTracker(
        country_iso_code="FRA", measure_power_secs=1, output_dir=folder, save_to_file=False, log_level="error",
        force_cpu_power=TDP, force_mode_cpu_load=True, force_carbon_intensity_g_co2e_kwh=300.0, pue=1.3,
    )  # fmt: skip
    found, _ = sensors.sensors(torch.device("cpu"), counts="machine", period=1.0, tdp=TDP, zones=sensors.ZONES / "none")
    theirs.start()
    meter = Meter(found)
    with meter.running(), meter.phase("train"):
        time.sleep(seconds)
    meter.read(soon=True)
    kg = theirs.stop()
    facts: dict[str, Any] = told(meter.account(), settings, meter, tokens=1, flops=1.0) or {}
    data = theirs.final_emissions_data
    answer = {
        "ours": {
            "kwh": facts["kwh"]["central"] * facts["pue"]["central"],
            "kg": facts["kg_co2e"]["central"],
            "watts": facts["mean_watts"] * facts["pue"]["central"],
        },
        # theirs are means over its samples
        "theirs": {"kwh": data.energy_consumed, "kg": kg, "watts": data.cpu_power + data.ram_power},
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
