"""The next mixture to try, and the size of model to try it on, by what that says of the best mixture per unit of cost.

"ADMIRE-BayesOpt: Accelerated Data MIxture RE-weighting for Language Models with Bayesian Optimization". 2025.

## What it does

Which share of each source is best for a large model, found with few runs of it. Each run so far, small or large, is
learnt from; the next one is the mixture and the size that tell most for what they cost. In the end the mixture with the
best expected target at the target's size is recommended, with its spread, and a flag until a run has verified it.

    search = { use = "admire-bayesopt", budget = 6.0 }

in a recipe of `lmworks mix` ([guide](../guides/mix.md)). `budget` is in runs of the target's size.

| symbol | meaning |
| --- | --- |
| p | a mixture: shares of M sources |
| s | a size, as its cost over that of the target's size; the target's is 1 |
| y | minus the target, of a run; scaled |
| f(p, s) | what is learnt: a Gaussian process |
| f* | the largest f(p, 1) of all mixtures |

## How it works

1. *Start* with `starts` random runs of the smallest size.
2. *Fit* f, anew for every run: its numbers are those that make the results and their priors likeliest. k_u and k_b are
   Matern 5/2 kernels on the square roots of shares, with a length for each source and priors Gamma(3, 6) and
   Gamma(6, 2).

       linked      k = g_s g_s' (r_s r_s' k_u + sqrt((1 - r_s^2)(1 - r_s'^2)) k_b),    r = g = 1 at the target's size
       truncated   k = k_u(p, p') + (1 - s)(1 - s')(1 + s s')^w k_b(p, p'),            w ~ Gamma(3, 3)

   g is the spread of a size over the target's, r its correlation with it. Each size also has a level of its own.
3. *Score* thousands of mixtures at all sizes: the information that y(p, s) gives on f*, in nats, over the cost. f* is
   drawn `maxima` times by a Gumbel distribution over the mixtures at the target's size. With gap = (f* - u) / sd of the
   mixture at the target's size, and c the correlation of that with the noisy result,

       I = E[r log r] + c^2 gap h / 2,    r(z) = Phi((gap - c z) / sqrt(1 - c^2)) / Phi(gap),    h = phi / Phi at gap

   over normal z. An exact result at the target's size has gap h / 2 - log Phi(gap), max-value entropy search.
4. *Run* the best one, after steps uphill along the gradient within the bounds. A run of the target's size is due when
   small ones have cost `large_every` of it or are `large_after` in number.
5. *Drop* a size whose results correlate less than `least_agreement` with the target's, in draws of what is believed:
   no more of its runs are made, and those there are do not count.
6. *Stop* when the budget is spent, when one more large run is expected to gain less than `least_gain`, or when mixtures
   cannot be told apart: they differ by less than twice what seeds do.

With `together` above 1 runs are asked for in batches: each counts on those under way giving what is expected of them.
`by = "improvement"` buys runs of the target's size alone, by the log of expected improvement, with the same process;
results of smaller runs still count where there are any. Nothing is kept but the table of runs: a search that was killed
goes on, and asks the same for the same table and seed.

The paper's settings: `kernel = "truncated"`, `inputs = "share"`, `standardise = "all"`, `starts = 1`, `large_every` and
`large_after` left out, `least_agreement = -1`.

## When to use it

- When a run of the target's size, or near it, can be paid several times. When it can be paid once, learn from small
  runs in one go: `use = "regmix"`.
- `by = "improvement"` where sizes are known not to agree: it needs no agreement.
- `by = "entropy"` where small runs are cheap and sizes agree. On RegMix's table, where 1M and 60M parameters do, it
  found the best of 48 mixtures for 4.1 large runs, improvement for 7.4, random runs for 24.5; with the paper's settings
  it bought small runs alone and did not find it (`benchmarks/admire_replay.py`, means of five seeds).
- Live, of 40 mixtures that were all trained (`benchmarks/admire_live.py`, five searches each). Five sources, smaller
  sizes that correlate 0.90 and 0.91 with the largest: the best mixture was found for ten large runs in 5 searches, for
  five in 1; by improvement in 3 and 3, with the paper's settings in 5 and 5, by the one-shot regression in none. Three
  sources, sizes that correlate 0.77 and 0.81: in 5 and 1; by improvement in 5 and 1, with the paper's settings in none.
  Large runs are wasted where sizes agree, and are what is needed where they do not; the default buys both.
- Give `noise`, from three runs of one mixture, so that the search can end when there is nothing to find.
- Costs should be seconds or FLOPs that were measured, tokens included: parameters alone make a small model's run of
  fewer tokens look dear.

## Differences

- The published code recommends by the score of the next run; here by the mean, at the target's size.
- It draws f* over mixtures that were tried, one at first; here over all candidates.
- It has no rule that buys large runs, and buys small ones alone where they are cheap.
- Its small sizes follow the large one by their cost: the truncated kernel gives a size that says nothing a correlation
  of about 0.7. Linked sizes have a correlation each, which is learnt.
- Results are centred for each size: losses of small models are nats away from those of large ones.
- The information is summed by quadrature, not sampled, so scores have no noise but that of f*.
- What is to be bettered, with `by = "improvement"`, is the best expected value of a run that was made, not the best
  measured one.
- `engine = "botorch"` fits the truncated kernel by BoTorch's `SingleTaskMultiFidelityGP`; the rest is the same code.

## Limits

- A process of N runs takes N^3: hundreds of runs, not thousands.
- The Gumbel distribution takes mixtures for independent, so f* is drawn too high while little is known.
- Where small runs are noise alone, they cost what they cost, and mislead for a while: on a single toy of that kind the
  search may take twice what large runs alone do, over twenty no more than the small runs cost (a test). Take
  `by = "improvement"` where that is known.
- With few large runs agreement is hardly known, and a size may be dropped that agrees: in a search of three sources it
  was put at -0.3 +- 0.4 after six, where 40 runs show 0.8. The warning tells the deviation; more budget mends it.
- The target is one number. Several losses are weighted into it.
- Where the fit fails, a log-linear law on resampled runs stands in, and the recommendation says so.
- Cheap runs say which mixtures are good, seldom which is best: the last step takes large runs.
- The paper's speed-up (more than 500 %) is on tables of its own, whose licence keeps them out of here.
"""

from lmworks.methods.admire_bayesopt.part import AdmireBayesOpt

__all__ = ["AdmireBayesOpt"]
