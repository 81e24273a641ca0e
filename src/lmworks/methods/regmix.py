"""Which shares of its sources to train a model on: many small runs on random mixtures, a regression of their losses,
and the best of many drawn mixtures.

Qian Liu, Xiaosen Zheng, Niklas Muennighoff, Guangtao Zeng, Longxu Dou, Tianyu Pang, Jing Jiang, Min Lin. "RegMix: Data
Mixture as Regression for Language Model Pre-training". ICLR 2025, arXiv 2407.01492.

## What it does

A run reads several sources. How much of each is guessed, as a rule, or left to what there is. Here `lmworks mix RECIPE`
trains small models on random mixtures, learns what a mixture does to the losses that matter, and names the mixture with
the least predicted loss, its spread, what each source is worth, and what speaks against it.

    search = { use = "regmix", proxies = 18, unseen = 8 }
    target = { docs = 0.5, python = 0.5 }

| symbol | meaning |
| --- | --- |
| m, q | sources; their natural shares, those of the available tokens |
| p | a mixture: m shares that sum to 1 |
| K | small runs to learn from |
| y | a validation loss on what is held out of a source |

## How it works

1. *Draw.* q' = q^temperature, normalised. A mixture is a draw from Dirichlet(s q'), with s one of 15 strengths from 0.1
   to 5, evenly spread in log s. A draw that gives a source more than `epochs` times its natural share is thrown away.
   Shares below `step` become 0, the rest multiples of it. Of 100 K draws K different ones are taken.
2. *Train* a small model on each, all from one seed, so that they differ in their mixture only. `unseen` more are held
   out, to judge by; `repeats` of the natural mixture tell what seeds alone change.
3. *Regress* each loss of the target on p, by boosted trees, an exponential of a plane, a plane, or Gaussian processes
   on sqrt(p). 'auto' takes, for each loss, the one with the least error on proxies left out, five folds.

       lightgbm     sum of trees, rate 0.01, at most 1000 of them      ols      y = b.p
       log-linear   y = c + exp(a.p)                                   gp       y = g(sqrt(p)), Matern 5/2, a length
       log-gp       log(y - c) = g(sqrt(p)), c of log-linear                    for each source, and noise

4. *Draw* `simulated` mixtures within bounds and `max_epochs`, half from Dirichlet(q), half as in 1; predict the target,
   the weighted sum of its losses; take the mean of the best `top`. Caps bound a convex set, so the mean keeps them.
5. *Doubt.* Refits to resampled proxies give each share its spread, and the gain over the natural mixture its own. Where
   the target differs between mixtures by less than twice what it does between seeds, or where nothing is predicted to
   be better, the answer is the natural mixture.
6. *Verify*, where the recipe says so: chosen, natural, uniform and worst at the target's size, the same seeds for each.
   These runs are in the ledger as well, and have the last word.

What it stands on is that the *order* of mixtures is the same for small and large models; losses themselves need not be.

## When to use it

- Sources differ, there are more tokens of some than of others, and you know which losses matter.
- One target decides the answer: a target that is one of the sources mostly asks for that source. Name several.
- 3 (m + 1) proxies are a good number for the processes: fitted to 54 of the paper's runs they rank its 60M runs with
  0.97 and more, trees with 0.92; trees need all 512 for 0.985 (benchmarks/evidence/2026-11-29T0155-regmix_replay.json).
- Tried live on two cores: with 12 proxies for three sources (`lmworks mix stdlib`) and 18 for five (`lmworks mix desk`)
  it ranks eight unseen mixtures with 0.95 and 0.98, and four mixtures that were then trained at the target's size come
  in the order that it predicts. The chosen one is 0.16 and 0.46 bits per byte below the natural one, five standard
  deviations of seeds in both (`benchmarks/mix_live.py`). Search and runs to judge it by cost 1.7 and 3.5 large runs.
- Proxies below 15M parameters lose some of the order on many kinds of web text, as others found; here they are as large
  as `sizes` says.
- Caps belong to the search (`max_epochs`), not to the proxies: those may repeat more than the large run will.
- `lmworks mix --fit RUNS --predict TABLE` learns from runs that were made elsewhere.

## Differences

- The paper's script stops trees early on its *test* mixtures. Here the number of trees comes from folds of the proxies,
  and rows that are marked as held out cannot be fitted to: they are refused in code.
- The least rows of a leaf are a tenth of the proxies, at most LightGBM's 20; with its own, 32 proxies give one answer.
- The paper fits trees; so does `surrogate = "lightgbm"`. The others, and the choice between them, are added.
- The script draws from Dirichlet(q) for the search; here half of the draws are flattened, and all keep caps.
- Rounded shares sum to 1; the script's are off by up to 0.003. Too few mixtures are an error, not a crash.
- A target may be several losses: each has a regression of its own.
- The ridge of 'log-linear' is the residual variance over `prior_sd`^2, and so vanishes where there is no noise.

## Limits

- A mixture is constant over the run.
- Repeating a source is no worse in the regression than fresh text: only the cap knows of it.
- The spread is that of which proxies were made; it knows nothing of the step from small to large models.
- Losses per token compare within one tokenizer; where one is trained on the run's text, it is trained once, for all.
- The published tables are not part of lmworks: `benchmarks/regmix_replay.py` takes their folder from
  `LMWORKS_REGMIX_DATA`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lmworks.mix.advise import Asked, advise
from lmworks.mix.asking import Recommendation, Searching
from lmworks.mix.problem import MixtureProblem
from lmworks.mix.runs import Purpose, RunTable, Trial
from lmworks.mix.sample import Sampler, draw
from lmworks.mix.search import on_grid

PER_COEFFICIENT = 3
"""Proxies for each source and one more, when a recipe does not say how many."""


@final
@dataclass(frozen=True, kw_only=True)
class RegMix(Searching):
    """Many small runs on random mixtures, a regression of their losses, and the best of many drawn mixtures."""

    proxies: PositiveInt | None = None
    """Small runs to learn from. Left out: 3 (sources + 1), enough for log-linear; the paper has 512 for 17 sources."""
    unseen: NonNegativeInt = 8
    """Further small runs, to judge by. Fewer than 3: nothing is judged."""
    repeats: NonNegativeInt = 3
    """Runs of the natural mixture with as many seeds: what seeds alone change. Fewer than 2: it is not known."""
    surrogate: Literal["auto", "lightgbm", "log-linear", "ols", "gp", "log-gp"] = "auto"
    """What is fitted. 'auto': for each column the one that errs least on proxies left out; the paper has 'lightgbm'."""
    temperature: Fraction = 0.5
    """Mixtures are drawn around the natural shares to this power."""
    strengths: tuple[PositiveFloat, PositiveFloat] = (0.1, 5.0)
    """Between which strengths of the Dirichlet distribution."""
    epochs: PositiveFloat = 15.0
    """No proxy has more than so many times a source's natural share; inf: as much as is drawn."""
    step: PositiveFloat = 2e-4
    """Shares of proxies are multiples of it."""
    simulated: PositiveInt = 100_000
    """Mixtures that the surrogate is asked about."""
    top: PositiveInt = 128
    """How many of the best are averaged."""
    pull: NonNegativeFloat = 0.0
    """Weight of KL(mixture || natural) beside the target: how strongly the answer keeps to the natural mixture."""
    resamples: NonNegativeInt = 20
    """Refits to resampled proxies, for the spread of every share."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that contradict each other."""
        if self.strengths[0] > self.strengths[1]:
            yield Problem(path="strengths", text=f"must rise, got {list(self.strengths)}")
        if self.top > self.simulated:
            yield Problem(path="top", text=f"{self.top} is more than the {self.simulated} that are drawn")
        if abs(round(1 / self.step) * self.step - 1) > 1e-9:
            yield Problem(path="step", text=f"1 is not a multiple of {self.step:g}. Legal: 0.0002, 0.001, 0.01")

    def at_once(self) -> int:
        """All of them: no run hangs on another."""
        return 1_000_000

    def ask(self, problem: MixtureProblem, table: RunTable, *, seed: int, count: int) -> Sequence[Trial]:
        """Repeats, proxies and unseen runs that are not there yet."""
        return [trial for trial in self.trials(problem, seed=seed) if not table.has(trial)][:count]

    def trials(self, problem: MixtureProblem, *, seed: int) -> list[Trial]:
        """All runs, of the cheapest size: the natural mixture with several seeds, then drawn ones."""
        if len(problem.sources) == 1:
            return []
        size = problem.fidelities[0].name
        natural = tuple(on_grid(problem.nearest(problem.natural), problem).tolist())
        found = [
            Trial(mixture=natural, fidelity=size, seed=seed + i, purpose="noise", label="natural")
            for i in range(self.repeats)
        ]
        proxies = self.proxies or PER_COEFFICIENT * (len(problem.sources) + 1)
        sampler = Sampler(
            temperature=self.temperature,
            strengths=self.strengths,
            epochs=self.epochs if math.isfinite(self.epochs) else None,
            step=self.step,
        )
        for i, mixture in enumerate(draw(problem, proxies + self.unseen, seed=seed, sampler=sampler).tolist()):
            purpose: Purpose = "proxy" if i < proxies else "unseen"
            found.append(Trial(mixture=tuple(mixture), fidelity=size, seed=seed, purpose=purpose))
        return list({trial.key: trial for trial in reversed(found)}.values())[::-1]

    def recommend(self, problem: MixtureProblem, table: RunTable, *, seed: int) -> Recommendation:
        """The mean of the drawn mixtures that are predicted to be best; all of it, where there is one source."""
        if len(problem.sources) == 1:
            return Recommendation(mixture=(1.0,), rule="there is one source", predicted=None, sd=None)
        asked = Asked(
            surrogate=self.surrogate,
            simulated=self.simulated,
            top=self.top,
            pull=self.pull,
            resamples=self.resamples,
            seed=seed,
        )
        return advise(table, problem.fidelities[0].name, asked)
