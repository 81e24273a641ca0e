"""What a run takes in memory on one rank, by class: told from its settings, and measured.

    weights     this rank's part of the model, float32; where it steps masters, in the type that they are used in
    gradients   the same, of what is trained; where it steps masters, the sums of micro-batches and their gradients
    optimizer   its state once it has stepped, and the masters
    saved       what waits for the backward pass, at its peak: blocks by their policy, and what is saved around them
    logits      one chunk of them, and its gradient
    workspace   all else that the allocator had: results on their way, gathered weights, communication; a rule of thumb
                beforehand: twice what a block saves, what is divided over ranks while it is whole, and of a placement
                of states the second copy and what is fed back

`saved` is told for the forms that a CPU runs and for the plain ones of a GPU; the scores of a CPU's tiles by the mean
length of documents, or, before they were read, as if each filled its row. What compiled blocks keep, the compiler
decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmworks.core.errors import LmworksError
from lmworks.data.tokenizer import Bytes
from lmworks.model.head import chunk_rows
from lmworks.model.ops import bf16_is_fast
from lmworks.model.sizes import BlockBytes, BlockSizes, Held
from lmworks.model.tiles import MOST_KEYS, TILE, kept_scores
from lmworks.parallel.holdings import WEIGHT, holdings, whole
from lmworks.parallel.layout import Layout
from lmworks.parallel.schedule import order
from lmworks.parallel.shard import local
from lmworks.parallel.traffic import held_stages

CLASSES = ("weights", "gradients", "optimizer", "saved", "logits", "workspace")
ROWS = ("o_proj.weight", "down_proj.weight")
"""Matrices of which tp divides the columns."""
BYTES = 257
"""Tokens of the tokenizer of bytes."""


class Holds(Protocol):
    """What of a policy for saved tensors is asked here."""

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held] | None:
        """What it holds for each block; None where it cannot tell."""
        ...


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank by class; None where nobody knows."""

    weights: int | None = None
    gradients: int | None = None
    optimizer: int | None = None
    saved: int | None = None
    logits: int | None = None
    workspace: int | None = None

    @property
    def total(self) -> int:
        """Of the classes that are known."""
        return sum(size for size in self.by_class().values() if size is not None)

    def by_class(self) -> dict[str, int | None]:
        """Class and bytes, in order."""
        return {name: getattr(self, name) for name in CLASSES}

    @property
    def largest(self) -> str:
        """The class that takes most."""
        return max(CLASSES, key=lambda name: getattr(self, name) or 0)


# --- told beforehand --------------------------------------------------------------------------------------------------


def predict(recipe: Any, layout: Layout, rank: int, *, vocabulary: int, document: float | None = None) -> Footprint:
    """What a rank of a settled layout will take, from settings alone. `vocabulary`: rows of the token table.

    `document`: tokens of a document on average, where that is known; None: documents fill their rows.
    """
    shape = getattr(recipe.model, "shape", recipe.model)
    shape = dataclasses.replace(shape, vocab_size=vocabulary) if shape.vocab_size is None else shape
    work = MicroBatch.of(recipe, layout, shape, document)
    stages = held_stages(shape, layout, rank, sequence=work.sequence)
    with_head = any(last for _, last, _ in stages)
    rows = min(work.tokens, chunk_rows(math.ceil(vocabulary / layout.tp), work.device))
    blocks = [work.block(number).whole for _, _, held in stages for number in held]
    held = holdings(shape, layout, rank, sequence=work.sequence, value=work.value, optimizer=recipe.optimizer)
    several = recipe.batch_size // layout.size("batch") > work.rows
    gathered = whole(shape, layout, rank, sequence=work.sequence, value=work.value, several=several)
    return Footprint(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        saved=_saved(recipe, layout, rank, work),
        logits=rows * math.ceil(vocabulary / layout.tp) * (work.value + WEIGHT) if with_head else 0,
        workspace=2 * max(blocks) + gathered + held.copy + held.missed,
    )


