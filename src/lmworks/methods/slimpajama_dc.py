"""One cleaned corpus without near copies, in mixtures of its sources that can be held against each other.

Shen, Tao, Ma, Neiswanger, Liu, Wang, Tan, Hestness, Vassilieva, Soboleva, Xing, "SlimPajama-DC: Understanding Data
Combinations for LLM Training", 2023, arXiv 2309.10818. Pipeline: Soboleva, Al-Khateeb, Myers, Steeves, Hestness, Dey,
"SlimPajama: A 627B token cleaned and deduplicated version of RedPajama", 2023, and its code in Cerebras' modelzoo.

## What it does

It asks two questions of a corpus of several sources: whether copies that cross sources matter, and which shares of the
sources train best. So it has a pipeline whose deduplication is one switch, seven named mixtures, and a few measures.

| what | where |
| --- | --- |
| the pipeline, with its own numbers | `recipes/data/slimpajama.toml`: `lmworks data slimpajama` |
| copies over all sources, or within each | `scope = "global"`, `"per-source"` of the stage `dedup` |
| training on what a pipeline leaves | the reader `cleaned` |
| mixtures DC-1 to DC-7 | `data.mixture = "dc-6"` (`recipes/mixtures/`) |
| how often a source may be read | `data.most_epochs` |
| a clean side to validate on, by source | `data.held_out`; `val_loss/NAME`, `val_loss/mean` |
| how far sources lie apart | `lmworks audit sources RECIPE` |
| weight decay in phases (PTWD) | `schedule.use = "ptwd"` |
| risk of random guessing (RRGS) | `maths.stats.risk_of_guessing` |

## How it works

**Pipeline**, in this order:

1. `repair`: mojibake undone, Unicode NFC (ftfy).
2. `length`: plain(s) is s in lower case, without ASCII punctuation, every run of white space one blank. Documents with
   fewer than 200 plain characters are dropped.
3. `dedup`: the set of all 13-grams of *characters* of plain(s), 128 permutations, 9 bands of 13 rows. Two documents are
   the same when one whole band agrees. At a Jaccard similarity s that has the chance

       P(s) = 1 - (1 - s^13)^9          P(0.7) = 0.08   P(0.8) = 0.40   P(0.9) = 0.93   P(0.95) = 0.998

   (9, 13) is the pair nearest to a step at 0.8: it misses three pairs of five there, and half at 0.84. Nothing is
   verified. Documents that hang together are a cluster, of which one stays: of the source that `prefer` names first,
   then the longest, then the one whose source and id come first.
4. `split`: 0.17 % to validate on, 0.17 % to test on. Equal texts are on one side. What equals a document of
   `data.held_out` is not trained on.

**Mixtures**, per cent of the rows:

| source | DC-1 | DC-2 | DC-3 | DC-4 | DC-5 | DC-6 | DC-7 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| commoncrawl | 100 | 90.9 | 75.8 | 75.8 | 75.8 | 52.2 | refinedweb 100 |
| c4 | | | | | | 26.7 | |
| github | | 9.1 | 24.2 | | 9.1 | 5.2 | |
| books | | | | | 7.9 | 4.2 | |
| arxiv | | | | | | 4.6 | |
| wikipedia | | | | 24.2 | 7.3 | 3.8 | |
| stackexchange | | | | | | 3.3 | |

Names are those of the readers. A source without a reader, or a reader without a share, is an error: nothing is scaled
to fit. A run that would read a source more often than `most_epochs` is refused, with how often it would.

**Audit.** With c the counts of V tokens in a source, n their sum and a the smoothing (1):

    p_v = (c_v + a) / (n + a V)          KL(p || q) = sum over v of p_v log2(p_v / q_v)          in bits

**PTWD.** Weight decay is the optimizer's times the factor of the phase; with 0.1, the paper's 0, 0.5, 0.1 are

    factors = [0, 5, 1]          phase i begins at round(starts[i] steps)          starts = [0, 1/3, 2/3]

It is a pure function of the step, so a resumed run goes on with it. metrics.jsonl gets `weight_decay`.

**RRGS** of accuracies s_i of N tests with four choices:  1 - 1/N sum |s_i - 1/4|. 1 is guessing, 1/4 is all right.

## When to use it

- `global` wherever sources may quote each other; `per-source` to see what that changes. The report has a matrix of who
  holds copies of whom, and `tables/` every cluster.
- Mixtures are compared at equal tokens, on a held-out side that is the same for all, by `val_loss/mean`, in which every
  source counts alike. Training loss does not rank them: a mixture of easy text has a low one.
- `most_epochs = 4` for real runs: small sources in a fixed mixture are soon read many times.
- PTWD was made for large batches, in which weight decay acts seldom. With small ones compare it with `cosine` first.
- `prefer` names sources whose copies are kept before others', those that are worth most first.

## Differences

- The reference keeps whichever copy a Python set gives first. Here order, workers and hash seeds change nothing.
- There, documents without a 13-gram are one large cluster; here each is the same as its exact copies only.
- Signatures are rensa's, not datasketch's: other hashes, the same curve (a test holds it against the formula).
- Documents are not shuffled on disk. The loader draws documents and rows of every source in an order of its own each
  epoch, of which the reference's two passes over twenty piles are an approximation; sources take turns by share.
- Hold-outs are drawn by a hash of the text, so a source gives 0.17 % of its documents on average, and a document never
  changes sides. There, a fraction of every pile is taken, and equal texts are taken out afterwards.
- Bytes that are not UTF-8 are told: left out with a reason, or mended and counted (`broken = "mend"` of a reader).
- The paper does not say how long PTWD's phases are, nor how its KL matrix is smoothed. Thirds, and 1, are ours.
- The mixtures' figures were noted from the paper and not re-read. They agree with the shares of bytes that the
  published counts leave; DC-5 comes to 100.1.

## Limits

- The paper's models (1.3B and 7B parameters, 330B tokens) are beyond the proof: a third of a million parameters, bytes.
- dc-1 to dc-7 need readers called by the sources' names; the corpora are not brought along.
- 13-grams of characters see copies, not paraphrases: `key.use = "embedding"` does.
- PTWD multiplies the weight decay of what is decayed at all; an optimizer without any is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction, NonNegativeFloat, Slot
from lmworks.train.schedule import Cosine, Schedule


@final
@dataclass(frozen=True, kw_only=True)
class Ptwd(Schedule):
    """Progressive training on weight decay: another schedule's learning rate, and weight decay in phases."""

    rate: Annotated[Schedule, Slot("schedule")] = Cosine()
    """How the learning rate moves."""
    factors: tuple[NonNegativeFloat, ...] = (0.0, 5.0, 1.0)
    """What the optimizer's weight decay is multiplied by, phase by phase: the paper's 0, 0.5, 0.1 for one of 0.1."""
    starts: tuple[Fraction, ...] = (0.0, 1 / 3, 2 / 3)
    """Part of the run after which each phase begins; the first is 0."""

    def factor(self, step: int, steps: int) -> float:
        """The other schedule's."""
        return self.rate.factor(step, steps)

    def weight_decay(self, step: int, steps: int) -> float:
        """The factor of the last phase that has begun."""
        begun = [
            factor for start, factor in zip(self.starts, self.factors, strict=True) if step >= round(start * steps)
        ]
        return begun[-1]

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Phases in order, each with a step, and a weight decay that they can multiply."""
        if len(self.factors) != len(self.starts) or not self.factors:
            text = f"{len(self.factors)} factors and {len(self.starts)} starts: every phase has one of each"
            yield Problem(path="factors", text=text)
            return
        begins = [round(start * recipe.steps) for start in self.starts]
        if begins[0] != 0:
            yield Problem(path="starts", text=f"the first phase begins with the run, at 0, not at {self.starts[0]:g}")
        if any(later <= earlier for earlier, later in pairwise([*begins, recipe.steps])):
            text = f"the phases begin at the steps {begins} of {recipe.steps}: each needs one of its own, in order"
            yield Problem(path="starts", text=text)
        if len(set(self.factors)) == 1:
            yield Problem(path="factors", text="are all alike: set optimizer.weight_decay, and leave the phases out")
        if getattr(recipe.optimizer.core(), "weight_decay", 0.0) == 0:
            yield Problem(path="factors", text="have no effect: optimizer.weight_decay is 0")
        if isinstance(self.rate, Ptwd):
            yield Problem(path="rate", text="is in phases of weight decay itself, which would have no effect")
