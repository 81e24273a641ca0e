"""Ranks compute each other's attention, so that nobody waits for whoever holds the longest documents.

Zhuang, Chen, Pang, Gu, Zhu, Jiang, Stoica, Xing, Zhang, "Efficient Long-context Language Model Training by Core
Attention Disaggregation", MLSys 2026, arXiv 2510.18121. What is told here of its method and figures is from two
independent summaries of its sections, the authors' blog and its repository; the paper itself was not at hand.

## What it does

Packed rows hold equal numbers of tokens, and so equal memory and equal work in every product but one: attention grows
with the square of a document's length. The rank with the longest document keeps all others waiting; the more ranks,
the longer. softmax(q k^T) v has no weights and leaves nothing behind but its result and lse, so it can be computed
anywhere. Here queries are cut into tasks that a planner shares over all ranks that hold tokens of the same blocks.
Everything else stays where it is. `layout.use = "distca"` does it for as many ranks as there are; what it became stands
in the run's `recipe.toml` as a plain `layout` with `servers`.

## How it works

**Task.** q queries of a document and all kv keys up to the last of them: q kv - q (q - 1) / 2 pairs. Every rank is
owner of its tokens and server of tasks by turns.

**Plan.** Queries i and L - 1 - i of a document of L tokens see L + 1 keys together, so a shard and its mirror image
cost as many pairs as they have couples, times L + 1. From a rank above the mean, the shard with the most pairs per byte
goes to the rank that lacks most, until the largest load is at most 1 + `tolerance` of the mean; of a document that is
too large, the couples nearest to the middle, which see the fewest keys. Cuts keep to multiples of `tile`.

**Block.** Norm, q, k, v and rotary embedding; queries and keys go where the plan says; attention; results come back;
the rest of the block. Keys that several tasks of a server use go once. **Backward**, the owner sends q, k, v, out, lse
and dout, and gradients of keys that several servers found are added at their owner; or, with `keep = "cache"`, servers
keep what they were sent.

**Ping-pong.** Two halves of a micro-batch go through the block in turns: one half's exchange runs beside the other's
work, backward as well.

**Bound.** A document cut into s equal shards on s servers moves h_q + h_kv (s + 1) / 2 bytes per token, with h_q and
h_kv those of a token's queries and of its keys and values. That hides behind t seconds of linear work per token on
links of B bytes per second where

    s <= 2 (t B - h_q) / h_kv - 1

For Llama 34B in bf16 on H100 at half of their peak, and 50 GB/s, this is 29 (32 with GB of 2^30 bytes; the paper says
31). Below 2 not even two servers can share a document for nothing: say `link` and `rate`, and such a network is
refused.

## When to use it

- Documents of very unequal length beside rows long enough for the longest: long-context training, repositories, books.
  `lmworks rehearse RECIPE --ranks 8 --documents` tells how long ranks would wait for each other on a recipe's own
  documents, and how long with shared attention.
- Several rows in a micro-batch, for ping-pong to have two halves.
- Not where rows are short beside the hidden size: attention is then a small part of the work, and so is the waiting.

## Differences

- Bytes that lie at the server already are not sent and not counted by the planner; the reference counts whole
  documents. When the best candidate cannot be cut, the next one is tried; the reference gives the recipient up. It
  stops when the largest load is within the tolerance, not when each recipient is. Odd lengths are planned, not refused.
- A plan may start from documents that lie over several ranks (`cp`), in any order of tokens.
- Each rank works the plan out, and a hash of it is compared; the reference plans on one.
- Exchanges are uneven all-to-alls of `torch.distributed`; the reference writes into NVSHMEM buffers of fixed size.
- Halves take turns within one block. The paper runs the linear work of the next block before this one has ended; that
  would break the one call of a block that FSDP, recomputation and memory policies hang on.
- Ranks of a pipeline's stage share attention among themselves. In the paper all stages do: all forward in a tick, or
  all backward. Such ticks are derived and simulated here (`parallel/aligned.py`), not run.

## Limits

- Causal attention of packed documents only: no sliding windows.
- On a GPU tasks are served by plain PyTorch, some hundred queries at a time: exact, and slower than a fused kernel. No
  step has been timed on several GPUs.
- The planner looks at pairs. A shard of fewer queries than a kernel's tile costs more than its pairs say.
- Every rank plans every micro-batch on its CPU while its device waits: milliseconds for hundreds of documents, more for
  thousands, and for `order = "striped"`, whose runs are single tokens.
- The queries of a document may be cut, the keys of a task not: one very long document can bring all its keys to one
  server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from lmworks.core.errors import LmworksError, Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat, PositiveInt
from lmworks.model.sizes import linear_flops
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.parallel.servers import Servers
from lmworks.parallel.tasks import Sizes


@final
@dataclass(frozen=True, kw_only=True)
class DistCA(Arrangement):
    """Ranks that share the rows, and with those of cp each other's attention."""

    dp_shard: PositiveInt | None = None
    """Ranks that train on other rows (FSDP). Left out: all that pp, cp and tp leave."""

    pp: PositiveInt = 1
    """Ranks of a pipeline; those of one stage share their attention."""
    cp: PositiveInt = 1
    """Ranks that hold other tokens of the same rows, for rows too long for one."""
    tp: PositiveInt = 1
    """Ranks that divide heads and products; together they are one server."""
    tolerance: NonNegativeFloat = 0.1
    """By which share the most pairs of a query and a key on one rank may exceed their mean. More of it moves less."""
    tile: PositiveInt = 128
    """Queries that stay together: documents are cut at multiples of it only, and shorter ones stay whole."""
    ping_pong: bool | None = None
    """Take a micro-batch as two halves of its rows in turns. Left out: where a micro-batch has several rows."""
    buffer_bytes: PositiveInt | None = None
    """Bytes that a rank may send, or receive, in one exchange of a forward pass. Where a plan needs more, its tolerance
    is raised until it fits. Left out: no bound."""
    keep: Literal["resend", "cache"] = "resend"
    """What waits for the backward pass: each rank keeps what its own tokens need ('resend'), or what it computed
    ('cache')."""
    link: PositiveFloat | None = None
    """Bytes per second of a rank's link in one direction; with `rate`, too slow a network is refused."""
    rate: PositiveFloat | None = None
    """Floating-point operations per second that a rank reaches in products."""

    @property
    def asked(self) -> int | None:
        """All of them where dp_shard is given; those of pp, cp and tp at least."""
        least = self.pp * self.cp * self.tp * (self.dp_shard or 1)
        return least if self.dp_shard or least > 1 else None

    @property
    def servers(self) -> Servers:
        """What the layout is given."""
        return Servers(
            tolerance=self.tolerance,
            tile=self.tile,
            ping_pong=self.ping_pong,
            buffer_bytes=self.buffer_bytes,
            keep=self.keep,
        )

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Models whose attention is not causal over whole documents, networks that hide nothing."""
        yield from self.servers.problems(None, recipe)
        for name, other in (("link", "rate"), ("rate", "link")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                yield Problem(path=name, text=f"has no effect without {other}")
        if self.link is not None and self.rate is not None:
            yield from self._network(recipe, self.link, self.rate)

    def _network(self, recipe: Any, link: float, rate: float) -> Iterator[Problem]:
        try:
            blocks = recipe.model.blocks()
        except LmworksError:
            return  # told where it is wrong, or a folder that is not there yet
        value_bytes = 4 if recipe.precision == "fp32" else 2
        heads, groups = (max(of) // self.tp for of in zip(*((b.n_heads, b.n_kv_heads) for b in blocks), strict=True))
        sizes = Sizes.of(heads, groups, blocks[0].head_dim, value_bytes)
        seconds = linear_flops(getattr(recipe.model, "shape", recipe.model)) / self.tp / rate
        shards = hidden_shards(seconds, link, sizes)
        if shards < 2:
            enough = (3 * sizes.keys / 2 + sizes.query) / seconds
            text = f"a document could be shared by {max(0.0, shards):.2g} ranks before its exchanges outlast the work"
            legal = f"a link of {enough:.3g} bytes per second or more, or a layout without servers"
            yield Problem(path="link", text=f"{text} that hides them: too slow for this model. Legal: {legal}")

    def settle(self, world: int, recipe: Any) -> Layout:
        """The plain layout with servers; without, where no two ranks hold the same blocks. Raises RecipeError for
        ranks that cannot be arranged so."""
        plain = Layout(pp=self.pp, dp_shard=self.dp_shard, cp=self.cp, tp=self.tp).settle(world)
        return plain if plain.size("attention") == 1 else replace(plain, servers=self.servers)


def document_bytes(length: int, shards: int, sizes: Sizes) -> float:
    """Bytes that go to `shards` servers for a document that is cut into as many equal shards, none of it there."""
    return length * (sizes.query + sizes.keys * (shards + 1) / 2)


def hidden_shards(seconds_per_token: float, bytes_per_second: float, sizes: Sizes) -> float:
    """s: into how many shards a document can be cut before its bytes take longer than its tokens' linear work."""
    return 2 * (seconds_per_token * bytes_per_second - sizes.query) / sizes.keys - 1
