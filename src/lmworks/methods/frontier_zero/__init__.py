"""Each kind of state is shared by as many ranks as the links between them bear, and what travels is block codes.

"Scaling Large Language Model Training on Frontier with Low-Bandwidth Partitioning", 2025, arXiv 2501.04266 (ZeRO-topo).
It stands on "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023, arXiv 2306.10209,
and is measured against it.

## What it does

ZeRO-3 divides weights, gradients and optimizer state among all ranks, and every micro-batch goes over the network
three times. A cluster has faster links: two dies of a package, the eight of a node. Here weights are shared by a pair,
gradients by a node, optimizer state by all: micro-batches stay inside the node, and the network is used once a step.
`layout.use = "frontier-zero"` picks these degrees for as many ranks as there are. What it becomes stands in the run's
`recipe.toml` as a plain `layout` with a `state`. Its rival is a plain part: `layout.use = "zero++"` leaves all states
with all ranks, as ZeRO-3 does, and has ZeRO++'s three switches.

| symbol | meaning | setting |
| --- | --- | --- |
| s_w | ranks that share the weights | `layout.pair` (2) |
| s_g | ranks that share the gradients | `layout.node` (8) |
| s_o = N | ranks that share the optimizer's state | all |
| s_2 | ranks that share a second, int8 copy of the weights | `layout.secondary` (none) |
| P, M = 2 P | parameters; bytes of one gather of them in bf16 | the model |
| ga | micro-batches of a step | `batch_size`, `micro_batch_size` |

## How it works

**Block codes.** A tensor is cut in blocks of `block` values with a scale each; 256 by default:

    s = max |x| / 127 (int8) or / 7 (int4),     code = round(x / s),     |x - s code| <= s / 2

On normal values the error is 0.7 % (int8) and 13 % (int4) of root mean square; 0.8 and 15 % with blocks of 2048. So
weights travel as int8, gradients as int4, and sums are float32. A block of zeros is exact; one with a NaN comes out as
NaN and stops the step on all ranks.

**ZeRO++**, against ZeRO-3's 3 M over the network for every micro-batch:

- `qwz`: the gather of weights as int8, M / 2. The part that a rank steps stays float32, so no error adds up.
- `hpz`: a second copy of what the forward pass gathered, shared inside the node, serves the backward pass: no network,
  2 P / s_2 bytes more. Every forward pass makes it anew.
- `qgz`: the sum of gradients in two hops of int4, M / 4: all-to-all inside the node, sum, codes again, all-to-all
  across nodes. Rank (node j, place i) shall end with slice j n + i, so slices are reordered before hop 1. A value is
  coded twice, however many ranks there are.

**ZeRO-topo.** s_w divides s_g divides s_o, and a finer part is a slice of the coarser one.

1. For each micro-batch: weights are gathered over the pair, twice; gradients are summed over the pair and then over
   the node, as int4, into a buffer of 1 / s_g. None of it leaves the node.
2. Once a step: the buffers are summed across nodes, so that each rank has 1 / N; the optimizer steps its 1 / N;
   weights come back across nodes to the pairs' halves.

**Memory** of a rank in mixed precision, and seconds of communication with nothing hidden, for Nn nodes whose links move
net bytes a second per node, link per rank inside a node and pair inside a pair (`cost.py`):

    bytes      2 P / s_w + P / s_2 + 2 P / s_g + 12 P / s_o
    flat(b)    max(b (1 - 1/Nn) / net, b / link)
    ZeRO-3     ga 3 flat(M)
    ZeRO++     ga (flat(M/2) + 7/8 M / link + 7/8 M/4 / link + (1 - 1/Nn) M/4 / net)
    topo       ga (M/2 / pair + 7/8 M/2 / link + 7/8 M/4 / link) + 2 (1 - 1/Nn) M / net + (1/2 - 1/8) M / link

20 billion parameters on 48 nodes of 8 (pair 200, link 50, net 100 GB/s): 28.1 GB with s_2 = 8, where ZeRO-3 needs
0.83, ZeRO++ 5.8 and ZeRO inside the node 40. Seconds for ga = 1, 2, 4, 8:

| | 1 | 2 | 4 | 8 | ga = 8 with net 25 |
| --- | --- | --- | --- | --- | --- |
| ZeRO-3 | 2.4 | 4.8 | 9.6 | 19.2 | 37.6 |
| ZeRO++ | 1.4 | 2.7 | 5.5 | 11.0 | 16.4 |
| ZeRO-topo | 1.7 | 2.3 | 3.6 | 6.1 | 8.4 |

**So it needs accumulation**: topo has moved its traffic to the step, and is behind ZeRO++ with one micro-batch. It
breaks even between 1 and 2 here, between 2 and 3 with net 25 (`break_even`).

**Error feedback** (`feedback`, after LoCo): what a hop's codes missed of a gradient is kept, in int8, and that share of
it is added to what is coded next.

## When to use it

- Many ranks over a slow network, several micro-batches a step, and a model whose weights fit in a pair: 2 P / s_w is
  the bound. A model that is above `memory_gib` is refused with the sum, and `pair` twice as large is named.
- ZeRO++ where weights do not fit so, or with one micro-batch a step.
- Neither inside one node, or where the network is as fast as the links of a node: codes cost time and rounding.
- `lmworks rehearse RECIPE --ranks 8` holds the layout against one process, with everything sent plain, and its bytes
  against the formulas.

## Differences

- The paper's body could not be read here: degrees (2, 8, N) are from memory and agree with its three levels; which
  collectives it codes at which level, its s_2, micro-batches and accumulation are not known. The formulas are ours.
- The sum inside the node has two hops here, pair and then node, since FSDP sums over the ranks that share weights.
- Gradients are kept and summed in float32, where the formula above has 2 bytes: 4 P / s_g.
- Weights come back across nodes in the type they are used in, not as codes.
- DeepSpeed sends vectors, and what its ranks do not divide, as they are, and tells of it in a warning. Here everything
  is coded, and no two tensors share a block: a norm beside a matrix would take its digits.
- DeepSpeed adds int4 in half precision. Its copy of hpZ could be read before it was whole; here both are in one order.
- LoCo keeps a moving average of errors; here it is a share of the last one. LoCo's reset is at 1024 sums.

## Limits

- The paper's figures (1.71 times ZeRO++ and 2.40 times ZeRO-3 per GPU, 0.94 from scaling) are from 384 dies of MI250X.
  Here they are modelled: for 8 micro-batches, which is assumed, and one fitted factor, 0.385 s of bare computing in
  each, the formulas give 1.53 and 2.43. They give 0.99 for scaling from 8 nodes to 48: nothing in them waits.
- int4 keeps 15 levels a block, so where few values are large the others become zero. Adam scales each value by its own
  history and feels that most in the token table, where frequent and rare tokens are neighbours: blocks much wider than
  a row of it cost loss at toy size.
- On a GPU codes are made by kernels that have run in Triton's interpreter only, elsewhere by plain PyTorch.
- What error feedback remembers takes a byte for every value that a hop sends, beside the gradients. Checkpoints keep
  it for the layout that made them; under another one it begins anew, which a note tells.
- Pairs, nodes and ranks must divide each other. Where nodes are uneven the run falls back to ranks that share all
  states in groups that nodes hold whole (HSDP), which a note tells, and never to sharing among all.
- Ranks are data-parallel only; with tp, cp or a pipeline, write the `state` into a plain layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import LmworksError, Problem, RecipeError
from lmworks.core.recipe import Fraction, PositiveFloat, PositiveInt
from lmworks.maths.whole import legal_divisors
from lmworks.parallel.footprint import BYTES, vocabulary_of
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.parallel.state import BLOCK, StatePlacement
from lmworks.parallel.zeropp import must_be, note_of, whole_nodes


@final
@dataclass(frozen=True, kw_only=True)
class FrontierZero(Arrangement):
    """Weights shared by pairs, gradients by nodes, optimizer state by all ranks."""

    ranks: PositiveInt | None = None
    """Ranks. Left out: as many as there are."""
    pair: PositiveInt = 2
    """Neighbours with the fastest links: they share the weights."""
    node: PositiveInt = 8
    """Ranks of a node: they share the gradients. All ranks, where there are no more."""
    secondary: Literal["pair", "node"] | None = None
    """Who shares a second copy of the weights in int8, which the backward pass reads. Left out: no copy."""
    weights_as: Literal["plain", "int8"] = "plain"
    """In what weights travel inside the pair."""
    gradients_as: Literal["plain", "int4", "int8"] = "int4"
    """In what gradients travel inside the node, with every micro-batch."""
    block: PositiveInt = BLOCK
    """Values that share a scale."""
    feedback: Fraction = 0.0
    """Share of what codes missed of a gradient that is added to the next one; 0 is off."""
    memory_gib: PositiveFloat = 59.6
    """What a rank has for weights, gradients and optimizer state, GiB. A die of an MI250X has 64 GB."""

    @property
    def asked(self) -> int | None:
        """`ranks`, where they are given."""
        return self.ranks

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Pairs that do not divide nodes, and settings without effect."""
        if self.pair == 1 and self.weights_as != "plain":
            yield Problem(path="weights_as", text="has no effect: with pair = 1 weights do not travel to a block")
        if self.pair == 1 and self.secondary is not None:
            yield Problem(path="secondary", text="has no effect: with pair = 1 nothing is gathered to copy")
        if self.feedback and self.gradients_as == "plain":
            yield Problem(path="feedback", text="has no effect with gradients_as = 'plain', which rounds nothing off")
        if self.node % self.pair:
            text = f"{self.pair} does not divide node = {self.node}. Legal: {legal_divisors(self.node)}"
            yield Problem(path="pair", text=text)

    def settle(self, world: int, recipe: Any) -> Layout:
        """The plain layout. Raises RecipeError for other ranks than `ranks`, and for state above `memory_gib`."""
        must_be(world, self.ranks)
        if world == 1:
            return Layout(dp_shard=1)
        if self._uneven(world):
            return whole_nodes(world, self.node)
        node = min(self.node, world)
        second = {None: None, "pair": self.pair, "node": node}[self.secondary]
        self._fits(world, node, second, recipe)
        state = StatePlacement(
            weights=self.pair,
            gradients=node,
            levels=tuple(size for size in dict.fromkeys((self.pair, node)) if 1 < size < world),
            secondary=second,
            secondary_as="plain" if second is None else "int8",
            weights_as=self.weights_as,
            gradients_as=self.gradients_as,
            block=self.block,
            feedback=self.feedback,
        )
        return Layout(dp_shard=world, state=state)

    def notes(self, world: int, recipe: Any) -> list[str]:
        """What uneven nodes make of it."""
        why = f"pairs of {self.pair} in nodes of {self.node}"
        return [note_of(whole_nodes(world, self.node), why=why)] if self._uneven(world) else []

    def _uneven(self, world: int) -> bool:
        node = min(self.node, world)
        return world > 1 and (world % node > 0 or node % self.pair > 0)

    def _fits(self, world: int, node: int, second: int | None, recipe: Any) -> None:
        """The bound of the method: a pair holds all weights."""
        try:
            values = parameters(recipe)
        except LmworksError:
            return  # told where it is wrong, or a folder that is not there yet
        used = 4 if recipe.precision == "fp32" else 2
        parts = {
            f"weights / {self.pair}": used * values / self.pair,
            "second copy": values / second if second is not None else 0.0,
            f"gradients / {node}": 4 * values / node,
            f"float32 weights and moments / {world}": 12 * values / world,
        }
        if (total := sum(parts.values()) / 2**30) <= self.memory_gib:
            return
        told = " + ".join(f"{name} {size / 2**30:.3g}" for name, size in parts.items() if size)
        wider = 2 * self.pair
        better = f"pair = {wider}" if node % wider == 0 else 'layout.use = "zero++", which shares weights among all'
        text = f"a rank would hold {total:.3g} GiB ({told}), above {self.memory_gib:g}. Take {better}"
        raise RecipeError([Problem(path="layout.memory_gib", text=text)])


def parameters(recipe: Any) -> int:
    """P of a recipe's model; its vocabulary is the tokenizer's, as far as that tells it."""
    shape = getattr(recipe.model, "shape", recipe.model)
    if shape.vocab_size is None:
        shape = shape.with_vocab(vocabulary_of(recipe) or BYTES)
    found: int = shape.cost(sequence=recipe.data.sequence_length, bytes_per_value=4).parameters
    return found
