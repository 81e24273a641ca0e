"""CoLM: Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures.

Dang Nguyen, Wenhan Yang, Rathul Anand, Yu Yang, Baharan Mirzasoleiman. ICLR 2025, arXiv 2407.19580.

## What it does

At every step it looks at twice as many rows as it trains on, and keeps the half that best stands for all of them. Rows
of small sources are all kept. So a step has nearly the gradient of a large batch, and the backward pass of a small one.

## How it works

b rows are wanted (`batch_size`); N = b / `ratio` candidates are drawn. The steps below are gone through at each step.

1. Rows of small sources are kept. A source is small when its share of the mixture is below 1 / (number of sources), or
   when `keep` names it. B' = b - (number of kept rows) are left. When B' <= 0, the first b kept rows are the batch.
2. Every other row i gets a proxy g_i of its gradient, for one matrix W of the last block (`matrix`, the value
   projection). The states before the last block are computed once. Then, for K directions z_k ~ N(0, 1) of the shape of
   W (`directions`) and e = 1e-3 (`epsilon`):

       c_ik = (L_i(W + e z_k) - L_i(W - e z_k)) / 2e          g_i = 1/K * sum over k of c_ik z_k

   L_i is the mean loss over the valid targets of row i. Each pass is the last block and the head only, in float32.
3. Adam's view, with the moments m', v' of the n earlier steps (at first 0), t = n + 1, the optimizer's betas and eps:

       m_i = b1 m' + (1 - b1) g_i        v_i = b2 v' + (1 - b2) g_i^2
       a_i = (m_i / (1 - b1^t)) / (sqrt(v_i / (1 - b2^t)) + eps)

4. Per source, the 2560 places (`coordinates`) where the mean of a_i over its rows is largest in size are kept.
5. Per source c with n_c of the N' rows, floor(n_c B' / N') rows are chosen; the rest goes one by one to the smallest.
6. Within a source the chosen rows S make  sum over i of max over j in S of s_ij  large, where
   s_ij = max distance - ||a_i - a_j||_1. Lazy greedy search: at least 1 - 1/e of the best value.
7. The step trains on the kept and the chosen rows with equal weights. `weighted = true`: a chosen row weighs as many
   rows as are nearest to it.
8. m' and v' become the means of m_i and v_i over the chosen rows (of large sources).

**What fresh directions must mean.** With one z for all rows, every g_i is a multiple of z: the proxies have rank 1, and
rows differ by one number. With directions of its own for each row, the rank is full but the distances say nothing: two
equal rows get proxies that are as far apart as any two. What is wanted is a random projection that all rows share:
K > 1 directions, drawn anew at each step, give rank K, and distances that follow those of the true gradients. So
`perturbation = "step"` with 4 directions is the default. `perturbation = "fixed"` with `directions = 1` is what the
published code does: one z for the whole run. It is rank 1 before Adam's view bends it, and what lies across that z is
never seen. `perturbation = "row"` is there to be measured.

Columns of metrics.jsonl: `colm/seconds` of the selection; `colm/kept`, `colm/candidates`, `colm/sources`;
`colm/rows/NAME`, the chosen rows of each source; `colm/fallbacks`, steps so far without any proxy. With
`measure_every`: `colm/gradient_error`, ||g_S - g|| / ||g|| over all weights, g being the mean gradient of all
candidates, and `colm/gradient_error_random`, the same for as many random candidates. These passes are left out of
`flops`, but not out of `seconds`. From shapes: `colm/saved_bytes`, what autograd keeps of one micro-batch;
`colm/saved_bytes_of_all`, the same had all candidates been trained on; `colm/selection_bytes`, directions and moments.

## When to use it

- When the batch you want does not fit, or its backward pass is too slow, and the mixture has several sources of uneven
  sizes. With one source there is no keep list, and `colm/sources` is 1.
- Tune the learning rate as for plain training; the paper names none that differs.
- `coordinates`: the paper's 2560 are 0.8 % of its matrix. In a smaller model take a smaller number.
- `keep = []` keeps nothing; `keep = ["a", "b"]` names the small sources. They must leave room: with `ratio` 0.5, less
  than half of the mixture.
- `proxy = "exact"` takes true gradients of the matrix; `"representation"` last hidden states; `"random"` chooses at
  random among the rows that are not kept.

Cost of the selection in forward passes over the rows that are not kept, f being the share of the last block and the
head: (1 - f) + 2 K (f + one product of W's size). In a deep model with a ratio of 0.5 and K = 1 that is about 1; so a
step costs 1 + 3/2 = 2.5 against 3 for the large batch and 1.5 for the small one. In a small model with a large
vocabulary f is large: look at `flops`, where all of it is booked.

Memory: one float32 copy of W per direction, two for the moments. The selection keeps nothing for a backward pass.

## Differences

- The published code draws one z in its constructor; see above.
- Its fast path divides a row's loss by the padded length. Ours divides by the row's valid targets.
- Its budgets can exceed what a source has. Ours are clamped, and the rest is handed out again.
- It perturbs half-precision weights, or adds and subtracts. Here W is never written: e z x is added to the output of
  the layer, in float32, so the weights stay as they are to the bit.
- A row whose proxy is not finite gets similarity -0.95 there. Ours is chosen only when nothing else is left. When no
  row has a proxy, rows are drawn at random, and the step is counted in `colm/fallbacks`.
- t counts the selections that updated m' and v', as their bias correction needs; there, the optimizer's steps.
- Proxies are kept as N x K numbers and K directions, and worked on in pieces; there, as N full matrices.
- The paper's rule for small sources is a list per data set; ours is the share.
- The baseline "longest answer" is left out: packed rows all have the same length.

## Limits

- Memory is saved where a micro-batch would hold all candidates. With `micro_batch_size` the memory of a step does not
  depend on the batch at all: then backward passes are saved, and no memory.
- Rows are what is chosen. A packed row is of one source, but holds several documents.
- Refused: kept sources that leave no room on average, unknown names, a ratio outside (0, 1], an objective without a
  loss per row.
- Not known: how it does without LoRA, at which the paper's figures were taken; whether fixed directions matter there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

from annotated_types import Interval

from lmworks.core.errors import Problem, did_you_mean
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.methods.colm.proxies import History
from lmworks.methods.colm.selector import ColmSelector, candidates_for
from lmworks.model.backbone import Backbone
from lmworks.train.optim import AdamW, Beta, Muon
from lmworks.train.slots import Objective, Optimizer, Selecting, Selector


@final
@dataclass(frozen=True, kw_only=True)
class Colm(Selecting):
    """Train on the rows that stand best for a larger draw: small sources whole, medoids of the others."""

    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of the candidates that is trained on; 1 takes all and does nothing."""
    keep: tuple[str, ...] | None = None
    """Readers of which every row is kept; left out: those with a share of the mixture below 1 / (number of readers)."""
    proxy: Literal["zeroth-order", "exact", "representation", "random"] = "zeroth-order"
    """What stands for a row: a gradient estimated from losses, the true gradient of the matrix, the last hidden state,
    or nothing (rows are drawn at random)."""
    matrix: str = "attn.v_proj"
    """The matrix of the last block whose gradient is looked at."""
    perturbation: Literal["step", "row", "fixed"] = "step"
    """Directions of the estimate: drawn at each step for all rows, for each row apart, or once for the whole run."""
    directions: PositiveInt = 4
    """How many directions are tried; each costs two passes of the last block. It is the rank of the proxies."""
    epsilon: PositiveFloat = 1e-3
    """Length of the step along a direction."""
    normalise: Literal["adam", "none"] = "adam"
    """Compare Adam's updates, or the proxies themselves."""
    betas: tuple[Beta, Beta] | None = None
    """Decay of the proxies' moments; left out: the optimizer's where it is AdamW or Muon, else 0.9 and 0.999."""
    eps: PositiveFloat | None = None
    """Added to the root of the second moment; left out: the optimizer's where it is AdamW or Muon, else 1e-8."""
    masked: bool = True
    """Whether only some values of the matrix are compared: in each source those whose mean over its rows is largest."""
    coordinates: PositiveInt = 2560
    """How many values `masked` leaves."""
    weighted: bool = False
    """Whether a chosen row weighs as many rows as it stands for; otherwise all weigh alike."""
    measure_every: PositiveInt | None = None
    """Steps between measurements of the gradient error, which cost three forward passes over twice the candidates."""

    @property
    def is_gradient(self) -> bool:
        """Whether the proxies are gradients, which Adam's view and the mask are for."""
        return self.proxy in ("zeroth-order", "exact")

    @property
    def uses_history(self) -> bool:
        """Whether moments of the proxies are kept."""
        return self.is_gradient and self.normalise == "adam"

    @property
    def shares_directions(self) -> bool:
        """Whether a few directions serve all rows."""
        return self.proxy == "zeroth-order" and self.perturbation != "row"

    def start(self, model: Backbone, optimizer: Optimizer, sources: Mapping[str, float]) -> Selector:
        """A selector that has chosen nothing yet. Raises UsageError when the last block has no such matrix."""
        betas, eps = (0.9, 0.999), 1e-8
        if isinstance(optimizer, AdamW | Muon):
            betas, eps = optimizer.betas, optimizer.eps
        history = History(betas=self.betas or betas, eps=self.eps or eps)
        return ColmSelector(self, model, tuple(sources), small_sources(sources, self.keep), history)

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Names of readers, room for large sources, and an objective that has a loss for each row."""
        shares: Mapping[str, float] = recipe.data.shares
        unknown = [name for name in self.keep or () if name not in shares]
        for name in unknown:
            text = f"no reader is called '{name}'{did_you_mean(name, shares)} Legal: {', '.join(shares)}"
            yield Problem(path="keep", text=text)
        if not unknown and self.ratio < 1:
            yield from self._room(recipe.batch_size, shares)
        if type(recipe.objective).each is Objective.each:
            text = f"{type(recipe.objective).__name__} has no loss of a single row, which proxies are made from"
            yield Problem(path="proxy", text=text)

    def _room(self, rows: int, shares: Mapping[str, float]) -> Iterator[Problem]:
        drawn = candidates_for(rows, self.ratio)
        kept = {name: drawn * shares[name] for name in shares if name in small_sources(shares, self.keep)}
        if sum(kept.values()) >= rows:
            listed = ", ".join(f"{name} {count:.3g}" for name, count in kept.items())
            smallest = min(kept, key=kept.__getitem__)
            text = (
                f"of {drawn} candidates {sum(kept.values()):.3g} are kept on average ({listed}), and a step trains on "
                f"{rows}: nothing is left for other sources. Name fewer, as in keep = ['{smallest}']"
            )
            yield Problem(path="keep", text=text)


def small_sources(shares: Mapping[str, float], keep: tuple[str, ...] | None) -> frozenset[str]:
    """The readers that are kept whole: those named, or those with less than their even share. One reader: none."""
    if keep is not None:
        return frozenset(keep)
    return frozenset(name for name, share in shares.items() if share * len(shares) < 1 - 1e-9)
