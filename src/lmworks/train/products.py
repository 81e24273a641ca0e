"""Which results a block keeps where it is run again but for its products, and how their bytes come into the books.

A product (a linear layer, fused attention) takes most of a block's time and gives few bytes for it; a norm, an
activation or a rotation is the other way round. torch's selective checkpoint holds what the first pass's products gave
and hands it to the second pass in the place of the products. Attention by tiles is no product here: its scores are as
many as all else together, so its two products per tile are made again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lmworks.model import ops
from lmworks.train.ledger import Lease, Ledger, counted_beside, edited

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
NAMES = (
    "aten.mm",
    "aten.addmm",
    "aten._grouped_mm",
    "mkldnn._linear_pointwise",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
)
"""Operations whose results are kept."""


def is_product(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of an operation is kept.

    A bias that is added in place is part of its product: what the product gave is overwritten, and must not be added to
    a second time.
    """
    if operation is torch.ops.aten.add_.Tensor:
        return isinstance(args[1], Tensor) and args[1].ndim == 1 and args[0].ndim == 2
    return str(getattr(operation, "overloadpacket", "")) in NAMES


def policy(context: Any, operation: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    """For torch's selective checkpoint."""
    return CheckpointPolicy.MUST_SAVE if is_product(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def contexts(name: str, books: Ledger | None) -> Contexts:
    """What is entered around a block's first pass and around its second.

    A pass that is to be differentiated twice keeps no product: torch hands each out once.
    """
    if not ops.own_forms():
        return nullcontext(), Again(lambda: counted_beside(books, name)) if books is not None else nullcontext()
    # torch's check would refuse biases: `_Ending` makes it
    made: Any = create_selective_checkpoint_contexts
    first, second = made(policy, allow_cache_entry_mutation=True)
    given: deque[_Given] = deque()
    beside = [] if books is None else [lambda: counted_beside(books, name)]
    return (
        Again(lambda: first, lambda: _Taking(given, books, name)),
        Again(*beside, lambda: second, lambda: _Ending(given, name)),
    )


class Again(AbstractContextManager[None]):
    """Contexts, one within the other, that are made anew each time: a second pass may be made more than once."""

    def __init__(self, *made: Callable[[], AbstractContextManager[Any]]) -> None:
        self._made, self._entered = made, ExitStack()

    def __enter__(self) -> None:
        self._entered = ExitStack()
        for make in self._made:
            self._entered.enter_context(make())

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


@dataclass(kw_only=True)
class _Given:
    """What a product gave in the first pass."""

    alias: Tensor
    version: int
    """Edits in place that are accounted for."""
    lease: Lease | None


class _Taking(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """The first pass: note what each product gives, and put it into the books."""

    def __init__(self, given: deque[_Given], books: Ledger | None, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._given, self._books, self._name = given, books, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, noted."""
        out = func(*args, **(kwargs or {}))
        if is_product(func, args):
            biased = func is torch.ops.aten.add_.Tensor
            if biased and self._given:
                self._given[-1].version += 1  # the edit counts when this operation is over
            for x in _tensors(out):
                lease = Lease(self._books, x, self._name) if self._books is not None and self._books.on else None
                self._given.append(_Given(alias=_alias(x), version=x._version + biased, lease=lease))
        return out


class _Ending(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """The second pass: a product that is handed out is held by what saves it, and no longer here."""

    def __init__(self, given: deque[_Given], name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._given, self._name = given, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, or its result of the first pass. Raises RuntimeError where that was edited since."""
        out = func(*args, **(kwargs or {}))
        if is_product(func, args):
            for _ in _tensors(out):
                given = self._given.popleft()
                if given.alias._version != given.version:
                    raise edited(self._name)
        return out


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]


def _alias(x: Tensor) -> Tensor:
    """The same values and count of edits, outside of any graph."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return x.detach()
