"""A recipe made small for a rehearsal: fewer ranks, blocks, tokens and micro-batches, the same structure."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmworks.model.sizes import Shape
from lmworks.parallel import state as states
from lmworks.parallel.layout import Layout
from lmworks.train.by_block import ByBlock, Rule
from lmworks.train.rehearse import Scene, micro_batches_of
from lmworks.train.saved import Keep, Recompute
from lmworks.train.slots import Saved

HEAD_DIM = 8
VOCABULARY = 257
"""No degree divides it."""
MOST_MICRO_BATCHES = 16


def small(recipe: Any, layout: Layout, *, most: int) -> tuple[Scene, list[str]]:
    """The scene of a recipe under a settled layout, on at most `most` ranks; and what was made smaller, in words."""
    reduced, said = reduce_degrees(layout, most)
    coded = reduced.state
    if coded and (plain := states.unrounded(coded, reduced.size("fsdp"), tp=reduced.tp)) != coded:
        reduced = dataclasses.replace(reduced, state=plain)
        said.append("int8, int4 -> plain: what rounding changes would hide what the layout changes")
    micro_rows = 1
    if reduced.servers is not None:  # documents of a few tokens are cut, and rows take turns where the real ones do
        reduced = dataclasses.replace(reduced, servers=dataclasses.replace(reduced.servers, tile=2))
        own: int = recipe.batch_size // layout.size("batch")
        micro_rows = min(2, recipe.micro_batch_size or own)
    length = 16 * reduced.cp * reduced.tp
    shape = getattr(recipe.model, "shape", recipe.model)
    model = shrink(shape, reduced, length=length, sequence=recipe.data.sequence_length)
    micro_batches = micro_batches_of(recipe, layout)
    kept = max(micro_batches if micro_batches <= MOST_MICRO_BATCHES else reduced.stages * 2, 1)
    if kept != micro_batches:
        said.append(f"micro-batches: {micro_batches} -> {kept}")
    said.append(f"model: {_described(shape)} -> {_described(model)}; rows of {length} tokens")
    scene = Scene(
        model=model,
        layout=reduced,
        rows=kept * micro_rows * reduced.size("batch"),
        micro_rows=micro_rows,
        length=length,
        optimizer=recipe.optimizer,
        objective=recipe.objective,
        gradient=recipe.gradient,
        saved=_in_memory(recipe.saved, model.n_layers),
    )
    return scene, said


def reduce_degrees(layout: Layout, most: int) -> tuple[Layout, list[str]]:
    """The layout on at most `most` ranks: degrees above 2 become 2, those first of which most is left."""
    said = []
    layout = dataclasses.replace(layout, machines=None)  # all ranks are here
    if layout.state is not None and layout.ranks > most:
        ranks, cp = layout.size("fsdp"), min(layout.cp, 2)
        state, fewer = states.smaller(layout.state, ranks)
        layout = dataclasses.replace(layout, dp_shard=fewer // cp, cp=cp, state=state)
        said.append(f"dp_shard x cp: {ranks} -> {fewer}, in the same steps")
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp") if layout.state is None else ("tp", "pp")
    for axis in axes:
        size = layout.size(axis)
        if layout.ranks > most and size > 2:
            smaller: dict[str, Any] = {axis: 2, "split": None if axis == "pp" else layout.split}
            layout = dataclasses.replace(layout, **smaller)
            said.append(f"{axis}: {size} -> 2")
    return layout, said


def shrink(shape: Any, layout: Layout, *, length: int, sequence: int) -> Any:
    """A model of the same structure with small widths: heads of 8 values, as many as the ranks and groups ask for."""
    blocks = shape.blocks()
    layers = min(shape.n_layers, max(2 * layout.stages, 4)) if layout.split is None else shape.n_layers
    parts = layout.tp * (layout.cp if layout.context == "ulysses" else 1)
    groups = parts * (2 if blocks[0].n_kv_heads >= 2 * parts else 1)
    heads = groups * min(blocks[0].n_heads // blocks[0].n_kv_heads, 4)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_layers": layers,
        "hidden_size": heads * HEAD_DIM,
        "n_heads": heads,
        "ffn_size": 2 * heads * HEAD_DIM + 1,
        "max_position": length,
    }
    names = {field.name for field in dataclasses.fields(shape)}
    if "n_kv_heads" in names:
        settings |= {"n_kv_heads": groups, "head_dim": HEAD_DIM}
    if getattr(shape, "sliding_window", None) is not None:
        settings["sliding_window"] = max(2, round(length * min(1.0, shape.sliding_window / sequence)))
    if getattr(shape, "sliding_window_blocks", None) is not None:
        settings["sliding_window_blocks"] = tuple(i for i in shape.sliding_window_blocks if i < layers)
    return dataclasses.replace(shape, **{name: value for name, value in settings.items() if name in names})


def _described(shape: Shape) -> str:
    return f"{shape.n_layers} blocks, {shape.hidden_size} wide"


def _in_memory(saved: Saved, blocks: int) -> Saved:
    """The policy that makes the same passes; where saved tensors wait does not change what ranks exchange."""
    if isinstance(saved, Keep | Recompute):
        return saved
    again = tuple(block for block in range(blocks) if saved.again(block))
    return ByBlock(rules=(Rule(blocks=again, policy=Recompute()),)) if again else Keep()
