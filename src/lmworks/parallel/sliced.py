"""Products of tp that run beside their exchange: the tokens go in slices, of which one travels while another is
multiplied.

    what is made                    forward                           backward
    columns, tokens divided         gather slice by slice | multiply  multiply | scatter the sum slice by slice
    columns, tokens repeated        multiply                          multiply | sum slice by slice
    a reader, tokens divided        multiply | scatter the sum        gather | multiply
    a reader, tokens repeated       multiply | sum slice by slice     multiply

A slice is the same few tokens of every rank's part, so each exchange is one of whole tensors, as without slices, and
the same bytes travel. Sums over tokens (the gradients of weights) are made slice by slice, in another order: they
differ by rounding. Matrices that read the same input, such as those of queries, keys and values, share what is gathered
for them.

Letters: n ranks of tp, s slices, t tokens of one slice of one rank, I and O input and output width on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmworks.model import ops
from lmworks.model.head import accumulate_dtype
from lmworks.model.layers import Linear
from lmworks.parallel.crossing import eager
from lmworks.parallel.wire import Running, Wire


class Columns:
    """Matrices of one rank that read the same input: those of queries, keys and values, or those into an FFN."""

    def __init__(self, linears: Sequence[Linear], wire: Wire, slices: int, *, tokens_divided: bool) -> None:
        self.members = [Column(linear, self, i) for i, linear in enumerate(linears)]
        self._how = (wire, slices, tokens_divided)
        self._of: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def product(self, x_BTI: Tensor, which: int) -> Tensor:
        """(B, T, O): one member's product. The first of them that is asked makes all, and the others take theirs."""
        if x_BTI is not self._of or which not in self._left:
            weights = [member.weight.to(x_BTI.dtype) for member in self.members]
            self._of, self._left = x_BTI, dict(enumerate(_columns(x_BTI, weights, *self._how)))
        out_BTO = self._left.pop(which)
        if not self._left:
            self._of = None
        return out_BTO


class Column(Linear):
    """One of several matrices that read the same input."""

    def __init__(self, linear: Linear, of: Columns, place: int) -> None:
        super(nn.Linear, self).__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self._of, self._place = of, place

    def forward(self, input: Tensor) -> Tensor:
        """(B, T / n or T, in) -> (B, T, out)."""
        out = self._of.product(input, self._place)
        bias: Tensor | None = self.bias
        return out if bias is None else out + bias.to(out.dtype)


@eager
def _columns(x_BTI: Tensor, weights: Sequence[Tensor], wire: Wire, slices: int, divided: bool) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Columns.apply(x_BTI, wire, slices, divided, *weights)  # type: ignore[no-untyped-call]
    return found


@eager
def reader(x_BTI: Tensor, weight_OI: Tensor, wire: Wire, slices: int, *, divided: bool) -> Tensor:
    """(B, T, I) -> the sum over the ranks of x W^T: (B, T, O), or (B, T / n, O) where tokens are divided."""
    weight_OI = weight_OI.to(x_BTI.dtype)
    found: Tensor = _Reader.apply(x_BTI, weight_OI, wire, slices, divided)  # type: ignore[no-untyped-call]
    return found


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, wire: Wire, slices: int, divided: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.how = (wire, slices, divided)
        if not divided:
            ctx.save_for_backward(x_BTI, *weights)
            return tuple(_times(x_BTI, weight_OI) for weight_OI in weights)
        x_snBtI, running = _begin_gather(x_BTI, wire, slices)
        batch, tokens = x_BTI.shape[0], wire.size("tp") * x_BTI.shape[1]
        outs = [x_BTI.new_empty(batch, tokens, weight.shape[0]) for weight in weights]
        for i, (x_nBtI, gathering) in enumerate(zip(x_snBtI, running, strict=True)):
            gathering.wait()
            for out_BTO, weight_OI in zip(outs, weights, strict=True):
                _slice(out_BTO, wire, slices, i).copy_(_times(x_nBtI, weight_OI))
        ctx.save_for_backward(x_snBtI, *weights)
        return tuple(outs)

    @staticmethod
    @ops.first_order_only
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wire, slices, divided = ctx.how
        x, *weights = ctx.saved_tensors
        dweights = [torch.zeros_like(weight, dtype=accumulate_dtype(weight)) for weight in weights]
        # own tokens; x is (s, n, B, t, I) where they are divided
        dx_BTI = x.new_empty(x.shape[2], slices * x.shape[3], x.shape[4]) if divided else torch.empty_like(x)
        held: list[tuple[Tensor, Tensor, Running]] = []
        for i in range(slices):
            mine = [_slice(grad, wire, slices, i).contiguous() if divided else _part(grad, slices, i) for grad in grads]
            part = sum_of(dout @ weight for dout, weight in zip(mine, weights, strict=True))
            if divided:
                out_BtI = x.new_empty(part.shape[1:])
                held.append((out_BtI, part, wire.begin_scatter_sum(out_BtI, part, "tp")))
            else:
                part = part.contiguous()
                held.append((part, part, wire.begin_sum(part, "tp")))
            rows = x[i] if divided else _part(x, slices, i)
            for dweight, dout in zip(dweights, mine, strict=True):
                dweight += _gradient(dout, rows)
        for i, (found, _, running) in enumerate(held):
            running.wait()
            _part(dx_BTI, slices, i).copy_(found)
        return (dx_BTI, None, None, None, *(d.to(x.dtype) for d in dweights))


