"""A small model on packed documents of uneven lengths, whose ranks serve each other's attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import first_value
from lmworks.parallel import world
from lmworks.parallel.apply import Placement, place
from lmworks.parallel.layout import Layout
from lmworks.parallel.pool import Pool
from lmworks.parallel.servers import Servers
from lmworks.parallel.shard import local
from lmworks.parallel.tasks import Piece, Plan, Sizes, plain
from lmworks.parallel.wire import Running, Sent, Wire, alone
from lmworks.train.ledger import Ledger
from lmworks.train.objective import CrossEntropy
from lmworks.train.rehearse import Seen
from lmworks.train.saved import Keep
from lmworks.train.slots import Saved, combined, divisors
from tests.parallel.served import shuffled

MODEL = DecoderConfig(vocab_size=61, n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48)
ROWS, LENGTH = 4, 260
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward pass over all rows."""

    axes: dict[str, Any]
    servers: Servers | None = Servers(tolerance=0.0, tile=8)
    random: int | None = None
    """Seed of a plan that nobody would make; None: the planner's, or with `at_home` everyone his own."""
    cuts: int = 3
    """In each document of a random plan."""
    at_home: bool = False
    micro: int = ROWS
    saved: Saved = Keep()
    dtype: torch.dtype = torch.float64

    @property
    def layout(self) -> Layout:
        return Layout(**{"dp_shard": 1, **self.axes, "servers": self.servers})


