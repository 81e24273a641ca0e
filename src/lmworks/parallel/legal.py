"""What a recipe cannot have under a layout: its model, its batch and its parts, with the nearest that it can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmworks.core.errors import LmworksError, Problem
from lmworks.maths.whole import legal_divisors

if TYPE_CHECKING:
    from lmworks.parallel.layout import Layout


def problems(layout: Layout, recipe: Any) -> Iterator[Problem]:
    """Everything that a training recipe cannot have, with paths in the layout."""
    yield from _model(layout, recipe)
    yield from _batch(layout, recipe)
    yield from _parts(layout, recipe)


def _model(layout: Layout, recipe: Any) -> Iterator[Problem]:
    """What the model's sizes do not allow. A model that cannot tell its sizes yet is looked at when it is built."""
    try:
        blocks = recipe.model.blocks()
    except LmworksError:
        return  # told where it is wrong, or a folder that is not there yet
    if layout.pp > 1 and len(blocks) < layout.stages:
        text = f"{layout.pp} x {layout.held} stages need as many blocks, the model has {len(blocks)}"
        yield Problem(path="pp", text=f"{text}. The most is pp = {max(1, len(blocks) // layout.held)}")
    if layout.split is not None and sum(layout.split) != len(blocks):
        yield Problem(path="split", text=f"names {sum(layout.split)} blocks, the model has {len(blocks)}")
    groups = math.gcd(*(block.n_kv_heads for block in blocks))
    if groups % layout.tp:
        text = f"{layout.tp} does not divide the key/value heads of every block"
        yield Problem(path="tp", text=f"{text}. Legal: {legal_divisors(groups)}")
    elif layout.context == "ulysses" and groups // layout.tp % layout.cp:
        text = (
            f"ulysses gives each of {layout.cp} ranks of cp some of the {groups // layout.tp} key/value heads of a rank"
        )
        yield Problem(
            path="context", text=f"{text}. Legal: cp = {legal_divisors(groups // layout.tp)}, or another context"
        )
    yield from _experts(layout, max(block.experts or 0 for block in blocks))
    vocabulary = recipe.model.vocab_size
    if vocabulary is not None and vocabulary < layout.tp:
        yield Problem(path="tp", text=f"{layout.tp} is more than the vocabulary of {vocabulary}")


def _experts(layout: Layout, experts: int) -> Iterator[Problem]:
    """Experts that cannot be divided so."""
    if layout.ep > 1 and not experts:
        yield Problem(path="ep", text="has no effect: the model has no experts (model.experts)")
    elif experts % layout.ep:
        yield Problem(
            path="ep", text=f"{layout.ep} does not divide {experts} experts. Legal: {legal_divisors(experts)}"
        )
    if experts and layout.tp > 1:
        yield Problem(path="tp", text="does not divide experts yet: take ep, with tp = 1")
    if layout.settled and layout.size("fsdp") % layout.ep:
        text = f"{layout.ep} does not divide dp_shard x cp = {layout.size('fsdp')}, whose ranks it takes"
        yield Problem(path="ep", text=f"{text}. Legal: {legal_divisors(layout.size('fsdp'))}")


def _batch(layout: Layout, recipe: Any) -> Iterator[Problem]:
    """Rows and tokens that cannot be divided."""
    length = recipe.data.sequence_length
    need = layout.tp * layout.runs
    if length % layout.runs:
        held = "two runs of a row's tokens" if layout.order == "zigzag" else "as many of a row's tokens"
        text = f"each of {layout.cp} ranks holds {held}, but sequence_length = {length}"
        yield Problem(path="cp", text=f"{text}; take a multiple of {layout.runs}, as {_up(length, layout.runs)}")
    elif layout.sequence_parallel and length % need:
        text = f"sequence_length = {length} is not divisible by {need}; take {_up(length, need)}"
        yield Problem(path="sequence_parallel", text=text)
    elif length % (slices := layout.tp_slices * (need if layout.sequence_parallel else layout.runs)):
        text = f"sequence_length = {length} does not make {layout.tp_slices} equal slices"
        yield Problem(path="tp_slices", text=f"{text}; take {_up(length, slices)}, or another number")
    if not layout.settled:
        return
    rows, readers = recipe.batch_size, layout.size("batch")
    if rows % readers:
        text = f"{readers} ranks share the rows of a step, but batch_size = {rows}; take {_up(rows, readers)}"
        yield Problem(path="dp_shard" if layout.size("dp_shard") > 1 else "dp_replicate", text=text)
        return
    own, micro = rows // readers, recipe.micro_batch_size or rows // readers
    if layout.pp > 1 and own % micro:
        text = f"a pipeline's micro-batches are of one size, but {own} rows do not make micro-batches of {micro}"
        yield Problem(path="pp", text=f"{text}. Legal: micro_batch_size = {legal_divisors(own)}")
    elif layout.pp > 1:
        yield from _schedule(layout, own // micro)


def _schedule(layout: Layout, micro_batches: int) -> Iterator[Problem]:
    """Numbers of micro-batches that a schedule cannot order."""
    least = {"1f1b": layout.pp, "dualpipe-v": layout.stages}.get(layout.schedule, 1)
    if micro_batches < least:
        text = f"{layout.schedule} needs {least} micro-batches or more on this layout; here are {micro_batches}"
        yield Problem(path="schedule", text=f"{text}. Lower micro_batch_size, or take gpipe")
    if layout.schedule == "interleaved-1f1b":
        rounds = max(1, micro_batches // layout.pp)
        if micro_batches % rounds:
            text = f"interleaved-1f1b runs micro-batches in rounds of equal size; {micro_batches} do not make {rounds}"
            yield Problem(path="schedule", text=f"{text}. Take a multiple of pp = {layout.pp}")


def _parts(layout: Layout, recipe: Any) -> Iterator[Problem]:
    """Parts of the recipe that need what a rank of this layout does not have."""
    if not layout.settled or layout.ranks == 1:
        return
    if not recipe.selector.row_by_row:
        text = "chooses among all rows of a step, and no rank of this layout sees them all. Run it on one rank"
        yield Problem(path="selector", text=text)
    if not recipe.optimizer.core().value_by_value:
        text = "needs whole matrices or passes of its own, which no rank of this layout can make. Run it on one rank"
        yield Problem(path="optimizer", text=text)
    if layout.tp_slices > 1 and recipe.precision.startswith("float8"):
        yield Problem(path="tp_slices", text=f"products in {recipe.precision} are not made in slices. Legal: 1")
    if recipe.model.tied and layout.pp > 1 and layout.both_ends_on_one_rank and layout.size("fsdp") > 1:
        text = f"{layout.schedule} puts both ends of a tied model on one rank, which FSDP cannot divide. Take 1f1b"
        yield Problem(path="schedule", text=f"{text}, or model.tied = false")


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
