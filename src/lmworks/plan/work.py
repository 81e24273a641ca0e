"""Seconds and bytes of one micro-batch in one block, and of what stands around blocks: what steps are made of.

    compute   products at the fitted share of the peak; and what moves through memory between them: each byte that a
              block saves for its backward pass is written once and read once, each operand of a product in eight bits
              read twice and written. The backward pass takes both twice; attention that keeps no scores takes its
              products two and a half times
    tensor    exchanges over tp; nothing else runs meanwhile
    context   exchanges over cp that attention does not hide, round by round (`rounds.py`)
    gather    weights before a block, over fsdp
    reduce    gradients behind it, over fsdp, then over dp_replicate
    once      with a placement of states: what its ranks exchange when all passes are made (`states.py`)
    away      saved tensors that go to a disk or to the host, and come back

`bytes_` fields are what a rank sends, as `parallel.traffic` has it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import UsageError
from lmworks.model.sizes import mean_keys
from lmworks.parallel.holdings import resharded
from lmworks.parallel.layout import Layout
from lmworks.plan import rounds, states
from lmworks.plan.choice import Choice, Matrix, Stage
from lmworks.plan.cluster import Cluster, Dtype
from lmworks.plan.links import Ring, of_axis
from lmworks.plan.shape import Ground

ROUNDS = 32
"""Ranks of cp whose rounds are run one by one; with more they are told in closed form."""
LOGITS = 4
"""Bytes of a logit in the loss."""
WEIGHT = 4
"""Bytes of a weight, and of its gradient."""
SCORE_BYTES = 5
"""What a score keeps where scores are in memory: two bytes twice, before and behind dropout, and its mask."""


@final
@dataclass(frozen=True, kw_only=True)
class Practice:
    """How the software that runs a layout works. The defaults are lmworks' own."""

    square: bool = False
    """Attention multiplies the whole square of tokens, and not the causal half."""
    scores_in_memory: bool = False
    """Attention writes its scores to memory, as before fused kernels."""
    data_overlaps: bool = True
    """Gradients are summed while the last backward pass still runs."""
    gathers_overlap: bool = True
    """Weights are gathered while the block before computes."""
    tensor_overlaps: bool = False
    """Exchanges over tp go in pieces beside the products that make or take them (AsyncTP): waited for is what the
    products do not hide, and one of tp pieces."""
    gradient_bytes: int = 4
    """What a value of a gradient takes when ranks sum it."""
    shared_exchanges: bool = False
    """Attention and FFN of a parallel block share their exchanges over tp."""
    sends_overlap: bool = False
    """What stages send each other goes beside computing, and nobody waits for it."""
    divided_sends: bool = False
    """Ranks of tp send a part each between stages, and gather it behind (scatter and gather)."""