def vocabulary_of(recipe: Any) -> int | None:
    """Rows of the token table, as far as settings tell; a tokenizer in a file has to be read for it."""
    tokenizer = recipe.data.tokenizer
    known: int | None = recipe.model.vocab_size or getattr(tokenizer, "vocab_size", None)
    return BYTES if known is None and isinstance(tokenizer, Bytes) else known


def wide_and_whole(layout: Layout) -> bool:
    """Whether blocks are given whole weights in float32, which a product casts."""
    if layout.state is None:
        return layout.size("fsdp") == 1
    return layout.size("weights") == 1 and not layout.narrow_weights


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a micro-batch is on one rank."""

    shape: Any
    layout: Layout
    sequence: int
    rows: int
    value: int
    """Bytes of an activation."""
    device: str
    plain: bool
    """The plain forms of norms, which a GPU runs."""
    document: float | None
    """Tokens of a document, on average; None: as many as of a row."""

    @staticmethod
    def of(recipe: Any, layout: Layout, shape: Any, document: float | None) -> MicroBatch:
        device = recipe.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = recipe.precision
        if precision == "auto":
            precision = "bf16" if bf16_is_fast(torch.device(device)) else "fp32"
        own = recipe.batch_size // layout.size("batch")
        return MicroBatch(
            shape=shape,
            layout=layout,
            sequence=recipe.data.sequence_length,
            rows=min(recipe.micro_batch_size or own, own),
            value=WEIGHT if precision == "fp32" else 2,
            device=device,
            plain=device != "cpu",
            document=document,
        )

    @property
    def tokens(self) -> int:
        """On this rank."""
        return self.rows * self.sequence // self.layout.cp

    def block(self, number: int) -> BlockBytes:
        """Of one block."""
        tp, width = self.layout.tp, int(self.shape.hidden_size)
        whole = self.shape.blocks()[number]
        mine = dataclasses.replace(
            whole,
            n_heads=whole.n_heads // tp,
            n_kv_heads=whole.n_kv_heads // tp,
            ffn_size=math.ceil(whole.ffn_size / tp),
        )
        query = mine.n_heads * mine.head_dim
        scores, copied, fused = self._attention(mine)
        values = self.shape.saved_values_per_token(mine) + mine.n_heads * scores + copied
        norms = 1 if getattr(self.shape, "parallel_block", False) else 2
        rows, normed = norms, norms * width
        if getattr(self.shape, "qk_norm", False):
            rows, normed = rows + mine.n_heads + mine.n_kv_heads, normed + query + mine.n_kv_heads * mine.head_dim
        per_token = values * self.value + self._wider(rows, normed)
        between = 2 * query + 2 * mine.n_kv_heads * mine.head_dim + mine.n_heads * scores + copied
        heads = 0.0
        if getattr(self.shape, "qk_norm", False):
            count, inside = mine.n_heads + mine.n_kv_heads, query + mine.n_kv_heads * mine.head_dim
            heads = (inside + count) * self.value + self._wider(count, inside)
        matrices = self._matrices(number) if wide_and_whole(self.layout) and self.value != WEIGHT else 0
        products = self._products(number) + (query + mine.n_heads if fused else 0)
        ranks = tp if self.layout.sequence_parallel else 1
        return BlockBytes(
            number=number,
            whole=round(self.tokens * per_token) + matrices,
            entrance=self.tokens * width * self.value // ranks,
            products=self.tokens * products * self.value,
            attention=round(self.tokens * (between * self.value + heads)),
            tokens=self.tokens,
            width=width,
            sizes=mine,
        )

    def _attention(self, mine: BlockSizes) -> tuple[float, int, bool]:
        """What attention saves per token: scores of a head, values beside q, k, v and the result; and whether the
        result is a fused kernel's."""
        servers = self.layout.servers
        if servers is not None:
            # A server's cache hangs on the plan. As if each served as many tokens as it has, whose results stay too.
            return 1.0, 0 if servers.keep == "resend" else mine.n_heads * mine.head_dim, False
        engine = self.layout.context if self.layout.cp > 1 else "ulysses"
        if engine in ("ring", "tokenring"):
            return 1.0, 0, False
        if engine == "all-gather":
            # Keys and values of the other ranks, and torch's copy of the mask as numbers.
            return 1.0, 2 * mine.n_kv_heads * mine.head_dim * (self.layout.cp - 1) + self.sequence, True
        if self.plain:
            return 1.0, 0, True
        scores = scores_of(self.sequence, mine.window, self.document)
        # Long documents are attended one by one, and their results put behind each other.
        return (scores, 0, False) if scores else (1.0, mine.n_heads * mine.head_dim, True)

    def _products(self, number: int) -> int:
        """Values per token that a block's linear layers give."""
        prefix, top_k, found = f"blocks.{number}.", self.shape.blocks()[number].top_k, 0
        for name, shape in self.shape.shapes():
            if name.startswith(prefix) and len(shape) >= 2:
                rows = shape[0] if len(shape) == 2 else top_k * shape[1]
                found += rows if name.endswith(ROWS) else rows // self.layout.tp
        return found

    def _wider(self, rows: int, values: int) -> int:
        """Bytes per token that norms over so many rows and values keep on top of one value for each value: float32
        scales beside bf16, and in the plain form input and product in float32."""
        scales = rows * (WEIGHT - self.value)
        return scales + values * (2 * WEIGHT - self.value) if self.plain else scales

    def _matrices(self, number: int) -> int:
        """Bytes of a block's matrices as they are cast for a forward pass."""
        prefix = f"blocks.{number}."
        shapes = [shape for name, shape in self.shape.shapes() if name.startswith(prefix) and len(shape) >= 2]
        values: int = sum(math.prod(shape) for shape in shapes)
        return values * self.value // self.layout.tp

    def rest(self, *, first: bool, last: bool) -> int:
        """Bytes outside of blocks at the end of the forward pass: ids, the final norm, both gradients of the loss."""
        width, found = int(self.shape.hidden_size), 0
        if first:
            found += self.tokens * 8
        if last:
            kind = WEIGHT if wide_and_whole(self.layout) else self.value  # a gradient in the type of the matrix
            table = math.ceil((self.shape.vocab_size or 0) / self.layout.tp) * width * kind
            norm = width * self.value + self.value + self._wider(1, width)
            found += self.tokens * (norm + width * self.value) + table + 8  # and the count that the loss is divided by
        return found

    def rope(self) -> int:
        """Bytes of the angles' cosines and sines, which all blocks share."""
        packed = self.rows * self.sequence // self.layout.cp
        rotary = getattr(self.shape, "rope_theta", None) is not None
        return packed * self.shape.blocks()[0].head_dim * 2 * WEIGHT if rotary else 0


