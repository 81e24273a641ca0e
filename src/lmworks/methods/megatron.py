"""Tensor, pipeline and data parallelism in one layout, an interleaved pipeline, and arithmetic to choose the degrees.

Narayanan, Shoeybi, Casper, LeGresley, Patwary, Korthikanti, Vainbrand, Kashinkunti, Bernauer, Catanzaro, Phanishayee,
Zaharia, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021, arXiv 2104.04473.

## What it does

Three ways to divide a training step are used at once, each where the links bear it: tensor parallelism within a
server, a pipeline between servers, data parallelism over what is left. A pipeline whose ranks hold several stages each
waits less. Closed formulas say what a layout costs before anything runs. `layout.use = "megatron"` picks the degrees by
the paper's rules for as many ranks as there are.

| symbol | meaning | setting |
| --- | --- | --- |
| t | tensor-parallel ranks | `layout.tp` |
| p | pipeline ranks | `layout.pp` |
| v | stages (chunks of layers) per pipeline rank | `layout.stages_per_rank` |
| d | data-parallel ranks | `layout.dp_replicate` times `layout.dp_shard` |
| n = p t d | ranks | |
| B | rows of a step | `batch_size` |
| b | rows of a micro-batch | `micro_batch_size` |
| m = B / (b d) | micro-batches per pipeline and step | |
| l, h, s, V | layers, hidden size, tokens of a row, vocabulary | the model and the data |
| tf(b), tb(b) | seconds of a micro-batch forward and backward on one rank, all its v stages together | |

## How it works

**Size and work.** A GPT has 12 h^2 + 13 h values per layer (matrices; biases and two norms) and the tables of tokens
and places:

    P = 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h))

A pass through the layers takes 24 l h^2 + 4 l s h FLOPs per token, the head 2 h V. With every layer recomputed, a step
passes the layers four times (forward, forward again, two for the backward pass) and the head three times:

    F = 96 B s l h^2 (1 + s / (6 h) + V / (16 l h)) = B s (4 (24 l h^2 + 4 l s h) + 6 h V)

Without recomputation the 4 is a 3: 72 B s l h^2 (1 + s / (6 h)) + 6 B s h V. Leaving the small terms out, T tokens on n
GPUs that reach X FLOP/s each take 8 T P / (n X) seconds with recomputation, 6 T P / (n X) without.

**Pipeline.** Ranks fill with work at the start of a step and run empty at its end, for gradients must be those of the
whole batch. Waiting time over working time:

    GPipe, 1F1B          (p - 1) / m
    interleaved 1F1B     (p - 1) / (v m)

- *1F1B*: rank r makes min(p - 1 - r, m) forward passes, then a forward and a backward pass in turn, then the backward
  passes left. It holds the activations of min(p - r, m) micro-batches; under GPipe it would be m.
- *Interleaved 1F1B*: rank r holds the stages r, r + p, ..., r + (v - 1) p of l / (p v) layers each. Its work counts in
  units k = 0 .. m v - 1 of one stage and one micro-batch: stage number ((k mod p v) div p) of the rank's own, counted
  from the last one on the way back; micro-batch (k div p v) p + k mod p. Warm-up has 2 (p - 1 - r) + (v - 1) p forward
  units, at most m v. A rank holds one unit more than that: (2 (p - 1 - r) + (v - 1) p + 1) / v micro-batches.

**What goes over the links**, in values, each way:

| what | per | values |
| --- | --- | --- |
| tensor parallel: two all-reduces forward, two backward | rank, layer, micro-batch | 8 b s h (t - 1) / t |
| pipeline: hidden states forward, gradients backward | rank, micro-batch, direction | b s h, times v when interleaved |
| the same when the t ranks send a part each | rank, micro-batch, direction | that divided by t |
| data parallel: all-reduce of gradients | rank, step | 2 P / (p t) (d - 1) / d |

Tensor parallelism divides the query, key, value and first feed-forward matrices by columns, the two output matrices by
rows, and the vocabulary. Between its products all t ranks hold the same hidden states, so the paper lets each send
1 / t of them to the next stage, which gathers them again over the fast links of its server.

**Recomputation.** A stage of l layers that keeps c inputs, and between two of them the inner activations of the l / c
layers that it is just going through, needs c A_in + (l / c) A_mid. It is least at c = sqrt(l A_mid / A_in). (The form
was noted from memory; the derivation is this one.)

## When to use it

The paper's three rules:

1. Raise t first, up to the GPUs of one server (8), where all-reduces are cheap; then p, across servers.
2. Make t p no larger than the model and its state need to fit. All other ranks go to d: with t = 1 and p = n / d the
   waiting share is (n - d) b / B, so every rank moved from the pipeline to d takes some away.
   `layout.use = "megatron"` follows these two: it takes the smallest t, then the smallest p, with which 16 bytes per
   value of P / (t p) (weights, gradient and two moments in float32) and the activations of the live micro-batches stay
   below `memory_gib`. On the ten rows of the table it picks the paper's t in eight and the paper's p in seven; the
   others are larger in the paper than they need to be.
3. Measure tf(b) and tb(b), and take the b for which (B / (d b) + p - 1) (tf(b) + tb(b)) is least: a larger b makes
   matrices larger and micro-batches fewer. `best_micro_batch` does it.

- *Interleaving* pays where m is not much larger than p; it sends v times as much, and loses on narrow links. l must be
  a multiple of p v for stages of one size.
- *m*: several times p v, or the pipeline mostly waits. `parallel.timeline` shows a schedule with measured times.
- *Recomputation* costs up to a third more time, and permits larger b and smaller t p.
- Learning rate and all else stay: the layout does not change what is computed, apart from rounding.

## Differences

- The paper's order takes m that p divides. torch's makes rounds of m / max(1, m div p) micro-batches, so that m < p
  and m = 10 on p = 4 work; with m a multiple of p the two are the same, but that the paper makes all forward passes
  first where m = p. Waiting shares are equal.
- Sequence parallelism (Korthikanti et al. 2022) leaves the hidden states between stages divided by t already; that
  takes the place of the paper's scatter and gather. Without it they are sent whole.
- The paper's share of peak (52 % at 1T) counts recomputed FLOPs, so it is use of the hardware. About 3/4 of it (39 %)
  is use for the model (MFU), which is what lmworks reports.
- The paper counts attention over the whole square of tokens; `cost()` counts the causal half. P leaves out the last
  norm, 2 h.
- Its fused kernels are not here, and no code of Megatron-LM.

## Limits

- The figures of the paper are from up to 3072 A100 GPUs, and cannot be seen here. `WEAK_SCALING` has them as published;
  seconds per step follow from F.
- The formulas of the links count values, not time: overlap, latency and shared links are not in them.
- Stages of unequal cost wait longer than (p - 1) / (v m); the simulator tells by how much.
- How the paper set up its comparison with ZeRO-3 in detail is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import Problem, RecipeError, UsageError
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.train.saved import Recompute

STATE_BYTES = 16
"""Per value: weight, gradient and two moments, float32."""


@final
@dataclass(frozen=True, kw_only=True)
class Megatron(Arrangement):
    """The smallest t, then the smallest p, with which a rank's share fits; all other ranks are data parallel."""

    ranks_per_node: PositiveInt = 8
    """Ranks that fast links join: the most tensor parallelism."""
    memory_gib: PositiveFloat = 64.0
    """What a rank may hold in weights, gradients, moments and activations, GiB. 64 leaves a fifth of 80 free."""
    stages_per_rank: PositiveInt = 2
    """v of the interleaved schedule; less where the blocks do not make so many equal stages, 1 for plain 1F1B."""

    @property
    def asked(self) -> None:
        """It takes as many as there are."""

    def settle(self, world: int, recipe: Any) -> Layout:
        """The first (t, p) that fits, t first. Raises RecipeError when none does, with the one that needs least."""
        need = _Need.of(recipe)
        least: tuple[float, int, int] | None = None
        for tensor, pipeline in self._choices(world, need):
            size = need.gib(world, tensor, pipeline)
            if size <= self.memory_gib:
                return self._layout(world, tensor, pipeline, need)
            least = min(least or (size, tensor, pipeline), (size, tensor, pipeline))
        text = f"no layout of {world} ranks keeps a rank below it"
        if least is not None:
            text += f"; tp = {least[1]}, pp = {least[2]} needs {least[0]:.3g}. Take more ranks, or saved = 'recompute'"
        raise RecipeError([Problem(path="layout.memory_gib", text=text)])

    def _choices(self, world: int, need: _Need) -> Iterator[tuple[int, int]]:
        """t from 1 to a node's ranks without a pipeline, then pipelines with the largest t."""
        tensors = [t for t in range(1, self.ranks_per_node + 1) if world % t == 0 and need.heads % t == 0]
        yield from ((t, 1) for t in tensors if need.divides(world, t, 1))
        for p in range(2, need.layers + 1):
            if world % (tensors[-1] * p) == 0 and need.layers % p == 0 and need.divides(world, tensors[-1], p):
                yield tensors[-1], p

    def _layout(self, world: int, tensor: int, pipeline: int, need: _Need) -> Layout:
        micro_batches = need.micro_batches(world, tensor, pipeline)
        fits = [v for v in range(1, self.stages_per_rank + 1) if need.layers % (pipeline * v) == 0]
        interleaved = pipeline > 1 and fits[-1] > 1 and micro_batches % pipeline == 0
        return Layout(
            pp=pipeline,
            dp_replicate=world // (tensor * pipeline),
            dp_shard=1,
            tp=tensor,
            sequence_parallel=tensor > 1,
            schedule="interleaved-1f1b" if interleaved else "1f1b" if micro_batches >= pipeline else "gpipe",
            stages_per_rank=fits[-1] if interleaved else None,
        )


