"""The block mask by edges against the one that torch makes of every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lmworks.model.attention import Frame, Reach, boolean_mask
from lmworks.model.block_mask import BLOCK, block_mask, blocks_seen
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise

CPU = torch.device("cpu")
LENGTHS = st.integers(1, 4 * BLOCK + 3)
WINDOWS = st.none() | st.integers(1, 3 * BLOCK)


def pairs(length: int, window: int | None, documents_BT: Tensor | None) -> Tensor:
    """(B or 1, S, BLOCK, S, BLOCK): every pair of tokens, False behind the row's end."""
    seen_BTT = boolean_mask(length, length, window, documents_BT, CPU)[:, 0]
    missing = -length % BLOCK
    padded = torch.nn.functional.pad(seen_BTT, (0, missing, 0, missing))
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))


def documents(length: int, seed: int, often: float, *, together: bool) -> Tensor:
    """Two rows of document ids; `together`: each document's tokens lie together."""
    generator = torch.Generator().manual_seed(seed)
    if together:
        return (torch.rand(2, length, generator=generator) < often).cumsum(1)
    return torch.randint(0, 3, (2, length), generator=generator)


@given(length=LENGTHS, window=WINDOWS, seed=st.integers(0, 99), often=st.sampled_from([0.0, 0.003, 0.02, 0.5]))
def test_blocks_are_those_of_every_pair(length: int, window: int | None, seed: int, often: float) -> None:
    ids = documents(length, seed, often, together=True)
    some, whole = blocks_seen(length, window, ids, CPU)
    each = pairs(length, window, ids)
    assert torch.equal(some, each.any(4).any(2))
    assert torch.equal(whole, each.all(4).all(2))


@given(length=LENGTHS, window=WINDOWS)
def test_blocks_without_documents(length: int, window: int | None) -> None:
    some, whole = blocks_seen(length, window, None, CPU)
    each = pairs(length, window, None)
    assert torch.equal(some, each.any(4).any(2))
    assert torch.equal(whole, each.all(4).all(2))


@given(length=LENGTHS, seed=st.integers(0, 99))
def test_documents_that_are_interrupted_lose_no_pair(length: int, seed: int) -> None:
    ids = documents(length, seed, 0.0, together=False)
    some, whole = blocks_seen(length, None, ids, CPU)
    each = pairs(length, None, ids)
    assert bool((some | ~each.any(4).any(2)).all())
    assert torch.equal(whole, each.all(4).all(2))


def listed(mask: BlockMask) -> list[tuple[set[int], set[int]]]:
    """For each row of blocks, the numbers of those seen in part and of those seen whole."""
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    kinds = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    part, whole = (
        [set(order[:n].tolist()) for n, order in zip(count.flatten().tolist(), orders.flatten(0, 2), strict=True)]
        for count, orders in kinds
    )
    return list(zip(part, whole, strict=True))


def test_it_is_the_mask_that_torch_makes() -> None:
    ids = documents(500, 1, 0.01, together=True)
    mine = block_mask(2, 500, 200, ids, CPU)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - 200) & (ids[b, q] == ids[b, k])

    theirs = create_block_mask(seen, 2, None, 500, 500, device="cpu")
    assert listed(mine) == listed(theirs)
    assert mine.shape == theirs.shape
    assert torch.equal(mine.to_dense(), theirs.to_dense())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_other_documents_compile_nothing_anew() -> None:
    """Each batch brings a mask of its own: blocks are compiled once, for all batches and all blocks."""
    torch.compiler.reset()
    config = DecoderConfig(vocab_size=9, n_layers=3, hidden_size=32, n_heads=2, n_kv_heads=1, ffn_size=32)
    model = config.build(dtype=torch.float32)
    initialise(model, 0)
    compilations = CompileCounter()
    for block in model.blocks.values():
        block.compile(backend=compilations, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            mask = block_mask(2, 256, None, documents(256, seed, 0.02, together=True), CPU)
            frame = Frame(rope=model.rotary.tables(torch.arange(256)[None]), reaches={None: Reach(blocks=mask)})
            x_BTD = torch.ones(2, 256, 32)
            for block in model.blocks.values():
                x_BTD = block(x_BTD, frame, None)
    assert compilations.frame_count == 1
