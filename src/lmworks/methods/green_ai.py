"""Energy, CO2 and money of a run: before it, while it goes, and after, beside what it reached.

Liu, Yin, "Green AI: Exploring Carbon Footprints, Mitigation Strategies, and Trade Offs in Large Language Model
Training", Discover Artificial Intelligence 4, 2024, arXiv 2404.01157. Formulas before the run: Faiz, Kaneda, Wang, Osi,
Sharma, Chen, Jiang, "LLMCarbon: Modeling the End-to-End Carbon Footprint of Large Language Models", ICLR 2024, arXiv
2309.14393. Load and memory models: codecarbon 3.3.

## What it does

The paper measures energy, CO2 and money of fine-tuning several models on two GPUs, and says which choices save most at
no loss. What is built is its instrument and its comparison:

| when | what | where |
| --- | --- | --- |
| before | energy, CO2, money of devices, hours and watts, as ranges | `core/energy/footprint.py` |
| before | CO2 of making the machines; the hour to start at, on a grid by the hour | `lmworks plan` |
| during | a meter on each machine, by phase and hour, lost work included; on by default | table `energy` of a recipe |
| during | a budget, and an end when more energy buys too little | watcher `green-ai` |
| after | kWh and kg CO2e with place, year, PUE, method and range | `summary.json`, `record.json`, model card |
| after | CO2 of making the machines, apart; energy above idle power | the same |
| after | runs side by side: quality against CO2, what each change saved | `lmworks audit energy RUN...` |
| after | two GPUs compared: time, watts, energy, CO2, money, tokens per joule, ratios | `lmworks audit energy A B` |

## How it works

**Measured.** Joules come from counters: a GPU's own (NVML, mJ since the driver was loaded), or samples of its power by
trapezoids; processor packages by RAPL. A counter that wraps is counted on, one that was reset adds nothing negative.
Nothing is integrated over gaps of more than five sampling periods, and gaps are told.

**Modelled**, where there is no counter, and said so everywhere:

    processors   W = TDP (0.1 + 0.9 load^3)           or, for one process, TDP times its share of the time
    memory       W = 5 per module, less each beyond 4, 8 and 16; at least 10
    a GPU        W = 0.75 TDP

A range goes with each: that of the load model is the envelope of five processors whose power was measured against their
load. A processor that is not in the table is taken for 85 W, from 15 to 500.

**Phases.** prepare, train, validate, sample, checkpoint, idle and lost sum to the total: what is read is shared by the
time that each took since the last reading. Lost are steps that a kill threw away and that were made again. One rank of
a machine reads; machines are summed where ranks meet, so nothing is counted twice.

**What it comes to.**

    kg CO2e = kWh x PUE x kg per kWh              money = kWh x PUE x price
    before:   kWh = devices x hours x watts / 1000       hours = 6 P D / (devices x peak x efficiency) / 3600
    by hour:  kg CO2e = PUE x sum over 24 hours of kWh in that hour x kg per kWh of that hour
    embodied: kg  = sum over parts of units x kg per unit x count x hours / (5 x 365 x 24)
    above idle: kWh = kWh - idle watts before the run x hours / 1000

P: parameters that a token meets, of a mixture of experts the active ones. Grids are means of a year by country, or by
part of one (`core/energy/figures/grids.toml`, `regions.toml`), each with its year and with what it counts: the life
cycle of plants, or what they emit. A recipe's own figure has its unit ("409 g/kWh", "900 lb/MWh"), and so has its file
of a grid by the hour (`energy.hourly`). Joules are kept by the hour of the day, and sum to the total over machines and
attempts.

**Making the machines** (LLMCarbon's figures, `core/energy/figures/embodied.toml`): processors, memory as installed, the
rest of the board, dies of GPUs; five years of life; a range from eight years to 3.6 times the figure, which is where
another published account of the same machine ends. It stands beside the energy's CO2 and is never summed with it. A
slice of a GPU counts as such, a process by its share of the processors' time.

**The watcher.** It ends the run, saved and summarised, when a budget of `kwh`, `kg_co2e` or `money` is spent, or when
the validation loss fell by less than `least_gain` nats per kWh, `patience` validations in a row.

## When to use it

- *Always*: the meter costs 0.1 % of the time at most, by construction: no reading comes sooner after another than a
  thousand times what a reading takes (as long as that is below 2.5 ms).
- `counts = "process"` on machines that are shared, and where several runs go side by side.
- Name `country`, and `pue` of the site. Without them the world's mean and a PUE of 1 stand in, with a flag and a range
  that shows how little that says.
- Two GPUs compared, or any two recipes: train both and `lmworks audit energy A B`. Energy is power times time: a board
  of twice the power that takes a third of the time saves.
- `energy.hourly` where carbon moves with the hour: `lmworks plan` then says when to start, and by how much that helps.
- `energy.idle_seconds = 10` where the machine would run anyway, and only what the run adds is asked.
- Each mitigation is a change of recipe: a smaller or shallower model, a tokenizer with fewer tokens per text, another
  precision, early stopping, an optimizer that needs fewer steps, another country. `audit energy` says what each saved
  and whether quality moved by more than the seeds do.

## Differences

- The paper measures with codecarbon; here the meter is our own, and a test holds it against codecarbon 3.3 on the same
  power and intensity. codecarbon reads every 15 s and knows no phases; two trackers on a machine count it twice.
- The paper fine-tunes BERT, DistilBERT and T5 and scores answers by cosine similarity. The proof here trains decoders
  on text, a full one and one of half the depth, with two tokenizers, and scores bits per byte.
- Memory has a range down to 3 W for 8 GB, the older rule.
- The world's grid is 481 g/kWh (2023, life cycle); codecarbon has 475 (2018).

## Limits

- A modelled processor may be off by a factor of several, most of all at half load or in a virtual machine: compare runs
  on one machine, and do not quote its kWh without the range.
- Not counted: disks, network, cooling (PUE stands in), machines that wait for the run. Boards of other makers than
  NVIDIA are modelled.
- NVML counts whole boards, RAPL whole packages: other work on them is in the figure.
- Grids are means of a year: by hour they differ by more than the 25 % that is assumed. A figure of one's own has none.
  No grid by the hour is shipped, and of a file's days only the mean of each hour of the day counts.
- US states and Chinese provinces have what plants emit alone (China: CO2 alone); Canada's provinces are left out, since
  the table at hand names neither year nor source.
- Embodied CO2 leaves out disks, network and the memory on GPUs; a processor's die is 1.47 cm2 whichever it is, and most
  dies of GPUs are from memory. It may be off by a factor of several, as its range says.
- Energy above idle power is the whole machine's before the run: other work that comes and goes is in it.
- No figure of the paper is quoted here: none could be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, State, StepRecord, Watcher, Watching
from lmworks.train.spent import Bill

UNITS = {"kwh": "kWh", "kg_co2e": "kg CO2e", "money": "of the price's currency"}
"""What a budget can be of."""


@final
@dataclass(frozen=True, kw_only=True)
class GreenAI(Watching):
    """End the run when its energy, CO2 or money is spent, or when more of it buys too little."""

    kwh: PositiveFloat | None = None
    """Budget of energy, all machines and attempts together."""
    kg_co2e: PositiveFloat | None = None
    """Budget of CO2, with PUE and the recipe's grid."""
    money: PositiveFloat | None = None
    """Budget of money for energy, in the currency of energy.price."""
    least_gain: PositiveFloat | None = None
    """Nats per token and kWh by which the validation loss must fall between two validations."""
    patience: PositiveInt = 3
    """Validations with less gain that are borne."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A meter, a price, validations: what each setting needs."""
        if all(getattr(self, name) is None for name in (*UNITS, "least_gain")):
            yield Problem(path="", text=f"has no effect: give one of {', '.join((*UNITS, 'least_gain'))}")
        if not recipe.energy.on:
            yield Problem(path="", text="has no effect: energy.on is false, nothing is counted")
        if self.money is not None and recipe.energy.price is None:
            yield Problem(path="money", text="needs energy.price")
        if self.least_gain is not None and (recipe.validation.every is None or recipe.data.validation == 0):
            yield Problem(path="least_gain", text="needs validations: validation.every, and data.validation above 0")
        if self.patience != type(self).patience and self.least_gain is None:
            yield Problem(path="patience", text="has no effect without least_gain")

    def start(self) -> Watcher:
        """A watcher that has seen no validation yet."""
        return _Budget(self)


