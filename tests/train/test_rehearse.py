"""Rehearsals: what is kept, what shrinks, and that a layout which computes something else is not called equal."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.parallel import gang
from lmworks.parallel.layout import AXES, Layout
from lmworks.parallel.servers import Servers
from lmworks.parallel.state import StatePlacement
from lmworks.train.rehearse import (
    Scene,
    Seen,
    Verdict,
    differences,
    perform,
    pipeline_of,
    rehearse,
)
from lmworks.train.saved import Recompute
from lmworks.train.small import reduce_degrees, shrink, small
from tests.parallel.table import scene_of


@given(st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 8]) for axis in AXES}), st.integers(1, 64))
def test_degrees_become_2_and_no_axis_is_lost(degrees: dict[str, int], most: int) -> None:
    layout = Layout(**degrees)
    found, said = reduce_degrees(layout, most)
    for axis in AXES:
        assert (found.size(axis) > 1) == (layout.size(axis) > 1)
        assert found.size(axis) in (layout.size(axis), 2)
    assert len(said) == sum(found.size(axis) != layout.size(axis) for axis in AXES)
    if found.ranks > most:
        assert all(found.size(axis) <= 2 for axis in AXES)


def test_a_512_rank_recipe_keeps_its_structure() -> None:
    sets = [
        "model.size=llama-3.1-405b",
        "layout.dimensions=3",
        "batch_size=64",
        "micro_batch_size=1",
        "saved.use=recompute",
        "saved.every=2",
    ]
    made = recipes.load("methods/torchtitan", verb="train", sets=sets)
    scene, said = small(made, made.layout.settle(512, made), most=8)
    assert scene.layout == Layout(
        pp=2, dp_shard=2, tp=2, sequence_parallel=True, schedule="interleaved-1f1b", dp_replicate=1
    )
    assert scene.saved == Recompute(every=2)
    assert (scene.rows, scene.micro_rows) == (16, 1), "8 micro-batches on each of 2 shards, as in the recipe"
    assert scene.model.n_layers == 8
    assert scene.model.n_heads // scene.model.n_kv_heads > 1, "query heads still share keys"
    assert not scene.model.tied
    assert {line.partition(":")[0] for line in said} == {"dp_shard", "tp", "pp", "model"}


@pytest.mark.parametrize("use", ["offload", "ssdtrain"])
@pytest.mark.parametrize("around", ["keep", "recompute"])
def test_where_saved_tensors_wait_is_not_rehearsed(use: str, around: str) -> None:
    sets = [f"saved.use={use}", f"saved.around={around}"]
    made = recipes.load("methods/torchtitan", verb="train", sets=sets)
    scene, _ = small(made, made.layout.settle(1, made), most=8)
    assert not scene.saved.leaves()
    assert all(scene.saved.again(block) is (around == "recompute") for block in range(scene.model.n_layers))


def test_windows_shrink_with_the_rows() -> None:
    made = recipes.load("methods/megascale", verb="train")
    found = shrink(made.model, Layout(dp_shard=2), length=16, sequence=made.data.sequence_length)
    assert found.sliding_window == 4
    assert found.parallel_block
    assert found.tied


def test_the_real_pipeline_waits_as_its_stages_say() -> None:
    """48 blocks on 8 ranks; a head as dear as several blocks makes equal stages impossible, and more waiting."""
    sets = ["model.n_layers=48", "layout.dp_shard=1", "layout.pp=8", "batch_size=32", "micro_batch_size=1"]
    made = recipes.load("quickstart", verb="train", sets=sets)
    found = pipeline_of(made, made.layout)
    assert found.order.micro_batches == 32
    assert sum(found.busy_seconds) == pytest.approx(8 * 32 * 3)
    assert found.bubble_share > made.layout.waits(32)
    even = recipes.load("quickstart", verb="train", sets=[*sets, "data.tokenizer=bytes"])
    assert made.layout.waits(32) < pipeline_of(even, even.layout).bubble_share < found.bubble_share


@pytest.fixture(scope="module")
def want() -> Seen:
    (seen,) = gang.run(perform, 1, scene_of("tied", Layout(dp_shard=1)))
    return seen


@pytest.mark.ranks
def test_a_layout_that_learns_something_else_is_not_equal(want: Seen) -> None:
    name, (box, whole) = next((n, pair) for n, pair in want.gradients.items() if n.endswith("down_proj.weight"))
    wrong = dataclasses.replace(want, gradients=want.gradients | {name: (box, whole * (1 + 1e-6))})
    worst, missing = differences([wrong], want)
    assert worst == pytest.approx(1e-6, rel=1e-3)
    assert missing == ()
    assert not verdict(gradient=worst).equal
    less = dataclasses.replace(want, gradients={n: pair for n, pair in want.gradients.items() if n != name})
    assert differences([less], want) == (0.0, (name,))
    assert not verdict(missing=(name,)).equal
    assert verdict().equal
    assert verdict().billed


def test_bytes_that_no_formula_expects_are_told() -> None:
    assert not verdict(sent={"tp": 100.0}).billed
    assert not verdict(expected={"cp": 100.0}).billed
    assert not verdict(sent={"tp": 100.0}, expected={"tp": 102.0}).billed


def verdict(**over: Any) -> Verdict:
    plain: dict[str, Any] = {"loss": 1e-15, "gradient": 1e-14, "missing": (), "sent": {}, "expected": {}}
    return Verdict(**plain | over)


@pytest.mark.ranks
def test_a_scene_is_rehearsed_as_it_is() -> None:
    scene: Scene = scene_of("tied", Layout(pp=2, dp_shard=1, schedule="zero-bubble-v"), micro_rows=2)
    found = rehearse(scene)
    assert found.equal
    assert found.billed
    assert found.sent.keys() == {"pp"}
    assert np.isfinite(found.gradient)


@pytest.mark.ranks
def test_served_attention_is_rehearsed_with_documents_that_move() -> None:
    sets = ["layout.servers.keep=cache", "layout.tp=2", "model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=8"]
    made = recipes.load("quickstart", verb="train", sets=[*sets, "micro_batch_size=4"])
    scene, _ = small(made, made.layout.settle(16, made), most=4)
    assert scene.layout == Layout(tp=2, dp_shard=2, servers=Servers(keep="cache", tile=2))
    assert (scene.micro_rows, scene.rows) == (2, 4)
    found = rehearse(scene)
    assert found.equal
    assert found.billed
    assert found.sent["tp"] > 0
    assert "attention" not in found.sent, "it hangs on the documents, not on settings"


@pytest.mark.ranks
def test_a_placement_of_states_is_rehearsed_with_its_levels() -> None:
    state = StatePlacement(weights=1, gradients=2, levels=(2,))
    found = rehearse(scene_of("untied-2", Layout(dp_shard=4, state=state), micro_rows=1))
    assert found.equal
    assert found.billed
    assert found.levels.keys() == {"among 2", "network"}
    assert found.levels["network"] == pytest.approx(found.sent["optimizer"])
    assert sum(found.levels.values()) == pytest.approx(sum(found.sent.values()))


def test_states_shrink_by_their_steps() -> None:
    state = StatePlacement(weights=2, gradients=8, levels=(2, 8))
    found, said = reduce_degrees(Layout(dp_shard=96, cp=4, tp=2, state=state), 16)
    assert found == Layout(dp_shard=4, cp=2, tp=2, state=StatePlacement(weights=2, gradients=4, levels=(2, 4)))
    assert said == ["dp_shard x cp: 384 -> 8, in the same steps"]
    assert reduce_degrees(found, 16) == (found, [])


@pytest.mark.ranks
def test_the_answer_can_be_read_by_a_script(tmp_path: Path) -> None:
    words = ["rehearse", "methods/torchtitan", "--ranks", "64", "--set", "layout.dimensions=3", "--most", "2"]
    words += ["--set", "model.n_kv_heads=8", "--set", "model.n_heads=8", "--set", "layout.ranks_per_node=4", "--json"]
    words += ["--set", "batch_size=64"]
    words += ["--picture", str(tmp_path / "pipeline.png")]
    done = subprocess.run([sys.executable, "-m", "lmworks", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["equal"]
    assert facts["billed"]
    assert facts["ranks"] == 8, "three axes cannot be less than 2 each"
    assert (tmp_path / "pipeline.png").stat().st_size > 10_000
    assert facts["sent"] == pytest.approx(facts["expected"])