class _Reader(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_OI: Tensor, wire: Wire, slices: int, divided: bool) -> Tensor:
        ctx.how = (wire, slices, divided)
        ctx.save_for_backward(x_BTI, weight_OI)
        held: list[tuple[Tensor, Tensor, Running]] = []
        for i in range(slices):
            if divided:
                part = _times(_slice(x_BTI, wire, slices, i), weight_OI)
                out_BtO = part.new_empty(part.shape[1:])
                held.append((out_BtO, part, wire.begin_scatter_sum(out_BtO, part, "tp")))
            else:
                part = _times(_part(x_BTI, slices, i), weight_OI)
                held.append((part, part, wire.begin_sum(part, "tp")))
        for _, _, running in held:
            running.wait()
        return torch.cat([found for found, _, _ in held], 1)

    @staticmethod
    @ops.first_order_only
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wire, slices, divided = ctx.how
        x_BTI, weight_OI = ctx.saved_tensors
        if not divided:
            return grad @ weight_OI, _gradient(grad, x_BTI), None, None, None
        grad_snBtO, running = _begin_gather(grad, wire, slices)
        dx_BTI = torch.empty_like(x_BTI)
        dweight_OI = torch.zeros_like(weight_OI, dtype=accumulate_dtype(weight_OI))
        for i, (grad_nBtO, gathering) in enumerate(zip(grad_snBtO, running, strict=True)):
            gathering.wait()
            _slice(dx_BTI, wire, slices, i).copy_(grad_nBtO @ weight_OI)
            dweight_OI += _gradient(grad_nBtO, _slice(x_BTI, wire, slices, i))
        return dx_BTI, dweight_OI.to(x_BTI.dtype), None, None, None


def _begin_gather(x_BTW: Tensor, wire: Wire, slices: int) -> tuple[Tensor, list[Running]]:
    """The ranks' tokens slice by slice, (s, n, B, t, W), and when each slice is there."""
    batch, tokens, width = x_BTW.shape
    x_sBtW = x_BTW.view(batch, slices, tokens // slices, width).transpose(0, 1).contiguous()
    found = x_BTW.new_empty(slices, wire.size("tp"), *x_sBtW.shape[1:])
    return found, [wire.begin_gather(out_nBtW, x_BtW, "tp") for out_nBtW, x_BtW in zip(found, x_sBtW, strict=True)]


def _slice(x_BTW: Tensor, wire: Wire, slices: int, which: int) -> Tensor:
    """A slice of every rank's tokens, (n, B, t, W); a view of x."""
    batch, tokens, width = x_BTW.shape
    ranks = wire.size("tp")
    return x_BTW.view(batch, ranks, slices, tokens // (ranks * slices), width)[:, :, which].transpose(0, 1)


def _part(x_BTW: Tensor, slices: int, which: int) -> Tensor:
    """A slice of the tokens, where every rank has all of them; a view of x."""
    size = x_BTW.shape[1] // slices
    return x_BTW.narrow(1, which * size, size)


def _times(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T over the last dim; contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    out = ops.product(flat, weight_OI) if ops.on_cpu(flat) else flat @ weight_OI.t()
    return out.view(*x.shape[:-1], -1)


def _gradient(dout: Tensor, x: Tensor) -> Tensor:
    """That of the weight: (O, I)."""
    return dout.reshape(-1, dout.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def sum_of(parts: Any) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = parts
    for other in others:
        first = first + other
    found: Tensor = first
    return found
