"""What a rank of a layout holds and computes, by block: exact counts from settings, fast for many layouts.

Bytes are those of `parallel.footprint` and `parallel.traffic`, which go through every name of every rank. Here blocks
that are alike are counted once, ranks by their place in the pipeline (the first of tp and fsdp holds most), and what
layouts have in common is kept. Tests hold both to the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from lmworks.core.errors import UsageError
from lmworks.model.head import chunk_rows
from lmworks.model.sizes import BlockBytes, BlockSizes
from lmworks.parallel.footprint import Footprint, MicroBatch, vocabulary_of, wide_and_whole
from lmworks.parallel.holdings import WEIGHT, of_wholes, resharded
from lmworks.parallel.layout import V_SHAPED, Layout
from lmworks.parallel.pipeline import held_by, split
from lmworks.parallel.schedule import order
from lmworks.parallel.traffic import COLUMNS, ROWS, portions
from lmworks.plan import states
from lmworks.plan.choice import Choice, Matrix, Stage
from lmworks.plan.cluster import Cluster


@dataclass(frozen=True)
class _Sums:
    """Bytes of blocks, summed from the first on; and of what stands around them, by name."""

    weights: list[int]
    trained: list[int]
    state: list[int] | None
    ends: dict[str, tuple[int, int, int]]
    constant: int


@dataclass(frozen=True)
class _Books:
    """Saved bytes of all blocks."""

    waiting: list[int]
    """In front of each block, and behind the last."""
    working: list[int]
    """The most while each is at work, those in front of it included."""
    rope: int


_NONE: Any = object()


class Ground:
    """A recipe's model and batch on a cluster. Raises UsageError where the size of the token table is not known."""

    def __init__(self, recipe: Any, cluster: Cluster) -> None:
        self.recipe, self.cluster = recipe, cluster
        vocabulary = vocabulary_of(recipe)
        if vocabulary is None:
            text = "the tokenizer's file tells the size of the token table, and no plan reads it"
            raise UsageError(text, where="model.vocab_size", next_step="--set model.vocab_size=NUMBER")
        shape = getattr(recipe.model, "shape", recipe.model)
        self.shape = dataclasses.replace(shape, vocab_size=vocabulary) if shape.vocab_size is None else shape
        self.vocabulary = vocabulary
        self.sequence: int = recipe.data.sequence_length
        self.precision = precision_on(recipe, cluster)
        self.value = WEIGHT if self.precision == "fp32" else 2
        self.device = "cuda" if cluster.kind == "gpu" else "cpu"
        self.sizes: tuple[BlockSizes, ...] = self.shape.blocks()
        self.depth = len(self.sizes)
        self.shapes: dict[str, tuple[int, ...]] = dict(self.shape.shapes())
        self._kept: dict[Any, Any] = {}

    @cached_property
    def kinds(self) -> list[int]:
        """For each block the first one that is like it."""
        found: dict[Any, int] = {}
        inside: dict[int, list[Any]] = {number: [] for number in range(self.depth)}
        for number, names in self._by_block.items():
            inside[number] = [(name.split(".", 2)[2], self.shapes[name]) for name in names]
        return [found.setdefault((self.sizes[i], tuple(inside[i])), i) for i in range(self.depth)]

    @cached_property
    def _by_block(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name in self.shapes:
            if name.startswith("blocks."):
                found.setdefault(int(name.split(".", 2)[1]), []).append(name)
        return found

    def inside(self, number: int) -> list[str]:
        """Names of a block's parameters."""
        return self._by_block[number]

    @cached_property
    def matrices(self) -> dict[int, list[Matrix]]:
        """By kind of block: the matrices that multiply."""
        found: dict[int, list[Matrix]] = {kind: [] for kind in set(self.kinds)}
        for name, shape in self.shapes.items():
            parts = name.split(".")
            if parts[0] == "blocks" and int(parts[1]) in found and len(shape) >= 2:
                leaf = parts[-2]
                divided = "rows" if leaf in COLUMNS else "columns" if leaf in ROWS else "none"
                kind = int(parts[1])
                if len(shape) == 3:
                    found[kind].append(Matrix(shape[1], shape[2], "none", shape[0], self.sizes[kind].top_k))
                else:
                    found[kind].append(Matrix(shape[0], shape[1], divided))
        return found

    def named(self, prefixes: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of the trained parameters whose names begin so."""
        key = ("named", prefixes)
        if key not in self._kept:
            found = [(name, shape) for name, shape in self.shapes.items() if name.startswith(prefixes)]
            self._kept[key] = [(name, shape) for name, shape in found if not name.endswith("expert_bias")]
        listed: list[tuple[str, tuple[int, ...]]] = self._kept[key]
        return listed

    # --- the pipeline -------------------------------------------------------------------------------------------------

    def stages(self, layout: Layout) -> list[Stage]:
        """Of the whole pipeline, in order."""
        if layout.pp == 1:
            return [Stage(0, self.depth, True, True)]
        key = ("stages", layout.stages, layout.split)
        if key not in self._kept:
            ranges = split(self.shape, layout, sequence=self.sequence)
            last = len(ranges) - 1
            self._kept[key] = [Stage(r.start, r.stop, i == 0, i == last) for i, r in enumerate(ranges)]
        found: list[Stage] = self._kept[key]
        return found

    def held(self, layout: Layout, place: int) -> list[Stage]:
        """The stages of one place of the pipeline."""
        return self.all_held(layout)[place]

    def _held(self, layout: Layout, place: int) -> list[Stage]:
        stages = self.stages(layout)
        return stages if layout.pp == 1 else [stages[number] for number in held_by(layout, place)]

    def all_held(self, layout: Layout) -> list[list[Stage]]:
        """The stages of every place of the pipeline."""
        key = ("held", layout.pp, layout.held, layout.schedule in V_SHAPED, layout.split)
        found: list[list[Stage]] | None = self._kept.get(key)
        return found or self.keep(key, [self._held(layout, place) for place in range(layout.pp)])

    def makeup(self, stage: Stage, saved: Any) -> tuple[Any, ...]:
        """What of a stage its time hangs on: kinds of blocks and whether they are run again, with their number."""
        key = ("makeup", stage, saved)
        found: tuple[Any, ...] | None = self._kept.get(key)
        if found is None:
            blocks = range(stage.start, stage.stop)
            count = Counter((self.kinds[number], bool(saved.again(number))) for number in blocks)
            found = self.keep(key, (stage.first, stage.last, tuple(count.items())))
        return found

    def live(self, layout: Layout, micro_batches: int, place: int) -> float:
        """Micro-batches whose saved tensors a place holds at most, for each of its stages."""
        if layout.pp == 1:
            return 1.0
        p, v, m = layout.pp, layout.held, micro_batches
        if layout.schedule == "gpipe":
            return float(m)
        if layout.schedule == "1f1b":
            return float(min(p - place, m))
        if layout.schedule == "interleaved-1f1b":
            turn = m // max(1, m // p)
            return min(2 * (p - 1 - place) + (v - 1) * turn + 1, m * v) / v
        key = ("live", layout.schedule, p, m)
        if key not in self._kept:
            self._kept[key] = order(layout.schedule, ranks=p, micro_batches=m, stages_per_rank=v).peak_live
        return float(self._kept[key][place]) / v

    def places(self, choice: Choice) -> Sequence[int]:
        """Places of a pipeline of which one holds most. Where blocks are alike the first has most in flight, and the
        last the head; else it may be any."""
        layout, key = choice.layout, ("alike", choice.saved)
        alike: bool | None = self._kept.get(key)
        if alike is None:
            again = {bool(choice.saved.again(number)) for number in range(self.depth)}
            alike = self.keep(key, len(again) == 1 and len(set(self.kinds)) == 1)
        plain = layout.schedule in ("1f1b", "interleaved-1f1b") and layout.split is None
        if layout.pp > 1 and not (alike and plain):
            return range(layout.pp)
        return (0,) if layout.pp == 1 else (0, layout.pp - 1)

    # --- memory -------------------------------------------------------------------------------------------------------

    def footprint(self, choice: Choice, place: int) -> Footprint:
        """Bytes of the rank that holds most at a place of the pipeline, for blocks that are not compiled."""
        layout, micro = choice.layout, self.micro_key(choice)
        weights, trained, state = self.standing(layout, place)
        key = ("moving", layout.pp, layout.held, layout.schedule in V_SHAPED, layout.split, place, *micro)
        logits, workspace = self._kept.get(key) or self.keep(key, self._moving(choice, place))
        return Footprint(
            weights=weights,
            gradients=trained,
            optimizer=state,
            saved=self._saved(choice, micro, place),
            logits=logits,
            workspace=workspace + self.whole(choice, place) + states.beside(self, layout, place),
        )

    def whole(self, choice: Choice, place: int) -> int:
        """Bytes of what is divided over fsdp while it is whole, as `parallel.holdings` tells it."""
        layout, several = choice.layout, choice.micro_batches > 1
        if layout.size("fsdp") == 1:
            return 0
        key: tuple[Any, ...] = ("whole", layout.pp, layout.held, layout.schedule in V_SHAPED, layout.split, place)
        key += (layout.tp, layout.ep)
        key += (several, resharded(layout), layout.state, layout.state and layout.size("fsdp"))
        found: int | None = self._kept.get(key)
        return found if found is not None else self.keep(key, self._whole(layout, place, several))

    def _whole(self, layout: Layout, place: int, several: bool) -> int:
        sums = self._sums(Layout(tp=layout.tp, dp_shard=1, ep=layout.ep))
        stages = self.held(layout, place)
        blocks = [sums.weights[i + 1] - sums.weights[i] for stage in stages for i in range(stage.start, stage.stop)]
        ends = sum(sums.ends[name][0] for name in {name for stage in stages for name in self.around(stage)})
        return of_wholes(layout, blocks, ends, value=self.value, several=several)

    def standing(self, layout: Layout, place: int) -> tuple[int, int, int | None]:
        """Bytes of weights, gradients and optimizer state."""
        ranks = (layout.dp_shard or 1) * layout.cp
        shape = (layout.pp, layout.held, layout.schedule in V_SHAPED, layout.split, place)
        key = ("standing", *shape, layout.tp, ranks, layout.ep, layout.state)
        found: tuple[int, int, int | None] | None = self._kept.get(key)
        if found is not None:
            return found
        found = self._standing(layout, place) if layout.state is None else states.standing(self, layout, place)
        self._kept[key] = found
        return found

    def _standing(self, layout: Layout, place: int) -> tuple[int, int, int | None]:
        stages, sums = self.held(layout, place), self._sums(layout)
        ends = {name for stage in stages for name in self.around(stage)}

        def both(summed: list[int], which: int) -> int:
            inside = sum(summed[stage.stop] - summed[stage.start] for stage in stages)
            return inside + sum(sums.ends[name][which] for name in ends)

        state = None if sums.state is None else both(sums.state, 2) + sums.constant
        return both(sums.weights, 0), both(sums.trained, 1), state

    def _moving(self, choice: Choice, place: int) -> tuple[int, int]:
        """Logits of a chunk, workspace."""
        stages, width = self.held(choice.layout, place), math.ceil(self.vocabulary / choice.layout.tp)
        rows = min(self.micro(choice).tokens, chunk_rows(width, self.device))
        logits = rows * width * (self.value + WEIGHT) if any(stage.last for stage in stages) else 0
        kinds = {kind for stage in stages for kind in self.kinds[stage.start : stage.stop]}
        return logits, 2 * max(self.block(choice, kind).whole for kind in kinds)

    def around(self, stage: Stage) -> Iterator[str]:
        """Names of a stage's parameters outside of blocks."""
        for name in self._ends:
            top = name.partition(".")[0]
            if (stage.first and top in ("positions", "embed")) or (
                stage.last and (top in ("norm", "head") or (top == "embed" and self.shape.tied))
            ):
                yield name

    @cached_property
    def _ends(self) -> list[str]:
        return [name for name in self.shapes if not name.startswith("blocks.")]

    def _sums(self, layout: Layout) -> _Sums:
        """Of the first rank of tp and fsdp."""
        key = ("sums", layout.tp, layout.size("fsdp"), layout.ep)
        if key not in self._kept:
            alike = Layout(tp=layout.tp, dp_shard=layout.size("fsdp"), ep=layout.ep)
            parts = portions(self.shape, alike, 0, sequence=self.sequence)
            self._kept[key] = self._summed(parts)
        found: _Sums = self._kept[key]
        return found

    def _summed(self, parts: dict[str, tuple[int, ...]]) -> _Sums:
        constant = self.recipe.optimizer.state_bytes({})
        by_block: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.depth)]
        for name, shape in parts.items():
            if name.startswith("blocks."):
                by_block[int(name.split(".", 2)[1])][name] = shape
        each = {kind: self._bytes(by_block[kind], constant) for kind in set(self.kinds)}
        columns = list(zip(*(each[kind] for kind in self.kinds), strict=True))
        weights, trained, state = ([0, *accumulate(column)] for column in columns)
        ends = {name: self._bytes({name: parts[name]}, constant) for name in self._ends}
        return _Sums(weights, trained, state if constant is not None else None, ends, constant or 0)

    def _bytes(self, parts: dict[str, tuple[int, ...]], constant: int | None) -> tuple[int, int, int]:
        """Weights, gradients and state of some parameters, without what the optimizer keeps once."""
        trained = {name: shape for name, shape in parts.items() if not name.endswith("expert_bias")}
        state = self.recipe.optimizer.state_bytes(trained) - constant if constant is not None else 0
        return _weight(parts), _weight(trained), state

    def micro(self, choice: Choice) -> MicroBatch:
        """A micro-batch on one rank."""
        return MicroBatch(
            shape=self.shape,
            layout=choice.layout,
            sequence=self.sequence,
            rows=choice.rows,
            value=self.value,
            device=self.device,
            plain=self.device != "cpu",
            document=None,
        )

    def block(self, choice: Choice, kind: int) -> BlockBytes:
        """What a block of a kind could keep."""
        key = ("block", kind, *self.micro_key(choice))
        if key not in self._kept:
            self._kept[key] = self.micro(choice).block(kind)
        found: BlockBytes = self._kept[key]
        return found

    def micro_key(self, choice: Choice) -> tuple[Any, ...]:
        """What of a choice the bytes of a micro-batch hang on."""
        layout = choice.layout
        cast = wide_and_whole(layout)
        return (choice.rows, layout.tp, layout.cp, layout.context, layout.sequence_parallel, cast)

    def _saved(self, choice: Choice, micro: tuple[Any, ...], place: int) -> int | None:
        layout, found = choice.layout, 0
        live = self.live(layout, choice.micro_batches, place)
        key = (choice.saved, *micro)
        for stage in self.held(layout, place):
            peak = self._kept.get(("peak", stage, *key), 0)
            if peak == 0:
                peak = self.keep(("peak", stage, *key), self._peak(choice, stage, key))
            if peak is None:
                return None
            found += round(live * peak)
        return found

    def _peak(self, choice: Choice, stage: Stage, key: tuple[Any, ...]) -> int | None:
        """The most bytes of one micro-batch in a stage, as `footprint.peak_of` has it, by sums over all blocks."""
        books: _Books | None = self._kept.get(("books", *key), _NONE)
        if books is _NONE:
            books = self.keep(("books", *key), self._books(choice))
        if books is None:
            return None
        before = books.waiting[stage.start]
        most = max(books.working[stage.start : stage.stop]) - before
        rest = self.micro(choice).rest(first=stage.first, last=stage.last)
        return max(most, books.waiting[stage.stop] - before + rest) + books.rope

    def _books(self, choice: Choice) -> _Books | None:
        """What a policy holds of every block. It sees each block by itself: where it stands tells it enough."""
        alike = {kind: self.block(choice, kind) for kind in set(self.kinds)}
        blocks = [dataclasses.replace(alike[kind], number=number) for number, kind in enumerate(self.kinds)]
        held = choice.saved.held(blocks)
        if held is None:
            return None
        waiting = [0, *accumulate(entry.waiting for entry in held)]
        working = [waiting[i + 1] + entry.working for i, entry in enumerate(held)]
        return _Books(waiting, working, self.micro(choice).rope())

    def keep(self, key: tuple[Any, ...], value: Any) -> Any:
        """Keep what layouts have in common; gives it back."""
        self._kept[key] = value
        return value

    def kept(self, key: tuple[Any, ...]) -> Any:
        """What was kept, or None."""
        return self._kept.get(key)


def _weight(parts: dict[str, tuple[int, ...]]) -> int:
    return sum(WEIGHT * math.prod(shape) for shape in parts.values())


def precision_on(recipe: Any, cluster: Cluster) -> str:
    """The recipe's precision; for 'auto' bf16 where the cluster multiplies it faster than float32."""
    if recipe.precision != "auto":
        return str(recipe.precision)
    return "bf16" if cluster.bf16.value > cluster.fp32.value else "fp32"
