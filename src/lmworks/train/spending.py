"""A run's energy as its loop sees it: the same on all ranks, in rows, events, checkpoints, summary and record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from lmworks.core.events import Events
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.parallel.wire import Wire
from lmworks.train.energy import Account, Meter
from lmworks.train.metering import Metering
from lmworks.train.spent import Bill, bill_of, told

EVERY = 10.0
"""Seconds between two energy events: what a kill can hide from the attempt that follows."""


class Spending:
    """The meters of all machines, summed where all ranks meet anyway."""

    def __init__(self, meter: Meter, settings: Metering, wire: Wire, events: Events, device: torch.device) -> None:
        self._meter, self._settings, self._wire, self._events = meter, settings, wire, events
        self._device = device
        self.account: Account = meter.account()
        """As of the last row, of all machines."""
        self._in_rows: Bill | None = None
        self._told = time.monotonic()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Book what is spent in the block under a phase."""
        return self._meter.phase(name)

    def enter(self, name: str) -> None:
        """Book what is spent from now on under a phase."""
        self._meter.enter(name)

    def bill(self) -> Bill | None:
        """What all machines have spent so far; None where nothing is counted. All ranks ask together."""
        if not self._settings.on:
            return None
        self.account = self._meter.account(self._wire if self._wire.layout.ranks > 1 else None, self._device)
        bill = bill_of(self.account, self._settings)
        if self._wire.rank == 0 and time.monotonic() - self._told >= EVERY:
            self.tell()
        return bill if bill.joules > 0 else None

    def row(self, bill: Bill | None) -> dict[str, float]:
        """Columns for metrics.jsonl: joules since the row before, by how they are known; kWh and CO2e of the run."""
        if bill is None:
            return {}
        before = self._in_rows or Bill(joules=0.0, measured=0.0, kwh=0.0, kg_co2e=0.0, money=None)
        self._in_rows = bill
        measured = bill.measured - before.measured
        modelled = bill.joules - before.joules - measured
        return {
            **({"joules": measured} if bill.measured > 0 else {}),
            **({"joules_modelled": modelled} if bill.joules > bill.measured else {}),
            "kwh": bill.kwh,
            "kg_co2e": bill.kg_co2e,
            **({"money": bill.money} if bill.money is not None else {}),
        }

    def begin(self) -> None:
        """The first step is about to run: what was spent before belongs to no row."""
        self._in_rows = self.bill()
        self.enter("idle")

    def tell(self) -> None:
        """An event with all that is known: an attempt after a kill finds there what was thrown away."""
        self._told = time.monotonic()
        self._events.write("energy", account=self.account)

    def end(self, *, together: bool) -> None:
        """The last reading. `together`: all ranks are here; otherwise each one knows what it knew."""
        if not self._settings.on:
            return
        self._meter.read(soon=True)
        if together or self._wire.layout.ranks == 1:
            self.bill()
        if self._wire.rank == 0:
            self.tell()

    def go_on(self, saved: Mapping[str, Any], folder: RunFolder, step: int) -> str | None:
        """Take up what earlier attempts spent; a sentence about what was lost since the checkpoint of `step`.

        On the first rank only: the sum over ranks then has it once.
        """
        if self._wire.rank != 0 or not self._settings.on:
            return None
        last = None
        for event in rows(folder.events):
            if event["name"] == "energy":
                last = event
        known = last["attrs"]["account"] if last is not None else None
        before = float(saved["lost"][1]) if "lost" in saved else 0.0
        thrown = last is not None and last["step"] > step
        lost = self._meter.go_on(saved, known, thrown=thrown) - before
        return f"{lost / 3.6e6:.3g} kWh went into steps that are made again" if lost > 0 else None

    def facts(self, *, tokens: int, flops: float) -> dict[str, Any] | None:
        """For summary and record; None where nothing is counted."""
        return told(self.account, self._settings, self._meter, tokens=tokens, flops=flops)
