"""A forward pass in two parts is the forward pass; its share of the work is counted as `cost` counts."""

from __future__ import annotations

import pytest
import torch

from lmworks.model import sizes
from tests.model.toy import CONFIGS, FAMILIES, V, built


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_until_a_block_and_the_rest_is_the_forward_pass(family: str, packed: bool) -> None:
    model = built(family)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, V, (3, 9), generator=generator)
    documents_BT = (torch.arange(9) // 4).expand(3, 9) if packed else None
    positions_BT = (torch.arange(9) % 4).expand(3, 9) if packed else None
    whole = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT)
    for block in range(model.config.n_layers + 1):
        midway = model.until(block, tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT)
        for _ in range(2):  # as often as one likes
            torch.testing.assert_close(model.rest(midway), whole, rtol=0, atol=1e-12)


def test_the_rest_in_float32_of_a_bfloat16_model() -> None:
    model = built("decoder", dtype=torch.bfloat16)
    wide = built("decoder", dtype=torch.float32)
    tokens_BT = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
    midway = model.until(0, tokens_BT)
    hidden_BTD = model.rest(midway.to(torch.float32))
    assert hidden_BTD.dtype == torch.float32
    same = wide.rest(wide.until(0, tokens_BT).to(torch.bfloat16).to(torch.float32))
    torch.testing.assert_close(hidden_BTD, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [-1, 3])
def test_there_is_no_block_outside(block: int) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        built("tied").until(block, torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_the_forward_pass_add_up(family: str) -> None:
    config = CONFIGS[family]
    shares = [sizes.forward_share(config, start=i, sequence=16) for i in range(config.n_layers + 1)]
    assert shares[0] == pytest.approx(1.0, abs=1e-12)
    assert sorted(shares, reverse=True) == shares
    head = 2 * V * config.hidden_size / config.cost(sequence=16).forward_flops_per_token
    assert shares[-1] == pytest.approx(head, rel=1e-12)
