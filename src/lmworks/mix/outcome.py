"""A whole search, from recipe to answer: runs, recommendation, verification, the training recipe, a page of JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.run import code_version, hardware, versions
from lmworks.maths.ranks import spearman
from lmworks.mix.asking import Recommendation, drive
from lmworks.mix.problem import TOP, Mixture, MixtureProblem
from lmworks.mix.recipe import Mix
from lmworks.mix.runs import RunTable, Trial
from lmworks.mix.search import on_grid
from lmworks.mix.swarm import Swarm

Content = dict[str, Any]


def run(mix: Mix, swarm: Swarm) -> Content:
    """Search, verify, and write FOLDER/mix.json and FOLDER/recipe.toml; what is done already is not done again."""
    problem = swarm.problem
    table = RunTable(problem)

    advice = drive(mix.search, table, swarm.make, seed=mix.seed)
    swarm.keep(table)
    verified = _verify(mix, swarm, table, advice)
    swarm.keep(table)
    advice = after_verification(advice, verified)
    content = content_of(mix, table, advice, verified)
    files.write_json(swarm.folder / "mix.json", content)
    recipe = recipes.decode(swarm.recipe(advice.mixture), verb="train", source="the mixture's recipe")
    files.write_text(swarm.folder / "recipe.toml", recipes.dump(recipe))
    return content


def named_mixtures(problem: MixtureProblem, advice: Recommendation) -> dict[str, Mixture]:
    """What a verification may run, by name, all within the caps."""
    m = len(problem.sources)
    natural = on_grid(problem.nearest(problem.natural), problem)
    uniform = on_grid(problem.nearest(np.full(m, 1 / m)), problem)
    found = {"chosen": advice.mixture, "natural": tuple(natural.tolist()), "uniform": tuple(uniform.tolist())}
    return found | ({"worst": tuple(advice.facts["worst"])} if "worst" in advice.facts else {})


def _verify(mix: Mix, swarm: Swarm, table: RunTable, advice: Recommendation) -> Content | None:
    """Run the named mixtures at the target's size, all with the same seeds, and compare them pair by pair."""
    wanted: tuple[str, ...] = mix.verify.mixtures
    mixtures = {k: v for k, v in named_mixtures(swarm.problem, advice).items() if k in wanted}
    if not mixtures:
        return None
    asked = {
        (name, seed): Trial(mixture=mixture, fidelity=TOP, seed=seed, purpose="verify", label=name)
        for seed in mix.verify.seeds
        for name, mixture in mixtures.items()
    }
    new = list({trial.key: trial for trial in asked.values() if not table.has(trial)}.values())
    for run in swarm.make(new) if new else []:
        table.tell(run)
    values = {name: [_value(table, asked[name, seed]) for seed in mix.verify.seeds] for name in mixtures}
    return judged(values, mixtures)


def after_verification(advice: Recommendation, verified: Content | None) -> Recommendation:
    """The recommendation in the light of runs of the target's size: what was better there is told, and taken where it
    is better by more than two standard deviations of seeds."""
    mixtures = verified["mixtures"] if verified is not None else {}
    if verified is None or "chosen" not in mixtures or mixtures["chosen"]["failed"]:
        if advice.verified:  # by a run that the search itself made
            return advice
        text = "no run of the target's size shows what it is worth: it is unverified (recipe: verify.mixtures)"
        return dataclasses.replace(advice, warnings=(*advice.warnings, text))
    less = {name: value for name, value in verified["chosen_is_less_by"].items() if value is not None and value < 0}
    told = [f"at the target's size '{name}' was better, by {-value:.3g}" for name, value in less.items()]
    advice = dataclasses.replace(advice, verified=True, warnings=(*advice.warnings, *told))
    noise, best = verified["seed_sd"], min(less, key=lambda name: less[name], default=None)
    if best is None or noise is None or -less[best] <= 2 * noise:
        return advice
    rule = f"the {best} mixture, which was better at the target's size than the {advice.rule}"
    share = tuple(mixtures[best]["mixture"])
    return dataclasses.replace(advice, mixture=share, rule=rule, spread=(), gain=None, predicted=None, sd=None)


