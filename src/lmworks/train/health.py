"""The watcher `health`: rules with healthy bands look at every number of a step, and say so when one leaves its band.

A rule is data: a metric, a band, how its baseline is made, and what is done. The shipped ones lie in
`health_rules.toml`. A metric is any column of metrics.jsonl, and `data_share` and `ignored_share`; what a method notes
is one, so a run whose rows another model writes notes `sampler_drift`, and the rule of that name is in force.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, final

from torch import Tensor

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, NonNegativeInt, PositiveInt, decode_as
from lmworks.parallel.world import seat
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, State, StepRecord, Watcher, Watching
from lmworks.train.webhook import Webhook, legal

RULES = Path(__file__).with_name("health_rules.toml")
SAME_EVERYWHERE = ("loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "ignored_share")
"""Metrics that all ranks know alike: only these may end a run."""
MOST_ROWS = 256
"""Rows of a batch that an alert lists."""
UNSEEN = 100
"""Steps after which a recipe's own rule says that its metric has not been seen."""


@final
@dataclass(frozen=True, kw_only=True)
class Rule:
    """A healthy band of one metric."""

    name: str
    """What an alert is called."""
    metric: str
    """A column of metrics.jsonl, or data_share, ignored_share."""
    side: Literal["above", "below", "both"] = "above"
    """On which side of the band a value is out of order."""
    baseline: Literal["limits", "recent", "first", "growth"] = "recent"
    """'limits': `low` and `high`. 'recent', 'first': the median of the last or of the first `window` values, and so
    many `deviations` around it. 'growth': from the first to the last third of the window."""
    low: float | None = None
    """Lower limit."""
    high: float | None = None
    """Upper limit."""
    window: PositiveInt = 64
    """Values that make the baseline."""
    deviations: NonNegativeFloat = 6.0
    """Standard deviations, from the median absolute one, that are healthy."""
    share: NonNegativeFloat = 0.05
    """Of the baseline, that is healthy at the least; of growth, at the most."""
    after: NonNegativeInt = 20
    """Values that come first and are not judged."""
    patience: PositiveInt = 1
    """Values out of order in a row that make an alert."""
    quiet: PositiveInt = 50
    """Values after an alert in which there is no other."""
    keep_batch: bool = False
    """Tell which documents the step was trained on."""
    action: Literal["log", "webhook", "stop"] = "log"
    """'log': an event and a line; 'webhook': and a post, where the watcher has an address; 'stop': and the end of the
    run, saved."""


class Band(NamedTuple):
    """What is healthy now."""

    low: float
    high: float
    centre: float


@final
@dataclass(frozen=True, kw_only=True)
class Health(Watching):
    """Say so when a metric leaves its healthy band: loss and gradient spikes with their batch, slower steps, growing
    memory, waiting for data, the size of updates."""

    rules: tuple[Rule, ...] = ()
    """Rules beside the shipped ones; one of the same name replaces it."""
    without: tuple[str, ...] = ()
    """Shipped rules that are left out."""
    webhook: str | None = None
    """Where alerts are posted as JSON: a URL, or $NAME, the environment variable that holds it, which keeps it out of
    the run folder. Left out: nowhere."""
    update_every: PositiveInt = 10
    """Steps between two measurements of `update_ratio`: the length of an update over that of the weights, from 4096
    values of each parameter of this rank."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Names that are none, bands that are none, a stop that ranks would not agree on."""
        counts = Counter(rule.name for rule in self.rules)
        for i, rule in enumerate(self.rules):
            if counts[rule.name] > 1:
                yield Problem(path=f"rules.{i}.name", text=f"{counts[rule.name]} rules are called '{rule.name}'")
            yield from (Problem(path=f"rules.{i}.{path}", text=text) for path, text in _problems(rule))
        for name in self.without:
            if name not in (known := [rule.name for rule in shipped()]):
                yield Problem(path="without", text=f"no shipped rule is called '{name}'. Legal: {', '.join(known)}")
        if self.webhook is not None and not legal(self.webhook):
            text = "is no address. Legal: http://..., https://..., or $NAME for an environment variable"
            yield Problem(path="webhook", text=text)
        if self.webhook is None and any(rule.action == "webhook" for rule in self.rules):
            yield Problem(path="webhook", text="is left out, and a rule has action = 'webhook'")

    def sizes_update(self) -> int | None:
        """As often as the setting says, where a rule reads it."""
        return self.update_every if any(rule.metric == "update_ratio" for rule in self.all_rules()) else None

    def all_rules(self) -> list[Rule]:
        """The rules in force: shipped ones that are not replaced or left out, then the recipe's."""
        own = {rule.name for rule in self.rules}
        return [rule for rule in shipped() if rule.name not in own and rule.name not in self.without] + [*self.rules]

    def start(self) -> Watcher:
        """A watcher that has seen nothing yet. Only the first rank posts."""
        hook = Webhook(self.webhook) if self.webhook is not None and seat().first else None
        return _Health(self.all_rules(), {rule.name for rule in self.rules}, hook)


