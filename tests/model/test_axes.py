"""The axis table: every dim of every parameter runs along what it says, and cutting along it leaves the function."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import nn

from lmworks.core.errors import UsageError
from lmworks.model.axes import Axis, axes, axis, tied_groups
from lmworks.model.backbone import Backbone
from lmworks.model.init import initialise
from tests.model.toy import FAMILIES, built


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dim_is_covered_exactly_once(family: str) -> None:
    model = built(family)
    covered: dict[tuple[str, int], list[Axis]] = defaultdict(list)
    for found in axes(model).values():
        for use in found.uses:
            covered[use.tensor, use.dim].append(found)
            # An axis cuts the whole dim into its indices: no entry is left out, none counted twice.
            entries = [entry for index in range(found.size) for entry in use.entries(index, found.size)]
            assert sorted(entries) == list(range(model.get_parameter(use.tensor).shape[use.dim]))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        for dim in range(parameter.ndim):
            kinds = sorted(found.name.partition(".")[0] for found in covered[name, dim])
            # The heads of q_proj and o_proj run along two axes at once: groups, and heads within a group.
            assert kinds == (["G", "R"] if len(kinds) == 2 else kinds[:1]), (name, dim)
            assert kinds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["G.1", "R.1", "F.1"])
def test_an_index_is_removed_by_zeroing_its_readers_alone(family: str, kind: str) -> None:
    """With its readers zero, an index has no effect: its writers may hold anything."""
    model = built(family)
    found = axis(model, kind)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for use in found.uses:
            if use.role == "read":
                model.get_parameter(use.tensor).index_fill_(use.dim, torch.tensor(use.entries(0, found.size)), 0.0)
        before = model(tokens)
        for use in found.uses:
            if use.role == "write":
                entries = torch.tensor(use.entries(0, found.size))
                model.get_parameter(use.tensor).index_fill_(use.dim, entries, 3.0)
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)


def test_the_width_of_a_shared_expert_is_an_axis_of_its_own() -> None:
    model = built("deepseek-experts")
    shared, routed = axis(model, "S.1"), axis(model, "F.1")
    assert (shared.size, routed.size, axis(model, "E.1").size, axis(model, "F.0").size) == (10, 8, 6, 40)
    assert {use.tensor for use in shared.uses}.isdisjoint({use.tensor for use in routed.uses})
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for use in shared.uses:
            if use.role == "read":
                model.get_parameter(use.tensor).index_fill_(use.dim, torch.tensor([0]), 0.0)
        before = model(tokens)
        for use in shared.uses:
            if use.role == "write":
                model.get_parameter(use.tensor).index_fill_(use.dim, torch.tensor([0]), 3.0)
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)


def test_tied_tables_have_both_roles_and_one_storage() -> None:
    model = built("tied")
    roles = {use.tensor: use.role for use in axes(model)["D"].uses}
    assert roles["embed.weight"] == "both"
    assert "head.weight" not in roles
    assert tied_groups(model) == ()
    outside = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    outside["second"].weight = outside["first"].weight
    assert tied_groups(outside) == (("first.weight", "second.weight"),)


def test_head_dim_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be cut or grown"):
        axis(built("decoder"), "h")


def test_an_unknown_axis_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'F\.1'"):
        axis(built("decoder"), "F1")


def test_a_parameter_without_axis_is_refused() -> None:
    model: Backbone = built("decoder")
    model.register_parameter("adapter", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(UsageError, match="no axis is known for the parameter adapter"):
        axes(model)


def test_a_stage_lists_the_axes_of_its_own_blocks() -> None:
    model = built("decoder")
    initialise(model, 0)
    model.keep_stage(range(1, 2), first=False, last=False)
    found = axes(model)
    assert {"G.1", "R.1", "F.1", "D", "L"} == set(found)
    assert found["L"].size == 1