def _value(table: RunTable, trial: Trial) -> float:
    run = table.get(trial)
    return math.nan if run is None or run.failed is not None else table.problem.value(run.losses)


def judged(values: Mapping[str, Sequence[float]], mixtures: Mapping[str, Mixture]) -> Content:
    """Of each mixture its values, seed by seed; of the chosen one how much less it has than the others.

    A difference counts when it is more than two standard deviations of what seeds alone make of a mixture, pooled over
    mixtures.
    """
    arrays = {name: np.array(list(one), dtype=np.float64) for name, one in values.items()}
    sds = [float(one.std(ddof=1)) for one in arrays.values() if len(one) > 1 and np.isfinite(one).all()]
    noise = math.sqrt(sum(sd**2 for sd in sds) / len(sds)) if sds else None
    told: Content = {
        name: {
            "mixture": list(mixtures[name]),
            "values": [value if math.isfinite(value) else None for value in one.tolist()],
            "mean": float(one.mean()) if np.isfinite(one).all() else None,
            "failed": int((~np.isfinite(one)).sum()),
        }
        for name, one in arrays.items()
    }
    found: Content = {"mixtures": told, "seed_sd": noise}
    if "chosen" in arrays:
        less = {n: float((one - arrays["chosen"]).mean()) for n, one in arrays.items() if n != "chosen"}
        found["chosen_is_less_by"] = {n: value if math.isfinite(value) else None for n, value in less.items()}
        found["beyond_two_sd"] = {n: noise is not None and value > 2 * noise for n, value in less.items()}
    return found


def content_of(mix: Mix, table: RunTable, advice: Recommendation, verified: Content | None) -> Content:
    """The answer as JSON values."""
    problem = table.problem
    epochs = problem.epochs(advice.mixture)
    spread = advice.spread or tuple((share, share) for share in advice.mixture)
    sources = [
        {
            "name": source.name,
            "tokens": source.tokens,
            "natural": natural,
            "share": share,
            "low": low,
            "high": high,
            "cap": min(1.0, cap),
            "epochs": epochs.get(source.name),
        }
        for source, natural, share, (low, high), cap in zip(
            problem.sources, problem.natural.tolist(), advice.mixture, spread, problem.upper.tolist(), strict=True
        )
    ]
    proxies = table.spent("proxy", "unseen", "noise")
    if verified is not None:
        verified = {**verified, "order": _order(verified, advice)}
    return {
        "do": "mix",
        "sources": sources,
        "target": dict(problem.target),
        "recommendation": {key: value for key, value in dataclasses.asdict(advice).items() if key != "facts"},
        **advice.facts,
        "verified": verified,
        "ledger": table.ledger(),
        "cost": {"search": proxies, "verification": table.spent("verify"), "unit": "runs of the target's size"},
        "excluded": table.excluded(),
        "made_by": {"code": code_version(), "versions": versions(), "hardware": hardware()},
        "recipe": recipes.table_of(mix),
    }


def _order(verified: Content, advice: Recommendation) -> Content | None:
    """Predicted against measured order of the verified mixtures; None where predictions were not kept."""
    predicted = advice.facts.get("predicted", {})
    names = [n for n, one in verified["mixtures"].items() if n in predicted and one["mean"] is not None]
    if len(names) < 2:
        return None
    told, seen = [predicted[n] for n in names], [verified["mixtures"][n]["mean"] for n in names]
    by_told = [names[i] for i in np.argsort(told)]
    by_seen = [names[i] for i in np.argsort(seen)]
    return {"predicted": by_told, "measured": by_seen, "spearman": spearman(told, seen), "right": by_told == by_seen}
