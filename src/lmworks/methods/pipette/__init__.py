"""A layout for the links that are there: every pair of machines is measured, plans that do not fit are left out, the
rest are timed, and machines are placed so that a step's sends take least.

Jinkyu Yim, Jaeyong Song, Yerim Choi, Jaebeen Lee, Jaewon Jung, Hongsun Jang, Jinho Lee. "Pipette: Automatic
Fine-grained Large Language Model Training Configurator for Real-World Clusters". DATE 2024, arXiv 2405.18093.

## What it does

Links of a cluster are equal on paper and differ in fact. `lmworks probe` measures them; `layout.use = "pipette"` picks
pipeline, tensor and data parallelism for as many ranks as there are, and which machine holds which stage of which
pipeline. What it picked stands in the run's `recipe.toml` as a plain `layout`, with `machines` in the order of ranks.

    lmworks probe --local 4 --ranks-per-machine 1 --out links.json
    layout = { use = "pipette", profile = "links.json", memory_gib = 64 }

| symbol | meaning |
| --- | --- |
| G, g | machines, and ranks of each |
| p, t, d | ranks of a pipeline, of tensor and of data parallelism; p t d = G g |
| b, m | rows of a micro-batch, micro-batches of a step on a pipeline |
| f, w | seconds of a micro-batch forward and backward in the dearest stage |
| bw[i][j] | bytes per second from machine i to machine j, for each rank while all ranks of i send |

## How it works

1. *Measure*: a tournament, in which every machine sends to every other one, alone ([probe](../guides/probe.md)).
2. *List*: p divides G, t divides g, and whatever else a layout must (heads, rows, blocks).
3. *Leave out* what does not fit: weights, gradients and optimizer state to the byte, what waits for the backward pass
   by the policy of blocks and min(p - rank, m) micro-batches, logits, workspace, on the rank that takes most.
4. *Time*. 1F1B keeps p micro-batches under way, so the first rank waits for a way there and back once for every p
   micro-batches: the critical path that earlier models miss.

       m >= p    T_pipe = m / p (p (f + w) + C) + (p - 1)(f + w)
       m < p     T_pipe = p (f + w) + C + (m - 1)(f + w)
       C = max over pipelines of the sum over its links, both ways, of S / bw,   S bytes from stage to stage
       T = T_pipe + T_in + T_out,   gradients summed in rings of d_in ranks inside a machine, d_out machines between

5. *Place*: simulated annealing over the orders of machines, by five moves (a segment reversed; a machine moved; two
   swapped; a segment moved; moved and reversed), T from 1 down by 0.999 a move. What is worse by x is taken with
   probability exp(-x' / T), x' being x without its power of ten. Up to six machines all orders are tried.
6. *Rank* by T, then run the best `simulated` ones of them on the clock of `parallel.timeline`, link by link, stage by
   stage; the shortest is taken.

`plans` gives all of it: plans with their times, and refusals with their reasons; it varies b as well where it is told
to. `ready` makes a recipe of a plan.

## When to use it

- Several machines, links that differ, and a model that needs pipelines: placement moves C and the rings, nothing else.
- Measure before a long run, on the machines of the run. A probe of 16 machines takes 15 rounds of some seconds.
- `benchmarks/pipette_regret.py` shows on made-up clusters what each step of it is worth.
- With links that are known to be alike leave `profile` out and say what they carry: then it is a rule like Megatron's,
  and machines stay in order.
- `layout.use = "megatron"` asks for nothing but memory; `"torchtitan"` for nothing at all.

## Differences

- The paper's code takes m / p without its fraction, which makes a last round that is not full free. Here it counts;
  `plan.latency` has both forms.
- The paper places by C + T_in + T_out; here C counts m / p times, as it does in T, so the search shortens T itself.
- The paper's exchange of gradients is that of the first stages' machines; here the slowest stage's ring counts.
- A link's two ways count each by its own bandwidth; the paper takes one of them twice.
- Parameters are counted exactly; the paper's code takes h V + 12 or 16 h^2 a layer. Latency of a link counts.
- f and w follow from FLOPs over a rate, that of matrix products in the profile, and from what tensor parallelism sends
  inside a machine. The paper fits networks to measured steps. `flops` sets another rate: products alone are faster than
  blocks, which makes links look slower than they are.
- Memory is told from sizes. The paper's network on eleven numbers is `plan.memory.Network`, for comparison.
- The search ends after `moves` moves and not after seconds, so that all ranks find the same.

## Limits

- Machines are placed, not GPUs; a pipeline's stage takes whole machines, so one machine has no pipeline.
- Gradients are taken to be exchanged after the last backward pass, and optimizer steps to take no time.
- The rows of a micro-batch are the recipe's. With compiled blocks memory is told as if they were not.
- The rule reads settings: on a machine without the run's GPU say `device = "cuda"`, or memory is a CPU's.
- The paper's speed-ups are on up to 128 GPUs, and cannot be seen here.
"""

from lmworks.methods.pipette.part import Pipette
from lmworks.methods.pipette.plans import Plan, Refusal, plans, ready

__all__ = ["Pipette", "Plan", "Refusal", "plans", "ready"]
