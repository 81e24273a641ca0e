"""COAT's blocks where other ranks serve their attention."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lmworks.methods.coat.blocks import CoatActivations
from lmworks.parallel import gang
from lmworks.parallel.servers import Servers
from tests.parallel.pooled import Pass, learned


@pytest.mark.ranks
def test_attention_that_other_ranks_serve_changes_nothing_under_coat() -> None:
    """Documents that stay whole are attended by the same kernel wherever they are: every gradient is the same to the
    bit. Cut ones differ by roundings, which codes of eight bits make large."""
    one_stream = Servers(ping_pong=False)
    served = [
        Pass(axes={"dp_shard": 2}, servers=servers, saved=CoatActivations(), dtype=torch.float32, **plan)
        for servers in (one_stream, dataclasses.replace(one_stream, keep="cache"))
        for plan in ({"at_home": True}, {"random": 1, "cuts": 0})
    ]
    for passes in gang.run(learned, 2, served):
        home, *others = [seen for seen, _ in passes]
        assert home.bills.keys() != others[0].bills.keys(), "something moved"
        for other in others:
            assert other.losses == home.losses
            for name, (_, gradient) in home.gradients.items():
                assert np.array_equal(other.gradients[name][1], gradient), name