@final
@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block, or what stands around blocks, in one micro-batch on one rank; seconds, but for bytes_."""

    forward: float = 0.0
    """Computing, forward."""
    backward: float = 0.0
    """Computing, backward, what is run again left out."""
    again: float = 0.0
    """Computing the forward pass again, where all of it is run again."""
    again_moved: float = 0.0
    """The part of that which moves memory, where products are kept."""
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    tensor_again: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0
    away: float = 0.0
    """One way."""
    gather: float = 0.0
    """Each time that weights are gathered."""
    gather_again: float = 0.0
    """The same for the backward pass, of a block that has given them back."""
    reduce: float = 0.0
    """Once a step; with a placement of states and no pipeline, with every micro-batch."""
    once: float = 0.0
    """When all passes are made."""
    bytes_gather: float = 0.0
    bytes_reduce: float = 0.0
    bytes_replicate: float = 0.0


class Work:
    """Pieces of a ground under layouts, kept by what they hang on."""

    def __init__(self, ground: Ground, practice: Practice | None = None) -> None:
        self.ground, self.cluster = ground, ground.cluster
        self.practice = practice or Practice()
        self.efficiency = self.cluster.efficiency
        self.memory = self.cluster.memory_bytes_per_second.value * self.efficiency.memory
        fp8 = ground.precision.startswith("float8")
        products: Dtype = "fp8" if fp8 else "fp32" if ground.precision == "fp32" else "bf16"
        self.peak = self.cluster.flops(products)
        self.parallel_blocks = bool(getattr(ground.shape, "parallel_block", False))
        self.plain_peak = self.cluster.flops("fp32" if ground.precision == "fp32" else "bf16")

    def block(self, choice: Choice, kind: int) -> Piece:
        """A block of a kind."""
        layout = choice.layout
        key: tuple[Any, ...] = ("piece", kind, choice.rows, layout.tp, layout.cp, layout.context, layout.order)
        key += (layout.sequence_parallel, layout.dp_shard, layout.dp_replicate, layout.ep, choice.saved.leaves())
        key += (layout.state, layout.state and (layout.pp > 1, resharded(layout)))
        found: Piece | None = self.ground.kept(key)
        return found or self.ground.keep(key, self._block(choice, kind))

    def _block(self, choice: Choice, kind: int) -> Piece:
        ground, layout = self.ground, choice.layout
        tokens = choice.rows * ground.sequence // layout.cp
        products = sum(self._product(matrix, tokens, layout.tp) for matrix in ground.matrices[kind])
        attention = self._attention(layout, kind, tokens)
        moved = self._moved(choice, kind, tokens) + self._cast(kind, tokens, layout.tp)
        forth, back = self._context(choice, kind, attention)
        again = 3 if layout.sequence_parallel else 2
        shared = 0.5 if self.practice.shared_exchanges and self.parallel_blocks else 1.0
        gathers = self._data(choice, f"blocks.{kind}.")
        return Piece(
            forward=products + attention + moved,
            backward=2 * products + (2.0 if self.practice.scores_in_memory else 2.5) * attention + 2 * moved,
            again=products + attention + moved,
            again_moved=moved,
            tensor_forward=self._beside(layout, shared * self._tensor(layout, tokens, 4, 2), products),
            tensor_backward=self._beside(layout, shared * self._tensor(layout, tokens, 4, 2), 2 * products),
            tensor_again=self._beside(layout, shared * self._tensor(layout, tokens, again, again / 2), products),
            context_forward=forth,
            context_backward=back,
            away=self._away(choice, kind),
            **gathers,
        )

    def first(self, choice: Choice) -> Piece:
        """The token table."""
        tokens = choice.rows * self.ground.sequence // choice.layout.cp
        exchange = self._tensor(choice.layout, tokens, 2, 1)
        return Piece(tensor_forward=exchange, **self._data(choice, "embed", "positions"))

    def last(self, choice: Choice, *, alone: bool) -> Piece:
        """The final norm, the head and the loss; `alone`: the token table is on another rank."""
        ground, layout = self.ground, choice.layout
        tokens = choice.rows * ground.sequence // layout.cp
        head = Matrix(ground.vocabulary, ground.shape.hidden_size, "rows")
        product = self._product(head, tokens, layout.tp, plain=True)
        moved = 2 * LOGITS * tokens * ground.vocabulary / layout.tp / self.memory
        names = ["norm", "head", *(["embed"] if ground.shape.tied and alone else [])]
        # half of the exchanges forward, and what ranks hear of each token's loss
        n = layout.tp
        exchange = self._tensor(layout, tokens, 1.5 if layout.sequence_parallel else 1, 1)
        loss = self.ring(layout, "tp").seconds((n - 1) * 2 * tokens * LOGITS, 2) if n > 1 else 0.0
        return Piece(
            forward=product + moved,
            backward=2 * (product + moved),
            tensor_forward=exchange + loss,
            tensor_backward=exchange,
            **self._data(choice, *names),
        )

    def pieces(self, choice: Choice, stage: Stage) -> list[Piece]:
        """A stage, in the order of the forward pass."""
        found = [self.first(choice)] if stage.first else []
        found += [self.block(choice, self.ground.kinds[number]) for number in range(stage.start, stage.stop)]
        return [*found, self.last(choice, alone=not stage.first)] if stage.last else found

    # --- parts --------------------------------------------------------------------------------------------------------

    def _product(self, matrix: Matrix, tokens: int, tp: int, *, plain: bool = False) -> float:
        sides = matrix.sides(tokens, tp)
        count = 2.0 * math.prod(sides) * (matrix.experts or 1)
        narrow = plain or matrix.experts
        return count / ((self.plain_peak if narrow else self.peak) * self.efficiency.share(min(sides)))

    def _attention(self, layout: Layout, kind: int, tokens: int) -> float:
        size, sequence = self.ground.sizes[kind], self.ground.sequence
        keys: float = sequence if self.practice.square else mean_keys(sequence, size.window)
        if layout.cp > 1 and layout.order == "contiguous":
            keys *= 2 - 1 / layout.cp  # the last rank sees most, and the others wait
        count = 4.0 * size.n_heads / layout.tp * size.head_dim * keys * tokens
        return count / (self.plain_peak * self.efficiency.share(size.head_dim))

    def _moved(self, choice: Choice, kind: int, tokens: int) -> float:
        mine = self.ground.block(choice, kind).sizes
        assert mine is not None, "a block knows its sizes"
        moved = 2.0 * self.ground.value * self.ground.shape.saved_values_per_token(mine)
        if self.practice.scores_in_memory:
            moved += 2.0 * SCORE_BYTES * mine.n_heads * self.ground.sequence
        return float(tokens * moved / self.memory)

    def _cast(self, kind: int, tokens: int, tp: int) -> float:
        """Operands of products in eight bits: read for their scale, read again, and written."""
        if self.peak == self.plain_peak:
            return 0.0
        values = 0.0
        for matrix in self.ground.matrices[kind]:
            if not matrix.experts:
                _, rows, columns = matrix.sides(tokens, tp)
                values += columns * (tokens + rows)
        return values * (2 * self.ground.value + 1) / self.memory

    def _tensor(self, layout: Layout, tokens: int, times: float, calls: float) -> float:
        """`times` f X of hidden states in so many all-reduces."""
        n = layout.tp
        hidden = tokens * self.ground.shape.hidden_size * self.ground.value
        return self.ring(layout, "tp").seconds(times * (n - 1) / n * hidden, calls) if n > 1 else 0.0

    def _beside(self, layout: Layout, taken: float, products: float) -> float:
        """What of an exchange over tp is waited for."""
        return max(taken - products, taken / layout.tp) if self.practice.tensor_overlaps else taken

    def _context(self, choice: Choice, kind: int, attention: float) -> tuple[float, float]:
        """What a block waits for over cp beside attention, forward and backward: its rounds on the clock."""
        layout, size = choice.layout, self.ground.sizes[kind]
        if layout.cp == 1:
            return 0.0, 0.0
        calls = rounds.Calls(
            engine=layout.context,
            order=layout.order,
            ranks=layout.cp,
            rows=choice.rows,
            sequence=self.ground.sequence,
            heads=size.n_heads // layout.tp,
            groups=size.n_kv_heads // layout.tp,
            head_dim=size.head_dim,
            value_bytes=self.ground.value,
            rate=1.0,
        )
        if layout.cp > ROUNDS:
            return self._beside_attention(calls, layout, attention)
        busiest = calls.seconds(max(sum(row) for row in calls.pairs()), rounds.FORWARD)
        calls = dataclasses.replace(calls, rate=busiest / attention)  # so that the busiest rank takes as long as here
        links = self.ring(layout, "cp")
        rate, hop = links.bytes_per_second, links.latency_seconds / math.log2(layout.cp)
        carried = rounds.Links(line=rate, port=rate, latency=hop)
        return rounds.forward(calls, carried).exposed, rounds.backward(calls, carried).exposed

    def _beside_attention(self, calls: rounds.Calls, layout: Layout, attention: float) -> tuple[float, float]:
        """The same where rounds are very many: a ring's hide behind attention, but for one; no other's do."""
        ring, circle = self.ring(layout, "cp"), layout.context in ("ring", "tokenring")
        found = []
        for way, behind in ((calls.ways.forward, attention), (calls.ways.backward, 2.5 * attention)):
            taken = ring.seconds(calls.tokens * (layout.cp - 1) * sum(way), layout.cp - 1 if circle else 2)
            found.append(max(taken - behind, taken / layout.cp) if circle else taken)
        return found[0], found[1]

    def _away(self, choice: Choice, kind: int) -> float:
        if not choice.saved.leaves():
            return 0.0
        to = getattr(choice.saved, "to", "disk")
        figure = self.cluster.host_bytes_per_second if to == "host" else self.cluster.disk_bytes_per_second
        if figure is None:
            text = f"has no figure for the {to} that saved tensors go to"
            raise UsageError(text, where=self.cluster.name, next_step=f"give {to}_bytes_per_second, or another saved")
        return self.ground.block(choice, kind).whole / figure.value

    def _data(self, choice: Choice, *prefixes: str) -> dict[str, float]:
        """Gathers and sums of gradients of the parameters with these names, on the first rank."""
        layout = choice.layout
        key: tuple[Any, ...] = ("data", prefixes, layout.tp, layout.cp, layout.dp_shard, layout.dp_replicate, layout.ep)
        key += (layout.state, layout.state and (layout.pp > 1, resharded(layout)))
        found: dict[str, float] | None = self.ground.kept(key)
        if found is not None:
            return found
        found = self._exchanged(layout, prefixes) if layout.state is None else self._placed(layout, prefixes)
        self.ground.keep(key, found)
        return found

    def _placed(self, layout: Layout, prefixes: tuple[str, ...]) -> dict[str, float]:
        """The same of a placement of states."""
        taken = dict.fromkeys(("gather", "again", "sum", "once"), 0.0)
        size = self.practice.gradient_bytes
        for each in states.exchanges(self.ground.named(prefixes), layout, value=self.ground.value, summed=size):
            taken[each.moment] += states.seconds(self.cluster, layout, each)
        return {
            "gather": taken["gather"],
            "gather_again": taken["again"],
            "reduce": taken["sum"],
            "once": taken["once"],
        }

    def _exchanged(self, layout: Layout, prefixes: tuple[str, ...]) -> dict[str, float]:
        n, copies, edp = layout.size("fsdp"), layout.dp_replicate, layout.size("edp")
        padded = experts = 0.0
        for name, shape in self.ground.named(prefixes):
            if ".ffn.experts." in name and layout.ep > 1:
                experts += math.prod(shape) / layout.ep
            else:
                rows, *rest = states.on_first(name, shape, layout.tp)
                padded += -(-rows // n) * n * math.prod(rest)  # rows filled up to a multiple of n
        f = (n - 1) / n
        gathered = f * min(WEIGHT, self.ground.value) * padded
        size = self.practice.gradient_bytes
        summed = f * size * padded
        copied = 2 * (copies - 1) / copies * size * (padded / n + experts)
        fsdp, replicate = self.ring(layout, "fsdp"), self.ring(layout, "dp_replicate")
        of_experts = 2 * (edp - 1) / edp * size * experts
        return {
            "gather": fsdp.seconds(gathered),
            "gather_again": fsdp.seconds(gathered),
            "reduce": fsdp.seconds(summed + of_experts) + replicate.seconds(copied),
            "bytes_gather": gathered,
            "bytes_reduce": summed,
            "bytes_replicate": copied,
        }

    def ring(self, layout: Layout, axis: str) -> Ring:
        """Of an axis."""
        key = ("ring", axis, layout.tp, layout.cp, layout.dp_shard, layout.dp_replicate)
        found: Ring | None = self.ground.kept(key)
        return found or self.ground.keep(key, of_axis(self.cluster, layout, axis))


def update_seconds(values: float, state_bytes: float, cluster: Cluster) -> float:
    """An optimizer's step: weights read and written, gradients read, state read and written."""
    moved = 3 * WEIGHT * values + 2 * state_bytes
    return moved / (cluster.memory_bytes_per_second.value * cluster.efficiency.memory)


def keeps_products(saved: Any) -> bool:
    """Whether blocks that are run again keep what their products gave."""
    return getattr(saved, "keep", "input") == "products"