def batch() -> Batch:
    """Rows of documents of 7 to 257 tokens, the first row one long one and a rest, the last one single tokens too."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, MODEL.vocab_size or 0, (ROWS, LENGTH + 1), generator=generator)
    lengths = [[257, 3], [7, 31, 129, 93], [130, 130], [1, 1, 1, 257]]
    documents = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    targets = tokens[:, 1:].clone()
    targets[:, ::5] = -100
    return Batch(tokens[:, :-1].contiguous(), targets, positions, documents, torch.zeros_like(documents))


def learned(rank: int, passes: Sequence[Pass]) -> list[tuple[Seen, dict[str, int]]]:
    """Loss and gradients of each, and the bytes that waited for the backward pass by block."""
    return [_learned(rank, each) for each in passes]


def _learned(rank: int, each: Pass) -> tuple[Seen, dict[str, int]]:
    layout, books = each.layout, Ledger()
    wire = alone() if layout.ranks == 1 else world.wire(layout, world.Seat(rank=rank, world=layout.ranks))
    caches: list[Any] = []
    made = place(
        MODEL,
        wire,
        CPU,
        dtype=each.dtype,
        sequence=LENGTH,
        param_dtype=each.dtype,
        arrange=lambda chunk: caches.extend(each.saved.apply(chunk, books)),
    )
    made.fill(lambda name, box: first_value(name, box.whole, MODEL.n_layers, 5)[box.index])
    for chunk in made.chunks:
        if isinstance(chunk.reach, Pool) and (each.at_home or each.random is not None):
            chunk.reach = dataclasses.replace(chunk.reach, planner=partial(planned, each.random, each.cuts))
    total = _backward(made, each.micro, books)
    for cache in caches:
        cache.close()
    gradients = {
        name: (made.boxes[name], local(p.grad).numpy().copy())
        for name, p in made.model.named_parameters()
        if p.grad is not None
    }
    assert books.total == 0, "nothing waits any more"
    bills = {key: (bill.calls, bill.bytes) for key, bill in wire.bills.items()}
    return Seen(losses=[total], norms=[], gradients=gradients, weights={}, bills=bills), dict(books.at_peak)


def _backward(made: Placement, micro: int, books: Ledger) -> float:
    whole, objective = batch(), CrossEntropy()
    counts = divisors(objective, whole)
    mine = whole[slice(made.share[0], None, made.share[1])]

    def loss_of(model: Backbone, part: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
        return combined(objective.loss(model, part, hidden_BTD), counts)

    with books.counting():
        own = made.backward(mine.split(micro), loss_of)
    return float(made.total_of_tokens(own[None].double()) if made.layout.ranks > 1 else own)


def planned(seed: int | None, cuts: int, pieces: Sequence[Piece], ranks: int, sizes: Sizes) -> Plan:
    """A plan that nobody would make; without a seed everyone serves himself."""
    whole = plain(pieces, ranks)
    return whole if seed is None else shuffled(whole, seed, cuts=cuts)


# --- the order of what happens ------------------------------------------------------------------------------------


class Told(Wire):
    """A wire that writes down when an exchange begins and when somebody has waited for it."""

    def __init__(self, like: Wire) -> None:
        super().__init__(like.layout, like.rank, like._groups)
        self.log: list[str] = []
        self._begun = 0

    def begin_swap(self, sent: Sequence[Sent], received: Sequence[tuple[Tensor, int]], axis: str) -> Running:
        """As it is, numbered."""
        number, self._begun = self._begun, self._begun + 1
        self.log.append(f"begin {number}")
        return Waited(super().begin_swap(sent, received, axis), number, self.log)


@dataclass(frozen=True)
class Waited:
    """An exchange that writes down its end."""

    running: Running
    number: int
    log: list[str]

    def wait(self) -> bool:
        """As it is."""
        done = self.running.wait()
        self.log.append(f"wait {self.number}")
        return done


def in_order(rank: int, ranks: int) -> list[str]:
    """What happens in one block, forward and backward, in turns."""
    layout = Layout(dp_shard=ranks, servers=Servers())
    wire = Told(world.wire(layout, world.Seat(rank=rank, world=ranks)))
    model = dataclasses.replace(MODEL, n_layers=1).build(dtype=torch.float64, param_dtype=torch.float64)
    for name, p in model.named_parameters():
        p.data.copy_(first_value(name, tuple(p.shape), 1, 5))
    model.reach = Pool(wire, MODEL.blocks()[0], partial(planned, 3, 3))
    model.in_turns = True
    attention: Any = model.blocks["0"].attn
    for name in ("q_proj", "o_proj"):
        attention.get_submodule(name).register_forward_hook(partial(_log, wire.log, name))
    part = batch()[slice(rank, None, ranks)]
    model(part.tokens_BT, positions_BT=part.positions_BT, documents_BT=part.documents_BT).sum().backward()
    return wire.log


def _log(log: list[str], name: str, module: Any, args: Any, out: Tensor) -> None:
    log.append(f"{name} forward")
    out.register_hook(lambda grad: log.append(f"{name} backward"))


def disagreeing(rank: int, ranks: int) -> str:
    """Every rank makes a plan of its own: what it is told."""
    wire = world.wire(Layout(dp_shard=ranks, servers=Servers()), world.Seat(rank=rank, world=ranks))
    pool = Pool(wire, MODEL.blocks()[0], partial(planned, rank, 3))
    part = batch()[slice(rank, None, ranks)]
    facts = {"batch": part.rows, "new": LENGTH, "cached": 0, "window": None, "device": CPU, "dtype": torch.float64}
    try:
        pool(**facts, documents_BK=part.documents_BT)
    except Exception as error:  # noqa: BLE001  (told to the test)
        return str(error)
    return ""


def remarks(rank: int, all_servers: Sequence[Servers]) -> list[list[tuple[str, ...]]]:
    """What a placement has to say after each of two passes, under each of the settings."""
    found = []
    for servers in all_servers:
        layout = Layout(dp_shard=2, servers=servers)
        wire = world.wire(layout, world.Seat(rank=rank, world=2))
        made = place(MODEL, wire, CPU, dtype=torch.float64, sequence=LENGTH, param_dtype=torch.float64)
        made.fill(lambda name, box: first_value(name, box.whole, MODEL.n_layers, 5)[box.index])
        said = []
        for _ in range(2):
            _backward(made, ROWS, Ledger(on=False))
            said.append(made.remarks())
        found.append(said)
    return found