class _Budget(Watcher):
    def __init__(self, settings: GreenAI) -> None:
        self._settings = settings
        self._before: tuple[float, float] | None = None
        """kWh and loss of the last validation."""
        self._poor = 0

    def look(self, record: StepRecord, probe: Probe) -> Change | None:
        """Compare what was spent with the budgets, and, after a validation, with what it bought."""
        if record.spent is None:
            return None
        why = self._overspent(record.spent) or self._poor_gain(record)
        return None if why is None else Change(reason=why, stop=True)

    def _overspent(self, spent: Bill) -> str | None:
        for name, unit in UNITS.items():
            budget, so_far = getattr(self._settings, name), getattr(spent, name)
            if budget is not None and so_far is not None and so_far >= budget:
                return f"the budget of {budget:g} {unit} is spent"
        return None

    def _poor_gain(self, record: StepRecord) -> str | None:
        least = self._settings.least_gain
        if least is None or record.validation is None or record.spent is None:
            return None
        now = (record.spent.kwh, record.validation["val_loss"])
        before, self._before = self._before, now
        if before is None or now[0] <= before[0]:
            return None
        fall, kwh = before[1] - now[1], now[0] - before[0]
        self._poor = self._poor + 1 if fall < least * kwh else 0
        if self._poor < self._settings.patience:
            return None
        return f"a kWh has brought less than {least:g} nats for {self._poor} validations, at last {fall / kwh:.3g}"

    def state(self) -> State:
        """The last validation, and how many have brought too little."""
        return {"before": list(self._before) if self._before is not None else None, "poor": self._poor}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""
        before = state["before"]
        self._before = None if before is None else (float(before[0]), float(before[1]))
        self._poor = int(state["poor"])
