"""What runs beside something else learns what it learns in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.parallel import gang
from lmworks.train.rehearse import Seen
from tests.parallel.overlapped import begun, mail, timid
from tests.parallel.table import Case, train_all

pytestmark = pytest.mark.ranks
PIPELINES: dict[str, tuple[dict[str, Any], int]] = {
    "1f1b": ({"pp": 4}, 1),
    "gpipe": ({"pp": 4, "schedule": "gpipe"}, 2),
    "tied-fsdp": ({"pp": 2, "dp_shard": 2}, 1),
    "uneven": ({"pp": 2, "split": (3, 1)}, 2),
}


def both(first: Case, second: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Seen], list[Seen]]:
    """Two cases on the same processes: what each rank saw of each."""
    found = gang.run(train_all, first.layout.ranks, [first, second], dtype, 4)
    return [seen[0] for seen in found], [seen[1] for seen in found]


def equal(ours: list[Seen], theirs: list[Seen]) -> None:
    """To the bit: losses, norms, gradients and weights of every rank."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.losses == b.losses
        assert a.norms == b.norms
        for of in ("gradients", "weights"):
            ours_of, theirs_of = getattr(a, of), getattr(b, of)
            assert ours_of.keys() == theirs_of.keys()
            assert all(np.array_equal(ours_of[name][1], theirs_of[name][1]) for name in theirs_of)


@pytest.mark.parametrize("name", PIPELINES)
def test_early_sends_learn_to_the_bit_what_the_plain_schedule_learns(name: str) -> None:
    """And send as much."""
    axes, micro = PIPELINES[name]
    plain, early = both(Case("plain", axes, micro), Case("early", {**axes, "sends": "early"}, micro))
    equal(early, plain)
    assert [seen.bills["pp", "send"] for seen in early] == [seen.bills["pp", "send"] for seen in plain]


def test_receives_stand_before_any_work_and_no_send_is_waited_for_before_the_last() -> None:
    """Of 4 micro-batches on 3 ranks: what each rank does, in order."""
    case = Case("early", {"pp": 3, "split": (1, 2, 1), "sends": "early"}, 2)
    for place, done in enumerate(gang.run(mail, 3, case)):
        from_both_sides = 4 * ((place > 0) + (place < 2))
        assert done[:from_both_sides] == ["receive"] * from_both_sides
        assert done.count("receive") == done.count("send") == done.count("sent") == from_both_sides
        last = max(i for i, what in enumerate(done) if what.startswith("backward"))
        assert "sent" not in done[:last]


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", ["untied", "gpt2"])
def test_sliced_products_are_those_of_whole_tokens(slices: int, sequence_parallel: bool, model: str) -> None:
    """To 1e-6 in float32, in the first step, before an optimizer divides by what is nearly nothing; the same bytes."""
    axes = {"tp": 2, "sequence_parallel": sequence_parallel}
    plain, sliced = both(
        Case("plain", axes, 4, model), Case("sliced", {**axes, "tp_slices": slices}, 4, model), torch.float32
    )
    for ours, theirs in zip(sliced, plain, strict=True):
        assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
        scale = max(np.abs(whole).max() for _, whole in theirs.gradients.values())
        for name, (_, want) in theirs.gradients.items():
            assert np.abs(ours.gradients[name][1] - want).max() <= 1e-6 * scale, name
        for key, (calls, size) in theirs.bills.items():
            assert ours.bills[key][1] == size, key
            assert ours.bills[key][0] >= calls
    kind = "reduce-scatter" if sequence_parallel else "all-reduce"
    assert sliced[0].bills["tp", kind][0] > plain[0].bills["tp", kind][0]


@pytest.mark.parametrize("name", ["fsdp-2", "hsdp", "pp"])
def test_weights_that_travel_while_rows_are_read_are_the_same_weights(name: str) -> None:
    """Gathered once, as without: to the bit, and with the same bill; and the first gather is begun before the draw."""
    axes = {"fsdp-2": {"dp_shard": 2}, "hsdp": {"dp_shard": 2, "dp_replicate": 2}, "pp": {"dp_shard": 2, "pp": 2}}[name]
    case = Case(name, axes, micro=2)
    early = gang.run(train_all, case.layout.ranks, [case], torch.float32, 4)
    late = gang.run(timid, case.layout.ranks, [case], torch.float32, 4)
    equal([seen[0] for seen in early], [seen[0] for seen in late])
    assert [seen[0].bills for seen in early] == [seen[0].bills for seen in late]
    counted = gang.run(begun, case.layout.ranks, case)
    # the rest of the model, and its first block; in the first step FSDP does not know its modules yet
    assert all(found == [0, 2, 2] for found in counted)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"pp": 2, "schedule": "interleaved-1f1b", "sends": "early"}, "sends: interleaved-1f1b has several stages"),
        ({"sends": "early"}, "sends: has no effect with pp = 1"),
        ({"tp_slices": 2}, "tp_slices: has no effect with tp = 1"),
        ({"tp": 2, "tp_slices": 7}, "does not make 7 equal slices; take"),
    ],
)
def test_settings_that_cannot_be(layout: dict[str, Any], said: str) -> None:
    sets = [f"layout.{name}={value!r}".replace("'", '"') for name, value in {"dp_shard": 1, **layout}.items()]
    with pytest.raises(RecipeError) as refused:
        recipes.load("quickstart", verb="train", sets=sets)
    assert any(said in str(problem) for problem in refused.value.problems), refused.value