@dataclass(frozen=True, kw_only=True)
class _File:
    """What a file of rules holds."""

    rules: tuple[Rule, ...]
    """All of them."""


@cache
def shipped() -> tuple[Rule, ...]:
    """The rules that come with lmworks."""
    found: _File = decode_as(_File, tomllib.loads(RULES.read_text(encoding="utf-8")), source=str(RULES))
    return found.rules


def _problems(rule: Rule) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong with it)."""
    if rule.baseline == "limits":
        if rule.low is None and rule.high is None:
            yield "baseline", "'limits' needs low, high or both"
        needed = {"above": rule.high, "below": rule.low, "both": None if rule.low is None else rule.high}[rule.side]
        if (rule.low, rule.high) != (None, None) and needed is None:
            yield "side", f"'{rule.side}' needs {'low and high' if rule.side == 'both' else _limit(rule.side)}"
        if rule.low is not None and rule.high is not None and rule.low >= rule.high:
            yield "low", f"{rule.low} is not below high = {rule.high}"
    elif (rule.low, rule.high) != (None, None):
        yield "low" if rule.low is not None else "high", f"has no effect with baseline = '{rule.baseline}'"
    elif rule.after < 3:
        yield "after", f"is {rule.after}; a baseline needs 3 values"
    if rule.action == "stop" and rule.metric not in SAME_EVERYWHERE:
        text = f"'stop' is for metrics that all ranks know alike: {', '.join(SAME_EVERYWHERE)}"
        yield "action", text


def _limit(side: str) -> str:
    return "high" if side == "above" else "low"


def band(rule: Rule, values: Sequence[float]) -> Band | None:
    """What is healthy after these values (the last `window` of them, or the first); None: it cannot be said yet."""
    if rule.baseline == "limits":
        low = -math.inf if rule.low is None else rule.low
        high = math.inf if rule.high is None else rule.high
        return Band(low, high, high if low == -math.inf else low)
    if len(values) < 3:
        return None
    if rule.baseline == "growth":
        third = len(values) // 3
        centre = median(values[:third])
        room = rule.share * abs(centre)
    else:
        centre = median(values)
        deviation = 1.4826 * median(abs(value - centre) for value in values)
        room = max(rule.deviations * deviation, rule.share * abs(centre))
    return Band(centre - room, centre + room, centre)


class _Seen:
    """What one rule has seen."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.values: list[float] = []
        self.count = 0
        self.outside = 0
        self.quiet = 0

    def judge(self, value: float) -> Band | None:
        """The healthy band where this value makes an alert, else None."""
        self.count += 1
        found = self._outside(value)
        if math.isfinite(value) and not (self.rule.baseline == "first" and len(self.values) == self.rule.window):
            self.values = [*self.values, value][-self.rule.window :]
        self.outside = self.outside + 1 if found is not None else 0
        self.quiet = max(0, self.quiet - 1)
        if found is None or self.outside < self.rule.patience or self.quiet > 0:
            return None
        self.outside, self.quiet = 0, self.rule.quiet
        return found

    def _outside(self, value: float) -> Band | None:
        """The band, where a value is judged and lies outside of it."""
        rule = self.rule
        if not math.isfinite(value):
            return Band(-math.inf, math.inf, math.nan)
        found = band(rule, self.values) if self.count > rule.after else None
        if found is None:
            return None
        if rule.baseline == "growth":
            value = median([*self.values, value][-max(1, len(self.values) // 3) :])
        above, below = value > found.high, value < found.low
        bad = (above and rule.side != "below") or (below and rule.side != "above")
        return found if bad else None

    def state(self) -> State:
        """All of it."""
        return {"values": self.values, "count": self.count, "outside": self.outside, "quiet": self.quiet}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""
        self.values = [float(value) for value in state["values"]]
        self.count, self.outside, self.quiet = (int(state[name]) for name in ("count", "outside", "quiet"))


class _Health(Watcher):
    def __init__(self, rules: Sequence[Rule], own: set[str], hook: Webhook | None) -> None:
        self._seen = [_Seen(rule) for rule in rules]
        self._own, self._hook = own, hook
        self._steps = 0

    def look(self, record: StepRecord, probe: Probe) -> Change | None:
        """Hold every number of the step against its rules."""
        self._steps += 1
        alerts, reasons, stop = [], [], False
        for seen in self._seen:
            value = record.row.get(seen.rule.metric)
            found = None if value is None else seen.judge(float(value))
            if value is None or found is None:
                continue
            alert = _alert(seen.rule, float(value), found, record, probe)
            alerts.append(alert)
            reasons.append(alert["text"])
            stop = stop or seen.rule.action == "stop"
            if self._hook is not None and seen.rule.action != "log":
                self._hook.post({key: alert[key] for key in alert if key != "batch"})
        reasons += self._unseen()
        reasons += [f"an alert was not posted: {why}" for why in self._hook.failures()] if self._hook else []
        return Change(reason="; ".join(reasons), stop=stop, alerts=tuple(alerts)) if reasons else None

    def _unseen(self) -> list[str]:
        """A recipe's rules whose metric has not come: it may be misspelt."""
        if self._steps != UNSEEN:
            return []
        rules = [seen.rule for seen in self._seen if seen.rule.name in self._own and seen.count == 0]
        return [f"rule '{rule.name}': no step has told a '{rule.metric}' so far" for rule in rules]

    def state(self) -> State:
        """What each rule has seen, by its name."""
        return {"steps": self._steps, "rules": {seen.rule.name: seen.state() for seen in self._seen}}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""
        self._steps = int(state["steps"])
        for seen in self._seen:
            if seen.rule.name in state["rules"]:
                seen.load(state["rules"][seen.rule.name])


def _alert(rule: Rule, value: float, found: Band, record: StepRecord, probe: Probe) -> dict[str, Any]:
    """An alert as JSON values."""
    healthy = {"above": f"up to {found.high:.5g}", "below": f"from {found.low:.5g}"}
    text = healthy.get(rule.side, f"{found.low:.5g} to {found.high:.5g}")
    if math.isnan(found.centre):
        text = "a number"
    told: dict[str, Any] = {
        "rule": rule.name,
        "metric": rule.metric,
        "value": _plain(value),
        "low": _plain(found.low),
        "high": _plain(found.high),
        "baseline": _plain(found.centre),
        "action": rule.action,
        "text": f"{rule.name} at step {record.step}: {rule.metric} is {value:.5g}, healthy is {text}",
    }
    if rule.keep_batch:
        told["batch"] = batch_of(record, probe)
    return told


def batch_of(record: StepRecord, probe: Probe) -> dict[str, Any]:
    """What this rank trained on in the step: of each row its source, its number there, and its documents as (hash of
    the text, first token, tokens). `chosen`: rows that a selector took of those drawn."""
    rows = record.origins()
    listed = [
        {"source": row.source, "row": row.row, "documents": [list(piece) for piece in row.documents]}
        for row in rows[:MOST_ROWS]
    ]
    chosen = probe.batch.rows if probe.batch is not None else len(rows)
    return {"drawn": len(rows), "chosen": chosen, "rows": listed}


def _plain(value: float) -> float | str:
    """JSON has no word for what is no number."""
    return value if math.isfinite(value) else str(value)


def drift(sampler_N: Tensor, trainer_N: Tensor) -> Tensor:
    """How far the model that wrote N tokens is from the one that is trained: the mean of |log p - log q| in nats, a
    scalar. Runs that learn from written answers note it as `sampler_drift`. 0 for no tokens.

    sampler_N, trainer_N: log-probabilities of the same tokens by each.
    """
    apart_N = (sampler_N.double() - trainer_N.double()).abs()
    return apart_N.mean() if apart_N.numel() else apart_N.sum()
