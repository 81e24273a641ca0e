"""What autograd keeps, found by walking its graph: slow, and without any hook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def storages(roots: list[Tensor], stop: set[Any] = frozenset()) -> dict[int, int]:  # type: ignore[assignment]  # never changed
    """Address and bytes of every storage that a graph keeps, weights left out, from `roots` down to nodes in `stop`."""
    found: dict[int, int] = {}
    seen: set[Any] = set()
    left = [x.grad_fn for x in roots]
    while left:
        node = left.pop()
        if node is None or node in seen or node in stop:
            continue
        seen.add(node)
        left += [after for after, _ in node.next_functions]
        for x in _saved_by(node):
            base = x._base if x._is_view() else x
            if base is not None and not (base.is_leaf and base.requires_grad):
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _saved_by(node: Any) -> list[Tensor]:
    named = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    flat = [x for value in named for x in (value if isinstance(value, tuple | list) else (value,))]
    tensors = [x for x in (*flat, *(getattr(node, "saved_tensors", None) or ())) if isinstance(x, Tensor)]
    return [x for x in tensors if x.ndim or x.dtype != torch.float64]  # numbers of Python's are no tensors to hooks