@final
@dataclass(frozen=True, kw_only=True)
class _Need:
    """What of a recipe the choice hangs on."""

    parameters: int
    layers: int
    heads: int
    """That every block's key/value heads can be divided by."""
    batch: int
    micro_batch: int | None
    row_bytes: float
    """Activations of a row that all blocks keep."""

    @staticmethod
    def of(recipe: Any) -> _Need:
        """From a decoded recipe; the vocabulary is the tokenizer's, as far as that tells it."""
        shape = getattr(recipe.model, "shape", recipe.model)
        if shape.vocab_size is None:
            shape = shape.with_vocab(getattr(recipe.data.tokenizer, "vocab_size", None) or 257)
        blocks, length = shape.blocks(), recipe.data.sequence_length
        value = 4 if recipe.precision == "fp32" else 2
        cost = shape.cost(sequence=length, bytes_per_value=value)
        kept = cost.activation_bytes_per_token
        if isinstance(recipe.saved, Recompute):
            # the inputs of the blocks that are run again, what the others keep, and one block's inside at a time
            again = len(range(0, len(blocks), recipe.saved.every))
            kept = again * shape.hidden_size * value + kept * (len(blocks) - again + 1) / len(blocks)
        return _Need(
            parameters=cost.parameters,
            layers=len(blocks),
            heads=math.gcd(*(block.n_kv_heads for block in blocks)),
            batch=recipe.batch_size,
            micro_batch=recipe.micro_batch_size,
            row_bytes=kept * length,
        )

    def divides(self, world: int, tensor: int, pipeline: int) -> bool:
        """Whether the rows of a step make whole micro-batches."""
        rows, rest = divmod(self.batch, world // (tensor * pipeline))
        return rest == 0 and rows > 0 and rows % min(self.micro_batch or rows, rows) == 0

    def micro_batches(self, world: int, tensor: int, pipeline: int) -> int:
        """m."""
        rows = self.batch // (world // (tensor * pipeline))
        return rows // min(self.micro_batch or rows, rows)

    def gib(self, world: int, tensor: int, pipeline: int) -> float:
        """GiB of a rank: state, and the activations of min(p, m) micro-batches through its blocks."""
        rows = self.batch // (world // (tensor * pipeline))
        micro = min(self.micro_batch or rows, rows)
        live = min(pipeline, rows // micro)
        activations = self.row_bytes * micro * live / (tensor * pipeline)
        return (STATE_BYTES * self.parameters / (tensor * pipeline) + activations) / 2**30


VOCABULARY, SEQUENCE = 51_200, 2_048
"""V and s of the paper's table."""


@final
@dataclass(frozen=True)
class Row:
    """A row of the paper's weak-scaling table: full recomputation, A100 with a peak of 312 TFLOP/s."""

    name: str
    layers: int
    hidden: int
    tensor: int
    pipeline: int
    micro_batch: int
    chunks: int
    batch: int
    gpus: int
    teraflops: float
    """Measured per GPU, recomputed FLOPs counted."""

    @property
    def parameters(self) -> int:
        """P."""
        return parameters(layers=self.layers, hidden=self.hidden, sequence=SEQUENCE, vocabulary=VOCABULARY)

    @property
    def data(self) -> int:
        """d."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def micro_batches(self) -> int:
        """m."""
        return self.batch // (self.micro_batch * self.data)

    @property
    def seconds(self) -> float:
        """Seconds per step: F over what all GPUs reach."""
        work = flops(batch=self.batch, layers=self.layers, hidden=self.hidden, sequence=SEQUENCE, vocabulary=VOCABULARY)
        return work / (self.gpus * self.teraflops * 1e12)


WEAK_SCALING = (
    # name, l, h, t, p, b, v, B, n, TFLOP/s per GPU
    Row("1.7B", 24, 2304, 1, 1, 16, 1, 512, 32, 137),
    Row("3.6B", 30, 3072, 2, 1, 16, 1, 512, 64, 138),
    Row("7.5B", 36, 4096, 4, 1, 16, 1, 512, 128, 142),
    Row("18B", 40, 6144, 8, 1, 8, 1, 1024, 256, 135),
    Row("39B", 48, 8192, 8, 2, 4, 1, 1536, 512, 138),
    Row("76B", 60, 10240, 8, 4, 2, 3, 1792, 1024, 140),
    Row("145B", 80, 12288, 8, 8, 2, 2, 2304, 1536, 148),
    Row("310B", 96, 16384, 8, 16, 1, 2, 2160, 1920, 155),
    Row("530B", 105, 20480, 8, 35, 1, 3, 2520, 2520, 163),
    Row("1T", 128, 25600, 8, 64, 1, 1, 3072, 3072, 163),
)
"""Models that grow with the cluster: layouts from the paper's published scripts, speeds from its repository's table."""


def parameters(*, layers: int, hidden: int, sequence: int, vocabulary: int) -> int:
    """P: values of a GPT with tied head and learned places, without the last norm."""
    return layers * (12 * hidden**2 + 13 * hidden) + (vocabulary + sequence) * hidden


def flops(*, batch: int, layers: int, hidden: int, sequence: int, vocabulary: int, recompute: bool = True) -> int:
    """F: FLOPs of one step of `batch` rows, attention over the whole square of tokens."""
    passes = 4 if recompute else 3
    per_token = passes * (24 * layers * hidden**2 + 4 * layers * sequence * hidden) + 6 * hidden * vocabulary
    return batch * sequence * per_token


def training_days(
    *, tokens: float, parameters: float, gpus: int, flops_per_second: float, recompute: bool = True
) -> float:
    """Days that `tokens` take at `flops_per_second` per GPU: 8 T P / (n X), 6 without recomputation."""
    return (8 if recompute else 6) * tokens * parameters / (gpus * flops_per_second) / 86_400


def bubble(*, pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Seconds that a rank waits over seconds that it works: (p - 1) / (v m)."""
    return (pipeline - 1) / (chunks * micro_batches)


def live_micro_batches(*, pipeline: int, micro_batches: int, chunks: int = 1, rank: int = 0) -> float:
    """Micro-batches whose activations pipeline rank `rank` holds at most, in whole micro-batches of all its layers.

    1F1B with one chunk, interleaved 1F1B with more; GPipe holds all.
    """
    if chunks == 1:
        return float(min(pipeline - rank, micro_batches))
    turn = micro_batches // max(1, micro_batches // pipeline)
    return min(2 * (pipeline - 1 - rank) + (chunks - 1) * turn + 1, micro_batches * chunks) / chunks


def tensor_bytes(*, micro_batch: int, sequence: int, hidden: int, tensor: int, bytes_per_value: int = 2) -> float:
    """Bytes that a rank sends per layer and micro-batch in the four all-reduces of tensor parallelism, as rings."""
    return bytes_per_value * 8 * micro_batch * sequence * hidden * (tensor - 1) / tensor


def pipeline_bytes(
    *, micro_batch: int, sequence: int, hidden: int, chunks: int = 1, divided: int = 1, bytes_per_value: int = 2
) -> float:
    """Bytes that a rank sends per micro-batch in each direction of the pipeline.

    `divided` = t where every tensor-parallel rank sends its own part, with sequence parallelism or scatter and gather.
    The two ends of the pipeline send less: the last stage nothing forward, the first nothing backward.
    """
    return bytes_per_value * micro_batch * sequence * hidden * chunks / divided


def data_bytes(*, parameters: float, pipeline: int, tensor: int, data: int, bytes_per_value: int = 4) -> float:
    """Bytes that a rank sends per step in the all-reduce of gradients, as a ring."""
    return bytes_per_value * 2 * parameters / (pipeline * tensor) * (data - 1) / data


def step_seconds(*, batch: int, micro_batch: int, data: int, pipeline: int, seconds: float) -> float:
    """Seconds of a step whose micro-batches take `seconds` = tf(b) + tb(b) each: (B / (d b) + p - 1) seconds."""
    return (batch / (data * micro_batch) + pipeline - 1) * seconds


def best_micro_batch(
    *,
    batch: int,
    data: int,
    pipeline: int,
    forward_seconds: Mapping[int, float],
    backward_seconds: Mapping[int, float],
) -> int:
    """Rule 3: the measured b whose step is shortest, of those that make whole micro-batches; the larger of two equals.

    `forward_seconds` and `backward_seconds`: tf(b) and tb(b) by b. Raises UsageError when no b divides B / d.
    """
    rows, rest = divmod(batch, data)
    fitting = sorted(b for b in forward_seconds.keys() & backward_seconds.keys() if rest == 0 and rows % b == 0)
    if not fitting:
        legal = ", ".join(str(b) for b in range(1, rows + 1) if rows % b == 0) if rest == 0 else f"multiples of {data}"
        what = (
            f"no measured micro-batch divides {rows} rows" if rest == 0 else f"{data} ranks do not divide {batch} rows"
        )
        raise UsageError(what, where="best_micro_batch", legal=legal)

    def taken(b: int) -> tuple[float, int]:
        seconds = forward_seconds[b] + backward_seconds[b]
        return step_seconds(batch=batch, micro_batch=b, data=data, pipeline=pipeline, seconds=seconds), -b

    return min(fitting, key=taken)


def best_checkpoints(*, layers: int, input_bytes: float, inner_bytes: float) -> float:
    """c of the page: how many layer inputs a stage of `layers` keeps so that it needs least, not rounded.

    `input_bytes`: A_in, a layer's input; `inner_bytes`: A_mid, what a layer keeps besides.
    """
    return math.sqrt(layers * inner_bytes / input_bytes)