def scores_of(sequence: int, window: int | None, document: float | None) -> float:
    """Scores that tiles keep per token and head; 0 where a CPU does not attend by tiles.

    A tile of queries sees the keys from the start of the document that its first query is in: `document` tokens before
    it on average, where lengths are exponential, and no further than the start of the row. None: one document a row.
    """
    if document is None:
        return kept_scores(sequence, window) / sequence
    kept = 0.0
    for start in range(0, sequence, TILE):
        width = min(TILE, sequence - start)
        behind = document * (1 - math.exp(-start / document))
        kept += width * (width + (behind if window is None else min(behind, window - 1)))
    return kept / sequence if kept <= MOST_KEYS * sequence else 0.0


def _saved(recipe: Any, layout: Layout, rank: int, work: MicroBatch) -> int | None:
    """Bytes at the peak; None where the policy, or the compiler, does not tell."""
    if recipe.compile:
        return None
    found = 0
    live = _live(recipe, layout, rank)
    for first, last, blocks in held_stages(work.shape, layout, rank, sequence=work.sequence):
        peak = peak_of(recipe.saved, [work.block(number) for number in blocks], work.rest(first=first, last=last))
        if peak is None:
            return None
        found += round(live * (peak + work.rope()))
    return found


def _live(recipe: Any, layout: Layout, rank: int) -> float:
    """Micro-batches whose saved tensors a rank holds at most, for each of its stages."""
    if layout.pp == 1:
        return 1.0
    own = recipe.batch_size // layout.size("batch")
    number = own // min(recipe.micro_batch_size or own, own)
    found = order(layout.schedule, ranks=layout.pp, micro_batches=number, stages_per_rank=layout.held)
    return found.peak_live[layout.place(rank, "pp")] / layout.held


