"""What a tensor cache makes of knowing which stage comes next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmworks.parallel.schedule import order
from lmworks.train.backends import Host
from lmworks.train.ledger import Ledger
from lmworks.train.offload import TensorCache, hints
from tests.train.test_offload import ROWS, WIDTH, one, weights


def passes(offload: TensorCache, micro_batch: int, *, turns: bool) -> tuple[Tensor, list[nn.Parameter]]:
    """A forward pass of three blocks, of which the last stays where its backward pass follows at once; all is out."""
    matrices = weights()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(micro_batch))
    offload.expect(micro_batch, turns=turns)
    offload.begin()
    for i in range(3):
        with offload.block(str(i), out=i < 2 or not offload.turns):
            x = one(x, matrices[i])
    offload.settle()
    return x.square().mean(), matrices


@pytest.mark.parametrize("turns", [False, True])
def test_a_stage_that_is_told_what_comes_next_has_the_last_block_at_hand(turns: bool) -> None:
    offload = TensorCache(Host(), Ledger(), least=0, threads=1, ahead="block")
    loss, _ = passes(offload, 4, turns=turns)
    last = [parcel for parcel in offload._parcels.values() if parcel.scope == "2"]
    assert bool(last) is not turns
    offload.fetch(4)
    offload.fetch(7)  # nobody has seen it: nothing to do
    for parcel in last:
        assert parcel.coming is not None
        parcel.coming.result()
    loss.backward()
    assert offload.facts.misses == 0
    offload.close()


def test_without_a_word_the_last_block_is_waited_for() -> None:
    offload = TensorCache(Host(), Ledger(), least=0, threads=1, ahead="block")
    loss, _ = passes(offload, 0, turns=False)
    loss.backward()
    assert offload.facts.misses > 0
    offload.close()


def test_a_pipeline_says_what_comes_next() -> None:
    heard: list[tuple[int, str, int, bool | None]] = []

    class Ear:
        def __init__(self, stage: int) -> None:
            self.stage = stage

        def expect(self, micro_batch: int, *, turns: bool) -> None:
            heard.append((self.stage, "expect", micro_batch, turns))

        def fetch(self, micro_batch: int) -> None:
            heard.append((self.stage, "fetch", micro_batch, None))

    def told(schedule: str, rank: int) -> list[tuple[int, str, int, bool | None]]:
        heard.clear()
        found = order(schedule, ranks=2, micro_batches=4)
        tell = hints({stage: [Ear(stage)] for stage in found.held[rank]})  # type: ignore[list-item]  # who only listens
        actions = found.ranks[rank]
        for now, then in zip(actions, [*actions[1:], None], strict=True):
            tell(now, then)
        return list(heard)

    last = [(1, "expect", m, True) for m in range(4)]
    assert told("1f1b", 1) == last, "forward and its own backward in turn"
    first = told("1f1b", 0)
    assert [word for word in first if word[1] == "fetch"] == [(0, "fetch", m, None) for m in range(4)]
    assert not any(turns for _, _, _, turns in first)
    both = told("interleaved-1f1b", 1)
    assert {(stage, word) for stage, word, _, _ in both} >= {(1, "expect"), (3, "expect"), (1, "fetch")}
    assert all(turns for stage, word, m, turns in both if (stage, word) == (3, "expect") and m > 0)
