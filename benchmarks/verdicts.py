"""From runs to numbers: medians, ratios of the same round, and what they say about the bars. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from cases import ARMS, LOAD_LIMIT, OVERHEAD_BAR, PRODUCT_BAR, SPEED_BARS

Run = dict[str, Any]
"""What an arm wrote, with 'arm' and 'round' added."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with its extremes over rounds."""

    median: float
    least: float
    most: float
    each: tuple[float, ...]

    def text(self, digits: int = 2) -> str:
        """'1.31 (1.28 to 1.35)'."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One bar, one value."""

    what: str
    bar: float
    at_least: bool
    """True: the value must reach the bar; False: it must stay below."""
    value: Spread
    against: str | None = None
    loaded: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the bar."""
        return self.value.median >= self.bar if self.at_least else self.value.median <= self.bar

    @property
    def in_every_round(self) -> bool:
        """Whether each round alone keeps it."""
        return self.value.least >= self.bar if self.at_least else self.value.most <= self.bar

    def word(self) -> str:
        """For people."""
        found = "missed"
        if self.is_met:
            found = "met" if self.in_every_round else "met in the median, not in every round"
        return f"{found} (loaded machine)" if self.loaded else found

    def table(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_met": self.is_met, "in_every_round": self.in_every_round, "verdict": self.word()}


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most. Raises ValueError for no values."""
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(median=median(values), least=min(values), most=max(values), each=tuple(values))


def step_seconds(run: Run) -> float:
    """The median of a run's timed iterations."""
    return float(median(run["seconds"]))


def by_round(runs: Sequence[Run], arm: str) -> dict[int, float]:
    """Round -> median step seconds of an arm."""
    return {run["round"]: step_seconds(run) for run in runs if run["arm"] == arm}


def ratios(slower: Mapping[int, float], faster: Mapping[int, float]) -> Spread | None:
    """slower / faster in each round that both have; None when there is none."""
    common = [slower[r] / faster[r] for r in sorted(slower) if r in faster]
    return spread(common) if common else None


def speedups(runs: Sequence[Run]) -> dict[str, Spread]:
    """Arm -> how many times faster lmworks is, for every other arm that ran."""
    ours = by_round(runs, "lmworks")
    names = [name for name in dict.fromkeys(run["arm"] for run in runs) if name not in ("lmworks", "product")]
    found = {name: ratios(by_round(runs, name), ours) for name in names}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def cpu_savings(runs: Sequence[Run]) -> dict[str, Spread]:
    """Arm -> its CPU time of a step over lmworks', per round: what others on the machine disturb least."""
    used: dict[str, dict[int, float]] = {}
    for run in runs:
        used.setdefault(run["arm"], {})[run["round"]] = run["cpu_seconds_per_step"]
    ours = used.pop("lmworks", {})
    used.pop("product", None)
    found = {name: ratios(theirs, ours) for name, theirs in used.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def product_shares(runs: Sequence[Run], arm: str, tokens: int, flops_per_token: float) -> Spread | None:
    """Model FLOP/s of an arm over the product rate measured in the same round."""
    rates = {run["round"]: run["flops"] / step_seconds(run) for run in runs if run["arm"] == "product"}
    seconds = by_round(runs, arm)
    common = [tokens * flops_per_token / seconds[r] / rates[r] for r in sorted(seconds) if r in rates]
    return spread(common) if common else None


def overhead(runs: Sequence[Run], arm: str = "lmworks") -> Spread | None:
    """Per round: the share of a turn of the loop that is spent outside the step."""
    found = []
    for run in runs:
        if run["arm"] == arm and "step_seconds" in run:
            inside = run["step_seconds"][-len(run["seconds"]) :]
            found.append(1 - sum(inside) / sum(run["seconds"]))
    return spread(found) if found else None


def is_loaded(runs: Sequence[Run]) -> bool:
    """Whether somebody else took more than LOAD_LIMIT of the machine in any of these runs."""
    return any(run["other_load"] > LOAD_LIMIT for run in runs)


def verdicts(runs: Sequence[Run], *, case: str, precision: str, tokens: int) -> list[Verdict]:
    """All bars that these runs of one shape and precision can be held against."""
    loaded, where = is_loaded(runs), f"{case}, {precision}"
    found: list[Verdict] = []
    peers = {name: ratio for name, ratio in speedups(runs).items() if ARMS[name].is_peer}
    if peers:
        best = min(peers, key=lambda name: peers[name].median)
        what = f"tokens/s against the best peer, {where}"
        bar = SPEED_BARS[precision]
        found.append(Verdict(what=what, bar=bar, at_least=True, value=peers[best], against=best, loaded=loaded))
    ours = [run for run in runs if run["arm"] == "lmworks"]
    share = product_shares(runs, "lmworks", tokens, ours[0]["train_flops_per_token"]) if ours else None
    if share is not None and precision == "fp32":
        what = f"share of the measured fp32 product rate, {where}"
        found.append(Verdict(what=what, bar=PRODUCT_BAR, at_least=True, value=share, loaded=loaded))
    outside = overhead(runs)
    if outside is not None:
        what = f"loop, events and watchers, {where}"
        found.append(Verdict(what=what, bar=OVERHEAD_BAR, at_least=False, value=outside, loaded=loaded))
    return found
