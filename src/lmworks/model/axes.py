"""Axes: index sets that several tensors share, with who writes each and who reads it.

Cutting, growing, merging, adapters and sharding all work on axes, not on modules: a change of axis F of block 3 is a
change of the rows of its gate_proj and up_proj and of the columns of its down_proj, together.

| axis | index set           | writers (rows)                           | readers (columns)       | along for the ride |
|------|---------------------|------------------------------------------|-------------------------|--------------------|
| V    | token ids           | embed, head                              |                         |                    |
| P    | places (GPT-2)      | positions                                |                         |                    |
| D    | residual stream     | embed, positions, o_proj, down_proj      | q, k, v, gate, up, head | norms              |
| G.l  | key/value groups    | k, v: h rows each; q: R h rows           | o_proj: R h columns     | key/value cache    |
| R.l  | query heads / group | q: h rows in every group                 | o_proj: h columns, same |                    |
| F.l  | feed-forward width  | gate, up; of every expert                | down; of every expert   |                    |
| E.l  | experts             | router                                   | gate, up, down: dim 0   | expert_bias        |
| S.l  | shared expert width | shared gate, up                          | shared down             |                    |
| L    | blocks              | the block list itself                    |                         | sizes per block    |

The router reads D too. Biases go with the rows they are added to. head_dim (h) is never cut or grown: rotary pairs, the
1/sqrt(h) scale and q/k norms hang on it; asking for it is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lmworks.core.errors import UsageError, did_you_mean
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import BlockSizes

Role = Literal["write", "read", "both", "ride"]
"""both: a tied token table, which writes the residual stream and, as the head, reads it."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One dim of one tensor that runs along an axis.

    The dim has outer * size * inner entries, in this order: index i of the axis is the `inner` entries from
    (o * size + i) * inner on, for every o below `outer`.
    """

    tensor: str
    dim: int
    role: Role
    inner: int = 1
    outer: int = 1

    def entries(self, index: int, size: int) -> tuple[int, ...]:
        """The entries of the dim that belong to one index of an axis with `size` indices."""
        return tuple((o * size + index) * self.inner + i for o in range(self.outer) for i in range(self.inner))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An index set and everything that runs along it. L has no uses: its indices are blocks, not entries."""

    name: str
    size: int
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A line of the table: the axis that a dim of a parameter runs along. `inner`, `outer` are products of letters."""

    parameter: str
    dim: int
    axis: str
    role: Role
    inner: str = ""
    outer: str = ""


def _matrix(parameter: str, rows: tuple[_Row, ...], column: tuple[str, Role]) -> tuple[_Row, ...]:
    """A matrix with its bias: what its rows are, and what its columns are."""
    biases = tuple(
        _Row(parameter=f"{parameter}.bias", dim=0, axis=r.axis, role=r.role, inner=r.inner, outer=r.outer) for r in rows
    )
    return (*rows, *biases, _Row(parameter=f"{parameter}.weight", dim=1, axis=column[0], role=column[1]))


def _rows(parameter: str, axis: str, inner: str = "", outer: str = "") -> _Row:
    """What the rows of a matrix are: they are written."""
    return _Row(parameter=f"{parameter}.weight", dim=0, axis=axis, role="write", inner=inner, outer=outer)


def _experts(parameter: str, rows: tuple[str, Role], columns: tuple[str, Role]) -> tuple[_Row, ...]:
    """The matrices of all experts in one tensor: what its first dim is, its rows, and its columns."""
    dims: tuple[tuple[str, Role], ...] = (("E", "read"), rows, columns)
    return tuple(_Row(parameter=parameter, dim=dim, axis=axis, role=role) for dim, (axis, role) in enumerate(dims))


GLOBAL: tuple[_Row, ...] = (
    _Row(parameter="embed.weight", dim=0, axis="V", role="write"),
    _Row(parameter="embed.weight", dim=1, axis="D", role="write"),
    _Row(parameter="positions.weight", dim=0, axis="P", role="write"),
    _Row(parameter="positions.weight", dim=1, axis="D", role="write"),
    _Row(parameter="norm.weight", dim=0, axis="D", role="ride"),
    _Row(parameter="norm.bias", dim=0, axis="D", role="ride"),
    _Row(parameter="head.weight", dim=0, axis="V", role="write"),
    _Row(parameter="head.weight", dim=1, axis="D", role="read"),
)
"""Parameters outside the blocks, for all families; a line whose parameter a model lacks does not apply."""

_O = "attn.o_proj"
BLOCK: tuple[_Row, ...] = (
    *(
        _Row(parameter=f"{norm}.{kind}", dim=0, axis="D", role="ride")
        for norm in ("attn_norm", "ffn_norm")
        for kind in ("weight", "bias")
    ),
    *_matrix("attn.q_proj", (_rows("attn.q_proj", "G", "Rh"), _rows("attn.q_proj", "R", "h", "G")), ("D", "read")),
    *_matrix("attn.k_proj", (_rows("attn.k_proj", "G", "h"),), ("D", "read")),
    *_matrix("attn.v_proj", (_rows("attn.v_proj", "G", "h"),), ("D", "read")),
    *_matrix(_O, (_rows(_O, "D"),), ("G", "read"))[:-1],
    _Row(parameter=f"{_O}.weight", dim=1, axis="G", role="read", inner="Rh"),
    _Row(parameter=f"{_O}.weight", dim=1, axis="R", role="read", inner="h", outer="G"),
    *_matrix("ffn.gate_proj", (_rows("ffn.gate_proj", "F"),), ("D", "read")),
    *_matrix("ffn.up_proj", (_rows("ffn.up_proj", "F"),), ("D", "read")),
    *_matrix("ffn.down_proj", (_rows("ffn.down_proj", "D"),), ("F", "read")),
    *_matrix("ffn.router", (_rows("ffn.router", "E"),), ("D", "read")),
    _Row(parameter="ffn.router.expert_bias", dim=0, axis="E", role="ride"),
    *_experts("ffn.experts.gate_proj", ("F", "write"), ("D", "read")),
    *_experts("ffn.experts.up_proj", ("F", "write"), ("D", "read")),
    *_experts("ffn.experts.down_proj", ("D", "write"), ("F", "read")),
    *_matrix("ffn.shared.gate_proj", (_rows("ffn.shared.gate_proj", "S"),), ("D", "read")),
    *_matrix("ffn.shared.up_proj", (_rows("ffn.shared.up_proj", "S"),), ("D", "read")),
    *_matrix("ffn.shared.down_proj", (_rows("ffn.shared.down_proj", "D"),), ("S", "read")),
)
"""Parameters of a block, below `blocks.{l}.`; all axes but D are the block's own."""