def peak_of(saved: Holds, blocks: Sequence[BlockBytes], rest: int) -> int | None:
    """The most bytes of one micro-batch: at the end of the forward pass, or while some block's backward pass works."""
    held = saved.held(blocks)
    if held is None:
        return None
    most = waiting = 0
    for block in held:
        waiting += block.waiting
        most = max(most, waiting + block.working)
    return max(most, waiting + rest)


# --- measured ---------------------------------------------------------------------------------------------------------


def measured(
    weights: Iterable[Tensor],
    gradients: Iterable[Tensor],
    *,
    optimizer: int,
    saved: int,
    logits: int | None,
    whole: int,
) -> Footprint:
    """What a rank has, its gradients not yet dropped. `whole`: bytes of the allocator, or of the process, over what was
    there before the run was built."""
    known = Footprint(
        weights=_of(weights),
        gradients=_of(gradients),
        optimizer=optimizer,
        saved=saved,
        logits=logits,
    )
    return dataclasses.replace(known, workspace=max(0, whole - known.total))


def _of(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's values of some tensors, each counted once."""
    mine = [local(x.detach()) for x in tensors]
    return sum({(x.data_ptr(), x.shape): x.nbytes for x in mine if x.numel()}.values())


# --- for people -------------------------------------------------------------------------------------------------------

WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "saved": "saved for backward",
    "logits": "logits of a chunk",
    "workspace": "workspace",
}


def as_table(told: Footprint, seen: Footprint | None = None) -> list[str]:
    """A line for each class: what was predicted, what was measured."""
    rows = [("", "predicted", "measured" if seen is not None else "")]
    rows += [(WORDS[name], in_words(size), _seen(seen, name)) for name, size in told.by_class().items()]
    rows.append(("in all", in_words(told.total), "" if seen is None else in_words(seen.total)))
    return [f"{name:<20}{one:>12}{other:>12}".rstrip() for name, one, other in rows]


def described(recipe: Any, world: int) -> list[str]:
    """What a recipe will take on the rank that takes most, line by line, or why that cannot be told.

    `world`: ranks that there are, for a layout that takes as many as it finds.
    """
    try:
        layout: Layout = recipe.layout.settle(recipe.layout.asked or world, recipe)
        vocabulary = vocabulary_of(recipe)
        if vocabulary is None:
            return ["memory: not told before the tokenizer is read, which sets the size of the token table"]
        ranks = [predict(recipe, layout, rank, vocabulary=vocabulary) for rank in range(layout.ranks)]
    except LmworksError as error:
        return [f"memory: not told: {str(error).splitlines()[0]}"]
    most = max(range(len(ranks)), key=lambda rank: ranks[rank].total)
    where = f" of rank {most}, the largest of {len(ranks)}" if len(ranks) > 1 else ""
    return [f"memory{where}, beside the program itself:", *as_table(ranks[most])[1:]]


def listed(seen: Footprint) -> str:
    """The classes in one line, the largest first."""
    known = [(size, name) for name, size in seen.by_class().items() if size]
    return ", ".join(f"{WORDS[name]} {in_words(size)}" for size, name in sorted(known, reverse=True))


def _seen(seen: Footprint | None, name: str) -> str:
    return "" if seen is None else in_words(getattr(seen, name))


def in_words(size: int | None) -> str:
    """Bytes for people: three digits and a unit."""
    if size is None:
        return "not known"
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            value = size / 10**power
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size} B"
