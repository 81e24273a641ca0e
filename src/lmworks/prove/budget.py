"""Equal budgets: how many steps each arm may take so that all spend the same tokens, FLOPs, seconds or joules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.core.errors import LmworksError
from lmworks.core.recipe import Table
from lmworks.prove.recipe import Axis
from lmworks.train.arm import Measured

TRIAL_STEPS = 43
"""Steps of a trial: more than four of the intervals at which methods usually do extra work."""
TRIAL_DROPPED = 3
"""First steps of a trial, which pay for start-up."""


def trial_table(table: Table) -> Table:
    """A short run of an arm's recipe that only shows what a step costs."""
    quiet: Table = {"checkpoints": {}, "validation": {}, "samples": {}, "sinks": []}
    return {**table, **quiet, "steps": TRIAL_STEPS, "schedule": "constant"}


def needs_trial(axis: Axis) -> bool:
    """Whether a step's cost has to be measured."""
    return axis in ("flops", "seconds", "joules")


def cost_of_step(axis: Axis, decoded: Any, trial: Measured | None) -> float:
    """What one step of an arm costs on the axis.

    Raises LmworksError when this machine cannot tell: joules need a counter of energy.
    """
    if axis == "tokens":
        return float(decoded.batch_size * decoded.data.sequence_length)
    assert trial is not None, "an axis that is measured has trials"
    place = trial.curve("loss", axis)
    if axis == "joules" and place[-1][0] == 0:
        raise LmworksError(
            "this machine has no energy counter that can be read, so joules cannot be equal",
            legal="axis = steps, tokens, flops, seconds",
            next_step="RAPL counters (/sys/class/powercap) are often readable by root only; a GPU's need pynvml",
        )
    return (place[-1][0] - place[TRIAL_DROPPED - 1][0]) / (len(place) - TRIAL_DROPPED)


def equal_steps(costs: Mapping[str, float], baseline: str, steps: int) -> dict[str, int]:
    """Steps of every arm that together cost as much as the baseline's `steps`, at least one."""
    budget = costs[baseline] * steps
    return {arm: max(1, round(budget / cost)) for arm, cost in costs.items()}
