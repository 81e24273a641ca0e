"""Tensor parallel: heads, FFN columns and vocabulary of a model divided among the ranks of tp.

What is cut is read from the model's axes: G.l (key/value groups with their query heads), F.l and V. The rows that write
such an axis and the columns that read it go to the same rank, so a block exchanges hidden states twice forward and
twice backward and nothing else. The model's code is the same; it only finds smaller matrices.

With `sequence_parallel` the residual stream between is divided by tokens, and the same bytes do more: what was a sum
that every rank keeps becomes a sum of which every rank keeps its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lmworks.core.errors import Problem, RecipeError
from lmworks.model.attention import Attention
from lmworks.model.axes import axes
from lmworks.model.backbone import Backbone
from lmworks.model.layers import Linear
from lmworks.parallel import crossing, sliced
from lmworks.parallel.shard import Cut, shares
from lmworks.parallel.vocabulary import DividedEmbedding, DividedVocabulary
from lmworks.parallel.wire import Wire

READERS = ("attn.o_proj", "ffn.down_proj")
"""Matrices that read a divided axis: their products are summed over the ranks."""
ENTERED = {"attn": ("q_proj", "k_proj", "v_proj"), "ffn": ("gate_proj", "up_proj")}
"""Matrices that read all tokens, by what they belong to."""
WITHIN = (".q_norm.weight", ".k_norm.weight")
"""Whole parameters that act on divided heads: every rank has a part of their gradient."""


def cuts_for(model: Backbone, wire: Wire) -> dict[str, Cut]:
    """How each parameter is cut, by name; those that are not named stay whole."""
    ranks, place = wire.size("tp"), wire.place("tp")
    found: dict[str, Cut] = {}
    if ranks == 1:
        return found
    for axis in axes(model).values():
        if axis.name.partition(".")[0] not in ("V", "G", "F"):
            continue
        if axis.name[0] == "G" and axis.size % ranks:
            text = f"{ranks} does not divide the {axis.size} key/value heads of block {axis.name[2:]}"
            raise RecipeError([Problem(path="layout.tp", text=text)])
        start, length = shares(axis.size, ranks)[place]
        for use in axis.uses:
            assert use.outer == 1, "the rows of an index lie together"
            found[use.tensor] = Cut(
                dim=use.dim, whole=axis.size * use.inner, offset=start * use.inner, length=length * use.inner
            )
    return found


def connect(model: Backbone, cuts: Mapping[str, Cut], wire: Wire, *, tokens_divided: bool, slices: int = 1) -> None:
    """Put exchanges where the matrices of a model that is divided over tp meet; in `slices`, beside the products."""
    if wire.size("tp") == 1:
        return
    if model.embed is not None:
        start = cuts["embed.weight"].offset
        model.embed = DividedEmbedding(model.embed, start, wire, tokens_divided=tokens_divided)
    table = cuts.get("head.weight") or cuts.get("embed.weight")
    if table is not None:
        model.vocabulary = DividedVocabulary(wire, table.offset, table.length, table.whole)
    for block in model.blocks.values():
        if slices > 1:
            _divide_entering(block, wire, slices, tokens_divided=tokens_divided)
        else:
            _enter(block, wire, tokens_divided=tokens_divided)
        for path in READERS:
            parent, _, child = path.rpartition(".")
            reader = block.get_submodule(path)
            assert isinstance(reader, Linear)
            made = Reader(reader, wire, tokens_divided=tokens_divided, slices=slices)
            setattr(block.get_submodule(parent), child, made)
    if tokens_divided:
        _between(model, wire)


def partial_over_tp(name: str, *, tokens_divided: bool) -> bool:
    """Whether a whole parameter's gradient on one rank of tp is only a part of it: the ranks' gradients are summed.

    Within divided heads always; between the products when each rank saw other tokens.
    """
    return tokens_divided or name.endswith(WITHIN)


class Reader(Linear):
    """A product over a divided axis: the ranks' products are summed, then the bias is added, once."""

    def __init__(self, linear: Linear, wire: Wire, *, tokens_divided: bool, slices: int = 1) -> None:
        super(nn.Linear, self).__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.wire = wire
        self.tokens_divided = tokens_divided
        self.slices = slices

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, in / tp) -> (B, T, out); (B, T / tp, out) where tokens are divided."""
        if self.slices > 1:
            out = sliced.reader(input, self.weight, self.wire, self.slices, divided=self.tokens_divided)
        else:
            out = self._summed(self.product(input, self.weight, None))
        bias: Tensor | None = self.bias
        return out if bias is None else out + bias.to(out.dtype)

    def _summed(self, part: Tensor) -> Tensor:
        if self.tokens_divided:
            return crossing.scatter_sum(part, self.wire, "tp", 1)
        return crossing.sum_over(part, self.wire, "tp")


def _enter(block: nn.Module, wire: Wire, *, tokens_divided: bool) -> None:
    """What happens in front of attention and FFN: every rank gets all tokens."""
    attention, enter = block.get_submodule("attn"), _entering(wire, tokens_divided=tokens_divided)
    assert isinstance(attention, Attention)
    attention.enter = enter
    block.get_submodule("ffn").register_forward_pre_hook(lambda _, args, enter=enter: (enter(args[0]), *args[1:]))


def _divide_entering(block: nn.Module, wire: Wire, slices: int, *, tokens_divided: bool) -> None:
    """The same, slice by slice, beside the products that read them."""
    for path, names in ENTERED.items():
        parent = block.get_submodule(path)
        linears = [(name, child) for name, child in parent.named_children() if name in names]
        assert all(type(child) is Linear for _, child in linears), "plain matrices read what is gathered"
        together = sliced.Columns([child for _, child in linears], wire, slices, tokens_divided=tokens_divided)  # type: ignore[misc]  # all are Linear
        for (name, _), member in zip(linears, together.members, strict=True):
            setattr(parent, name, member)


def _entering(wire: Wire, *, tokens_divided: bool) -> Callable[[Tensor], Tensor]:
    """What happens in front of attention or FFN: every rank gets all tokens."""

    def enter(x: Tensor) -> Tensor:
        return crossing.gather(x, wire, "tp", 1) if tokens_divided else crossing.copy(x, wire, "tp")

    return enter


def _between(model: Backbone, wire: Wire) -> None:
    """Divide the tokens of the position table's rows, gather those of the final norm."""

    def divide_tokens(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return crossing.own_part(out, wire, "tp", 1)

    def gather_tokens(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return crossing.gather_alike(out, wire, "tp", 1)

    if model.positions is not None:
        model.positions.register_forward_hook(divide_tokens)
    if model.norm is not None:
        model.norm.register_forward_hook(gather_tokens)