HEAD_DIM_ONLY = ("attn.q_norm.weight", "attn.k_norm.weight")
"""Parameters that run along h alone, which no operator changes."""


def axes(model: Backbone) -> dict[str, Axis]:
    """Every axis of a model by name: V, P, D, L, and G.l, R.l, F.l, E.l, S.l for each block l it holds.

    Raises UsageError for a parameter that the table does not know (an adapter): an operator that did not see it would
    leave a model that no longer fits together.
    """
    present = dict(model.named_parameters())
    known: set[str] = set()
    uses: dict[str, list[Use]] = defaultdict(list)
    for row in GLOBAL:
        if row.parameter in present:
            known.add(row.parameter)
            tied = row.parameter == "embed.weight" and row.axis == "D" and model.config.tied
            uses[row.axis].append(Use(tensor=row.parameter, dim=row.dim, role="both" if tied else row.role))
    for name in model.blocks:
        for axis, use in _block_uses(name, model.config.blocks()[int(name)], set(present)):
            known.add(use.tensor)
            uses[axis].append(use)
    known |= {name for name in present if name.endswith(HEAD_DIM_ONLY)}
    unknown = sorted(set(present) - known)
    if unknown:
        raise UsageError(
            f"no axis is known for the parameter {unknown[0]}",
            legal="the parameters of the families decoder, gpt2 and neox",
            next_step="merge adapters into the weights before changing sizes",
        )
    sizes = _sizes(model)
    found = {name: Axis(name=name, size=sizes[name], uses=tuple(listed)) for name, listed in uses.items()}
    return found | {"L": Axis(name="L", size=len(model.blocks))}


def axis(model: Backbone, name: str) -> Axis:
    """One axis by name. Raises UsageError for an axis that is not there, and for h, which is never changed."""
    if name.partition(".")[0] == "h":
        raise UsageError(
            "head_dim (h) cannot be cut or grown: rotary pairs, the score scale and q/k norms hang on it",
            legal="G.l and R.l change the number of heads; D, F.l and L change the other sizes",
        )
    found = axes(model)
    if name not in found:
        raise UsageError(f"no axis is called '{name}'{did_you_mean(name, found)}", legal=", ".join(found))
    return found[name]


def tied_groups(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one storage, in groups; each group is to be changed once."""
    by_storage: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        storage = parameter.untyped_storage()
        key = storage.data_ptr() if parameter.device.type != "meta" else id(parameter)
        by_storage[parameter.device.type, key].append(name)
    return tuple(tuple(names) for names in by_storage.values() if len(names) > 1)


def _block_uses(name: str, block: BlockSizes, present: set[str]) -> Iterator[tuple[str, Use]]:
    """Axis and use, for every dim of every parameter of one block."""
    letters = {"G": block.n_kv_heads, "R": block.n_heads // block.n_kv_heads, "h": block.head_dim}
    for row in BLOCK:
        tensor = f"blocks.{name}.{row.parameter}"
        if tensor in present:
            inner = outer = 1
            for letter in row.inner:
                inner *= letters[letter]
            for letter in row.outer:
                outer *= letters[letter]
            own = row.axis if row.axis == "D" else f"{row.axis}.{name}"
            yield own, Use(tensor=tensor, dim=row.dim, role=row.role, inner=inner, outer=outer)


def _sizes(model: Backbone) -> dict[str, int]:
    """The size of every axis that could be there."""
    config = model.config
    sizes = {"V": config.vocab_size or 0, "D": config.hidden_size}
    if model.positions is not None:
        sizes["P"] = model.positions.weight.shape[0]
    for index, block in enumerate(config.blocks()):
        sizes[f"G.{index}"] = block.n_kv_heads
        sizes[f"R.{index}"] = block.n_heads // block.n_kv_heads
        sizes[f"F.{index}"] = block.ffn_size
        sizes[f"E.{index}"] = block.experts
        sizes[f"S.{index}"] = block.shared_size
    return sizes
