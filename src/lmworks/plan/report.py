"""A search's answer for people and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lmworks.core import recipe as recipes
from lmworks.core.energy.footprint import LIFE_YEARS
from lmworks.parallel.footprint import WORDS, in_words
from lmworks.plan.bill import KWH, by_start, carbon_in
from lmworks.plan.cluster import Cluster
from lmworks.plan.search import ROOM, Answer, Plan, as_recipe, described
from lmworks.plan.time import CLASSES

NAMES = {
    "compute": "computing",
    "again": "computing again",
    "tensor": "tp exchanges",
    "context": "cp exchanges",
    "gather": "waiting for weights",
    "away": "waiting for saved tensors",
    "bubble": "waiting for stages",
    "reduce": "summing gradients",
    "update": "update",
}
"""Classes of time in words."""
HEADER = ["", "layout", "saved", "memory", "step", "tokens/s", "MFU", "run", "kWh", "$", "kg CO2"]


def rows(plans: Sequence[Plan]) -> list[list[str]]:
    """A row for each plan, under `HEADER`."""
    found = []
    for number, plan in enumerate(plans, start=1):
        bill = plan.bill
        found.append(
            [
                str(number),
                described(plan.choice),
                policy(plan.choice.saved),
                in_words(plan.memory.total),
                duration(plan.step.seconds.total),
                number_in_words(plan.tokens_per_second),
                f"{100 * plan.mfu:.1f} %",
                duration(bill.seconds),
                number_in_words(bill.kwh),
                "-" if bill.dollars is None else number_in_words(bill.dollars),
                "-" if bill.co2_kg is None else number_in_words(bill.co2_kg),
            ]
        )
    return found


def policy(saved: Any) -> str:
    """A policy for saved tensors, by its name and what it keeps."""
    name = recipes.table_of(saved).get("use", type(saved).__name__)
    return f"{name} ({saved.keep})" if getattr(saved, "keep", None) == "products" else str(name)


def duration(seconds: float) -> str:
    """'640 ms', '2.31 s', '5.2 hours', '33.9 days'."""
    for size, word in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {word}"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def number_in_words(value: float) -> str:
    """Three figures and a letter."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def breakdown(plan: Plan, memory_bytes: float) -> list[str]:
    """Where the time and the memory of one plan go."""
    seconds = plan.step.seconds
    lines = [f"a step of {duration(seconds.total)}:"]
    for name, part in seconds.by_class().items():
        if part / seconds.total >= 0.0005:
            lines.append(f"  {NAMES[name]:<26}{duration(part):>10}{100 * part / seconds.total:>8.1f} %")
    pipeline = f" at place {plan.place} of the pipeline" if plan.choice.layout.pp > 1 else ""
    lines.append(f"memory of the rank that holds most{pipeline}:")
    for name, size in plan.memory.by_class().items():
        lines.append(f"  {WORDS[name]:<26}{in_words(size):>10}")
    lines.append(f"  {'in all':<26}{in_words(plan.memory.total):>10}  of {in_words(int(memory_bytes))}")
    return lines


def climate(answer: Answer, plan: Plan, cluster: Cluster, region: str | None) -> list[str]:
    """With which grid CO2 is told, what making the machines adds apart from it, and when a run had best begin."""
    made, profile, grid = plan.bill.made_kg, answer.ground.recipe.energy.profile(), carbon_in(cluster, region)
    lines = [f"kg CO2 at {grid[1]}"] if grid is not None else []
    if made is not None:
        text = f"{number_in_words(made.central)} ({number_in_words(made.low)} to {number_in_words(made.high)})"
        lines.append(f"making the machines, the run's share of {LIFE_YEARS:g} years, not in the above: {text} kg CO2")
    if profile is not None:
        kg = [start.central for start in by_start(profile, plan.bill)]
        best, worst = kg.index(min(kg)), kg.index(max(kg))
        less = 100 * (1 - kg[best] / kg[worst]) if kg[worst] > 0 else 0.0
        lines.append(
            f"started at {best:02}:00 UTC: {number_in_words(kg[best])} kg CO2, {less:.1f} % less than at {worst:02}:00 "
            f"({number_in_words(kg[worst])} kg), by {profile.file} ({profile.place}, {profile.year}: {profile.source})"
        )
    return lines


def refusals(answer: Answer, cluster: Cluster) -> list[str]:
    """Why the other layouts were refused."""
    room = in_words(int(ROOM * cluster.memory_bytes.value))
    lines = [f"{answer.looked_at:,} layouts looked at, {answer.fitting:,} fit into {room} of {cluster.device}"]
    for name, count in sorted(answer.refused.items(), key=lambda pair: -pair[1]):
        lines.append(f"  {count:,} do not: most of what they need is {WORDS[name]}")
    return lines


def doubts(answer: Answer, cluster: Cluster) -> list[str]:
    """What the figures hang on that nobody measured."""
    efficiency = cluster.efficiency
    how = "fitted to" if efficiency.fitted else "not fitted:"
    lines = [f"share of the peak that is reached, {how} {efficiency.source}"]
    if unchecked := cluster.unchecked():
        lines.append(f"figures of the cluster that nobody checked: {', '.join(unchecked)}")
    if answer.ground.recipe.compile:
        lines.append("memory is that of blocks which are not compiled")
    if any(plan.memory.saved is None for plan in answer.plans):
        lines.append("the policy does not tell what it saves: memory is without it")
    return lines


def as_json(answer: Answer, cluster: Cluster) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "cluster": cluster.name,
        "devices": answer.devices,
        "looked_at": answer.looked_at,
        "fitting": answer.fitting,
        "refused": answer.refused,
        "nearest": None if answer.nearest is None else _told(answer.nearest.choice, answer.nearest.memory),
        "doubts": doubts(answer, cluster),
        "plans": [
            _told(plan.choice, plan.memory)
            | {
                "step_seconds": plan.step.seconds.total,
                "closed_form_seconds": plan.closed,
                "seconds_by_class": {name: float(getattr(plan.step.seconds, name)) for name in CLASSES},
                "tokens_per_second": plan.tokens_per_second,
                "tokens_per_day": plan.tokens_per_second * 86_400,
                "mfu": plan.mfu,
                "days": plan.bill.seconds / 86_400,
                "joules": plan.bill.kwh * KWH,
                "dollars": plan.bill.dollars,
                "co2_kg": plan.bill.co2_kg,
                "co2_embodied_kg": None if plan.bill.made_kg is None else plan.bill.made_kg.to_json(),
                "co2_kg_by_start_utc": _by_start(answer, plan),
            }
            for plan in answer.plans
        ],
    }


def _by_start(answer: Answer, plan: Plan) -> list[float] | None:
    profile = answer.ground.recipe.energy.profile()
    return None if profile is None else [kg.central for kg in by_start(profile, plan.bill)]


def _told(choice: Any, memory: Any) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(choice.layout),
        "micro_batch_size": choice.rows,
        "micro_batches": choice.micro_batches,
        "saved": recipes.table_of(choice.saved),
        "memory_bytes": memory.total,
        "memory_by_class": memory.by_class(),
    }


def recipe_text(answer: Answer, plan: Plan, cluster: Cluster) -> str:
    """The recipe with the plan in it, as TOML, every default written out."""
    head = (
        f"# Planned for {answer.devices} x {cluster.device}: {described(plan.choice)}.\n"
        f"# {duration(plan.step.seconds.total)} a step, {in_words(plan.memory.total)} on the rank that holds most.\n"
    )
    return head + recipes.dump(as_recipe(answer.ground.recipe, plan.choice))
