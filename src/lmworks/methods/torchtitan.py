"""Parallel axes of PyTorch over one mesh: FSDP first, then tensor, pipeline and context parallel, one on the other.

Liang, Liu, Wright, Constable, Gu, Huang, Zhang, Feng, Huang, Wang, Purandare, Nadathur, Idreos, "TorchTitan: One-stop
PyTorch native solution for production ready LLM pre-training", ICLR 2025, arXiv 2410.06511.

## What it does

A training step is divided over ranks along up to four dimensions that compose: each one is a change of the same model,
made in a fixed order, and leaves the loss as it is. `layout.use = "torchtitan"` picks the degrees by the paper's rules
for as many ranks as there are:

| `dimensions` | axes | ranks of the paper's own runs |
| --- | --- | --- |
| 1 | FSDP | 8 to 128 (8B) |
| 2 | FSDP, tensor | 256 = 32 x 8 (70B) |
| 3 | FSDP, tensor, pipeline | 512 = 8 x 8 x 8 (405B) |
| 4 | FSDP, tensor, pipeline, context | 512, longer rows |

What it picked stands in the run's `recipe.toml` as a plain `layout`, and can be written there by hand as well.

## How it works

**Order.** Each step works on what the one before left:

    build on meta -> pipeline stages -> tensor and sequence parallel -> what blocks keep -> compile -> FSDP -> fill

**Degrees** of n ranks on nodes of g, rows of T tokens:

    tp = g                                    tensor parallel fills a node, with sequence parallelism
    cp = least divisor of the rest with T / cp <= tokens_per_rank
    pp = divisor of the rest nearest to its root, the larger of two; n = 512, g = 8 gives 8
    dp_shard = n / (tp cp pp replicas)        FSDP over what is left; its ranks are those of dp_shard x cp

A pipeline runs interleaved 1F1B with two stages per rank where the model has the blocks, else 1F1B.

**Loss.** The sum over target tokens is divided by their number in the whole step, over all ranks and micro-batches,
counted before the first forward pass. So padding, packing and any split of the rows give the same gradient. Loss and
norm are checked on all ranks before anything is updated.

**Convergence protocol.** A layout is right when its loss is that of FSDP alone, with the tokens of a step, the data's
order and the first weights as they were. `lmworks prove torchtitan` runs it. The paper's seed checkpoint, made by one
process and loaded by all, is not needed: first weights are drawn by parameter name, so every rank draws its own part
of the same model.

## When to use it

- *1-D* until the exchanges of FSDP no longer hide behind the work, at some hundred GPUs.
- *2-D*: tensor parallel within a node divides the ranks of FSDP by 8, and the activations too.
- *3-D*: a pipeline sends least, so it goes across nodes. It wants micro-batches, several times `pp`.
- *4-D*: context parallel when the rows are too long for a rank.
- `lmworks rehearse RECIPE --ranks 512` runs the structure of what was picked on this machine.
- Learning rate and batch stay as they are.

## Differences

- Tensor and context parallelism are lmworks' own collectives on plain tensors and not DTensors (docs/decisions);
  FSDP2 and the pipeline schedules are torch's. Checkpoints are safetensors and not DCP.
- The paper gives degrees of its runs and no rule for cp and pp: the root, and the bound on tokens per rank, are ours.
  The bound is from the maintainers' table of 8B with context parallel (32 768 tokens a rank fit on an H100).
- Float8 and asynchronous tensor parallelism need GPUs with them and are not here yet.
- Its loss in a pipeline was once not normalised, its token count once wrong under context parallelism, its bias once
  multiplied by tp, and so on: every such error that its users reported has a test here.

## Limits

- The paper's speed-ups are on H100s. The maintainers' later table has smaller ones for the same rows, so both are
  claims here; none can be seen on a CPU.
- The paper's memory columns and micro-batch settings of its 3-D runs are not known here.
- Degrees are picked by count. Whether the model fits is not asked: rehearse, and see the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import LmworksError, Problem, RecipeError
from lmworks.core.recipe import PositiveInt
from lmworks.parallel.layout import Arrangement, Layout


@final
@dataclass(frozen=True, kw_only=True)
class TorchTitan(Arrangement):
    """One to four dimensions over as many ranks as there are."""

    dimensions: Literal[1, 2, 3, 4] = 1
    """FSDP; with tensor; with pipeline; with context parallel."""
    ranks_per_node: PositiveInt = 8
    """Ranks that fast links join: the degree of tensor parallelism."""
    replicas: PositiveInt = 1
    """Copies of the sharded model (HSDP), where the ranks of one FSDP group would be too many."""
    tokens_per_rank: PositiveInt = 32_768
    """The most tokens of a row on one rank, from which the degree of context parallelism follows."""

    @property
    def asked(self) -> None:
        """It takes as many as there are."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that the dimensions have no use for."""
        if self.dimensions == 1 and self.ranks_per_node != 8:
            yield Problem(path="ranks_per_node", text="has no effect with dimensions = 1: nothing stays in a node")
        if self.dimensions < 4 and self.tokens_per_rank != 32_768:
            yield Problem(path="tokens_per_rank", text="has no effect with dimensions below 4: rows are not divided")

    def settle(self, world: int, recipe: Any) -> Layout:
        """The degrees of the page. Raises RecipeError for ranks that a dimension does not divide."""
        left = self._rest(world, self.replicas, "replicas")
        tp = self.ranks_per_node if self.dimensions >= 2 else 1
        left = self._rest(left, tp, "ranks_per_node")
        cp = self._context(left, recipe.data.sequence_length) if self.dimensions == 4 else 1
        left //= cp
        pp = nearest_to_root(left) if self.dimensions >= 3 else 1
        interleaved = pp > 1 and _blocks(recipe) >= 2 * pp
        return Layout(
            pp=pp,
            dp_replicate=self.replicas,
            dp_shard=left // pp,
            cp=cp,
            tp=tp,
            sequence_parallel=tp > 1,
            schedule="interleaved-1f1b" if interleaved else "1f1b",
        )

    def _rest(self, ranks: int, degree: int, setting: str) -> int:
        if ranks % degree:
            legal = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
            text = f"{degree} does not divide {ranks} ranks. Legal: {legal}"
            raise RecipeError([Problem(path=f"layout.{setting}", text=text)])
        return ranks // degree

    def _context(self, ranks: int, length: int) -> int:
        """The least divisor of the ranks with which no rank has too many tokens of a row."""
        for degree in range(1, ranks + 1):
            if ranks % degree == 0 and length <= degree * self.tokens_per_rank:
                return degree
        text = f"rows of {length} tokens on {ranks} ranks make {-(-length // ranks)} each. Legal: that, or more"
        raise RecipeError([Problem(path="layout.tokens_per_rank", text=text)])


def nearest_to_root(number: int) -> int:
    """The divisor of a number nearest to its root by ratio, the larger of two."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (max(d * d / number, number / (d * d)), -d))


def _blocks(recipe: Any) -> int:
    """Blocks of the model; 0 when they cannot be told yet, as for a folder that is not there: told where it is read."""
    try:
        return len(recipe.model.blocks())
    except LmworksError:
        return 0
