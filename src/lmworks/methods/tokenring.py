"""Context-parallel attention in which keys and values stay, and both directions of the links carry data.

Wang, Liu, Li, Jiang, "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via
Bidirectional Communication", 2024, arXiv 2412.20501.

## What it does

The tokens of a row are divided among the ranks of `cp`. Ring attention passes keys and values from rank to rank and
leaves the other direction of every link idle. Here queries go one way round, and what they found goes straight back
the other way: the same bytes in sum where every query head has keys of its own, half of them on each way.
`layout.use = "tokenring"` divides rows so, among all ranks or `cp` of them. What it picked stands in the run's
`recipe.toml` as a plain `layout` with `context = "tokenring"`.

## How it works

n ranks hold C tokens each, with N query heads and G key/value heads of h values.

**Forward.** In step i, place r works on the queries of place r - i with its own keys and values, passes them on, and
sends what step i - 1 found home. out and lse (the logarithm of the sum of exponentials) of two sets of keys become
one in float32:

    out = out_a + sigmoid(lse_b - lse_a) (out_b - out_a),     lse = log(exp(lse_a) + exp(lse_b))

**Backward.** Keys and values stay again. q, dout, lse and delta = sum(dout * out) go round; with the lse of all keys
each place finds its part of dq, which goes home, and sums its own dk and dv.

**Bytes** of a rank per token, each n - 1 times, in values of activations, and of float32 for sums:

| | one way | the other way |
| --- | --- | --- |
| ring, forward | 2 G h | |
| TokenRing, forward | N h | N h, N sums |
| ring, backward | 2 G h, 2 G h sums | |
| TokenRing, backward | 2 N h, 2 N sums | N h |

So a forward pass is bound by N h against 2 G h. It pays where N < 2 G, changes nothing at N = 2 G, and is worse with
fewer key/value heads: twice as slow for 32 query heads on 8. Such models are refused, with ring attention named.

## When to use it

- Rows too long for one rank, lines between all pairs of ranks that send both ways at once, every query head with keys
  of its own, and a step's sends longer than its products.
- Behind a switch the forward pass gains nothing: what goes forth and what goes back leave by the same port. Its
  backward pass sends less in sum than ring attention's here, whose float32 gradients travel all the way round.
- `heavier = true` where another reason stands above the bytes: keys and values that must not move.
- Elsewhere `layout.context = "ring"`; or `"all-gather"`, the default, when the keys of a whole row fit into memory.
- `python benchmarks/context_links.py` puts the rounds of all engines on a clock, for links of several kinds.
- `lmworks rehearse RECIPE --ranks 4` holds the layout against one process, and its bytes against the table.

## Differences

- The reference has no backward pass of its own; the one here is ours. It is exact: every part of a gradient is found
  with the lse of all keys.
- Partial sums are float32 where they are added. What goes home is rounded once to the type of activations, as there.
- The reference sends only the later half of the queries once they have passed the end of the row (`zigzag`). Here all
  of them travel: the rank that sends most sends as much as before. Products of pairs that do not see each other are
  left out all the same.
- Documents of packed rows and sliding windows are masked; the reference knows causal and full attention.

## Limits

- A result goes home in one hop, which needs links between all ranks. On a plain ring it takes as many as it came.
- Where both directions share one budget (a PCIe switch, half-duplex links), nothing is gained.
- Products of a step are plain PyTorch in float32, on GPUs as well, and write a score for every pair of one rank's
  queries and one rank's keys: exact, and slower than a fused kernel.
- The last results go home when nothing is left to hide them: with long rows, where products hide all else, that is
  what remains, and the forward pass is a little slower than ring attention's.
- With short windows most pairs of ranks do not see each other, and queries travel to them for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import LmworksError, Problem, RecipeError
from lmworks.core.recipe import PositiveInt
from lmworks.parallel.layout import Arrangement, Layout, Order


@final
@dataclass(frozen=True, kw_only=True)
class TokenRing(Arrangement):
    """Rows divided among ranks that pass their queries round; the ranks that are left share the rows (FSDP)."""

    cp: PositiveInt | None = None
    """Ranks that share the tokens of a row. Left out: all there are."""
    order: Order = "zigzag"
    """Which tokens of a row a rank holds, as in a plain layout."""
    heavier: bool = False
    """Pass queries round also where keys and values would be less to send."""

    @property
    def asked(self) -> int | None:
        """`cp`, where it is given."""
        return self.cp

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Models whose queries are heavier than their keys and values, and settings without effect."""
        if self.cp == 1:
            yield Problem(path="cp", text="is 1, which passes nothing round. Leave layout out, or take cp = 2 or more")
        try:
            blocks = recipe.model.blocks()
        except LmworksError:
            return  # told where it is wrong, or a folder that is not there yet
        queries = sum(block.n_heads for block in blocks)
        keys = sum(block.n_kv_heads for block in blocks)
        if queries > 2 * keys and not self.heavier:
            text = (
                f"queries of {queries} heads in all blocks would go round instead of keys and values of 2 x {keys}: "
                f"{queries / (2 * keys):.3g} times as much on the fuller way of a link"
            )
            better = f'layout = {{ cp = {self.cp or "RANKS"}, context = "ring" }}'
            yield Problem(path="", text=f"{text}. Take {better}, or heavier = true")
        elif queries <= 2 * keys and self.heavier:
            yield Problem(path="heavier", text=f"has no effect: {queries} query heads are not more than 2 x {keys}")

    def settle(self, world: int, recipe: Any) -> Layout:
        """cp and dp_shard. Raises RecipeError where cp does not divide the ranks."""
        cp = self.cp or world
        if world % cp:
            legal = ", ".join(str(d) for d in range(2, world + 1) if world % d == 0)
            raise RecipeError([Problem(path="layout.cp", text=f"{cp} does not divide {world} ranks. Legal: {legal}")])
        if cp == 1:
            return Layout(dp_shard=world)
        return Layout(cp=cp, dp_shard=world // cp, context="tokenring", order=self.order)
