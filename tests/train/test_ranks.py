"""Runs on several ranks: what is learned, saved and told is that of one rank; nothing goes wrong in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmworks.model.checkpoint import complete, load, locate
from lmworks.parallel import gang
from lmworks.serve.export import export_model
from lmworks.train import save
from tests.train import ranked, toy

pytestmark = pytest.mark.ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp-2": (2, {}),
    "replicate-2": (2, {"layout": {"dp_replicate": 2}}),
    "tp-2": (2, {"layout": {"tp": 2}}),
    "sp-2": (2, {"layout": {"tp": 2, "sequence_parallel": True}}),
    "pp-2": (2, {"layout": {"pp": 2}, "micro_batch_size": 2}),
    "pp-2-v": (2, {"layout": {"pp": 2, "schedule": "zero-bubble-v"}, "micro_batch_size": 2}),
    "cp-2": (2, {"layout": {"cp": 2}}),
    "hsdp-4": (4, {"layout": {"dp_replicate": 2}}),
    "zero-1": (2, {"layout": {"state": {"weights": 1, "gradients": 1}}, "micro_batch_size": 1}),
    "ladder-4": (4, {"layout": {"state": {"weights": 1, "gradients": 2}}, "micro_batch_size": 1}),
    "pairs-4": (4, {"layout": {"state": {"weights": 2, "gradients": 2}}}),
    "zero-2-pp-2": (4, {"layout": {"pp": 2, "state": {"weights": 1}}, "micro_batch_size": 1}),
    "pp-2-tp-2": (4, {"layout": {"pp": 2, "tp": 2}, "micro_batch_size": 2}),
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.corpus(tmp_path_factory.mktemp("ranks") / "text")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def one(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank that never stopped."""
    path = tmp_path_factory.mktemp("runs") / "one"
    gang.run(ranked.train, 1, ranked.table(text, cache), str(path))
    return path


def same_end(path: Path, one: Path, bound: float = 1e-5) -> None:
    """Losses from wherever it began, validation and the whole checkpoint are those of the unbroken run."""
    found = ranked.rows(path)
    want = {row["step"]: row for row in ranked.rows(one) if "loss" in row}
    for row in found:
        if "loss" in row:
            assert row["loss"] == pytest.approx(want[row["step"]]["loss"], rel=bound)
            assert row["tokens"] == want[row["step"]]["tokens"], "every target counts once"
    assert ranked.losses(path, "val_loss") == pytest.approx(ranked.losses(one, "val_loss"), rel=bound)
    assert ranked.losses(path, "val_tokens") == ranked.losses(one, "val_tokens")
    ours, theirs = (save.read(complete(folder / "checkpoints")[-1]) for folder in (path, one))
    assert ours.state["source"] == theirs.state["source"], "the next rows are the same"
    assert set(ours.tensors["model"]) == set(theirs.tensors["model"])
    assert set(ours.tensors["optimizer"]) == set(theirs.tensors["optimizer"])
    for kind, least in (("model", 1e-3), ("optimizer", 1e-3)):
        for name, want_tensor in theirs.tensors[kind].items():
            worst = (ours.tensors[kind][name] - want_tensor).abs().max()
            assert worst <= least * want_tensor.abs().max(), (kind, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_on_ranks_is_the_run_of_one(name: str, text: Path, cache: Path, one: Path, tmp_path: Path) -> None:
    ranks, over = LAYOUTS[name]
    notes = gang.run(ranked.train, ranks, ranked.table(text, cache, **over), str(tmp_path / "run"))
    assert all(not told for told in notes[1:]), "ranks but the first say nothing"
    same_end(tmp_path / "run", one)
    assert load(tmp_path / "run").config == load(one).config


@pytest.mark.parametrize("keep", ["resend", "cache"])
def test_a_run_of_ranks_that_serve_attention_learns_what_one_learns(
    keep: str, text: Path, cache: Path, one: Path, tmp_path: Path
) -> None:
    """Losses, validation and its tokens. The table of layouts holds weights against one process, in float64: in float32
    another order of additions moves the few values whose gradient is nearly nothing, as `ring` does."""
    servers = {"tolerance": 0.0, "tile": 4, "keep": keep}
    spec = ranked.table(text, cache, layout={"servers": servers}, micro_batch_size=2)
    gang.run(ranked.train, 2, spec, str(tmp_path / "run"))
    for name in ("loss", "val_loss"):
        assert ranked.losses(tmp_path / "run", name) == pytest.approx(ranked.losses(one, name), rel=1e-5)
    assert ranked.losses(tmp_path / "run", "val_tokens") == ranked.losses(one, "val_tokens")
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    sent = [facts for facts in map(json.loads, lines) if facts["name"] == "sent"]
    assert sum(facts["bytes"] for facts in sent if facts["attrs"]["axis"] == "attention") > 0


@pytest.mark.parametrize("name", ["fsdp-2", "sp-2", "hsdp-4", "zero-1", "pairs-4", "zero-2-pp-2"])
def test_bf16_on_ranks_learns_about_what_one_rank_learns(name: str, text: Path, cache: Path, tmp_path: Path) -> None:
    """Rounding differs: FSDP gathers all weights in bf16, norms too, which one rank keeps in float32."""
    found = {}
    for label, (ranks, over) in {"one": (1, {}), name: LAYOUTS[name]}.items():
        gang.run(ranked.train, ranks, ranked.table(text, cache, **over, precision="bf16"), str(tmp_path / label))
        found[label] = ranked.losses(tmp_path / label)
    assert found[name] == pytest.approx(found["one"], rel=1e-2)


PAIRS = [
    ("pp-2-tp-2", "fsdp-2"),
    ("fsdp-2", "pp-2-tp-2"),
    ("sp-2", "pp-2"),
    ("hsdp-4", "cp-2"),
    ("pp-2-v", "tp-2"),
    ("ladder-4", "fsdp-2"),
    ("fsdp-2", "pairs-4"),
    ("pairs-4", "zero-2-pp-2"),
    ("zero-1", "ladder-4"),
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_goes_on_under_another_layout(
    before: str, after: str, text: Path, cache: Path, one: Path, tmp_path: Path
) -> None:
    """Twice: from step 5 with other ranks, and from step 10 with one."""
    path = tmp_path / "run"
    ranks, over = LAYOUTS[before]
    gang.run(ranked.train, ranks, ranked.table(text, cache, **over), str(path))
    keep_until(path, 5)
    ranks, over = LAYOUTS[after]
    notes = gang.run(ranked.train, ranks, ranked.table(text, cache, **over), str(path))
    assert any("going on from step 5" in note for note in notes[0])
    same_end(path, one)
    keep_until(path, 10)
    gang.run(ranked.train, 1, ranked.table(text, cache), str(path))
    same_end(path, one)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_on_ranks_learn_the_same(text: Path, cache: Path, one: Path, tmp_path: Path) -> None:
    ranks, over = LAYOUTS["sp-2"]
    gang.run(ranked.train, ranks, ranked.table(text, cache, **over, compile=True), str(tmp_path / "run"))
    same_end(tmp_path / "run", one)


@pytest.mark.parametrize("name", ["fsdp-2", "pp-2-tp-2", "pairs-4"])
def test_samples_are_those_of_one_rank(name: str, text: Path, cache: Path, tmp_path: Path) -> None:
    """The first rank gathers the whole model, writes, and the run goes on."""
    asked = {"prompts": ["line 3", "of document"], "every": 4, "tokens": 12, "temperature": 0.0}
    found = {}
    for label, (ranks, over) in {"one": (1, {}), name: LAYOUTS[name]}.items():
        path = tmp_path / label
        gang.run(ranked.train, ranks, ranked.table(text, cache, **over, samples=asked), str(path))
        found[label] = (path / "samples.jsonl").read_text()
        assert len(ranked.rows(path)) >= 12
    assert found["one"] == found[name]
    assert found["one"].count("\n") == 6


@pytest.mark.parametrize("name", ["pp-2-tp-2", "hsdp-4", "ladder-4"])
def test_a_run_of_ranks_is_exported_like_any_other(
    name: str, text: Path, cache: Path, one: Path, tmp_path: Path
) -> None:
    """A tied table stands at both ends of the pipeline and once in the file; the last save is float32 and whole."""
    ranks, over = LAYOUTS[name]
    gang.run(ranked.train, ranks, ranked.table(text, cache, **over), str(tmp_path / "run"))
    last = save.read(complete(tmp_path / "run" / "checkpoints")[-1])
    assert {value.dtype for value in last.tensors["model"].values()} == {torch.float32}
    assert last.tensors["optimizer"], "the last save can be gone on from"
    files = {}
    for label, path in (("ranks", tmp_path / "run"), ("one", one)):
        for dtype in ("fp32", "bf16"):
            report = export_model(path, tmp_path / f"{label}-{dtype}", dtype=dtype, transformers=False)
            assert report["max_difference"] <= 1e-5
            files[label, dtype] = load_file(tmp_path / f"{label}-{dtype}" / "model.safetensors")
    assert "lm_head.weight" not in files["ranks", "fp32"]
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours, theirs = files["ranks", dtype], files["one", dtype]
        assert ours.keys() == theirs.keys()
        assert {value.dtype for value in ours.values()} == {kind}
        for key, value in theirs.items():
            assert (ours[key].float() - value.float()).abs().max() <= 1e-2 * value.float().abs().max(), key


def keep_until(path: Path, step: int) -> None:
    """Make a run look as if it had been killed after a checkpoint."""
    (path / "summary.json").unlink()
    for checkpoint in complete(path / "checkpoints"):
        if int(checkpoint.name[5:]) > step:
            (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("name", ["fsdp-2", "pp-2", "tp-2", "zero-1"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    name: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    ranks, over = LAYOUTS[name]
    spec = ranked.table(text, cache, **over, checkpoints={"every": 1, "keep": 99})
    head = 1 if name == "pp-2" else 0  # the rank that has a loss
    call = 13 if "micro_batch_size" in over else 4  # in step 4
    found = gang.run(ranked.poisoned, ranks, spec, str(tmp_path / "run"), head, call)
    assert all("the update was not made" in error for error, _ in found)
    done = max(row["step"] for row in ranked.rows(tmp_path / "run"))
    assert done == 3
    weights = [save.read(path).tensors["model"] for path in complete(tmp_path / "run" / "checkpoints")]
    assert all(torch.isfinite(value).all() for value in weights[-1].values())


def test_a_rank_that_waited_in_vain_tells_its_last_exchanges(text: Path, cache: Path, tmp_path: Path) -> None:
    """One rank does not answer any more; gloo tells the other one that the connection is gone."""
    spec = ranked.table(text, cache, layout={"tp": 2})
    told = gang.run(ranked.broken, 2, spec, str(tmp_path / "run"), 0, 3)[0]
    assert told.startswith("RuntimeError: Timed out waiting")
    assert "last exchanges of this rank: " in told
    assert told.count("tp all-reduce") >= 3


def test_each_rank_writes_its_part_and_a_damaged_part_is_named(text: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    gang.run(ranked.train, 2, ranked.table(text, cache), str(path))
    last = complete(path / "checkpoints")[-1]
    parts = sorted(p.name for p in last.glob("model*"))
    assert parts == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    manifest = json.loads((last / "manifest.json").read_text())
    assert set(parts) < set(manifest["files"])
    assert not list(last.glob("listed-*")), "lists are gone"
    assert locate(path).hashes().keys() == set(parts)
    part = last / parts[1]
    part.write_bytes(part.read_bytes()[:-1])
    keep_until(path, 99)
    with pytest.raises(gang.RankFailed, match=r"model-00002-of-00002\.safetensors has .* were written"):
        gang.run(ranked.train, 2, ranked.table(text, cache), str(path), str(last))


def test_a_pipeline_that_mostly_waits_is_told(text: Path, cache: Path, tmp_path: Path) -> None:
    over = {"layout": {"pp": 2, "schedule": "gpipe"}, "micro_batch_size": 8, "steps": 2}
    notes = gang.run(ranked.train, 2, ranked.table(text, cache, **over), str(tmp_path / "run"))
    assert any("ranks of the pipeline wait 100 % of the time that they compute" in note for note in notes[0])


def test_nodes_that_nobody_names_are_told(text: Path, cache: Path, tmp_path: Path) -> None:
    over = {"layout": {"use": "zero", "stage": "hpz"}, "steps": 1}
    notes = gang.run(ranked.train, 2, ranked.table(text, cache, **over), str(tmp_path / "run"))
    assert any("ranks_per_node is left out; this is hsdp, in groups of 2" in note for note in notes[0])


@pytest.mark.parametrize(
    ("ranks", "over", "said"),
    [
        (2, {"layout": {"pp": 4}, "micro_batch_size": 1}, "Legal with 2: pp = 2, dp_shard = 1"),
        (2, {"layout": {"pp": 2}, "micro_batch_size": 3}, "Legal: micro_batch_size = 1, 2, 4, 8"),
        (2, {"batch_size": 7}, "batch_size = 7; take 8"),
        (2, {"layout": {"cp": 2}, "optimizer": {"use": "muon", "lr": 1e-3}}, "whole matrices"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_every_rank_before_anything_is_built(
    ranks: int, over: dict[str, Any], said: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    found = gang.run(ranked.refused, ranks, ranked.table(text, cache, **over), str(tmp_path / "run"))
    assert all(said in error for error in found), found
    assert not (tmp_path / "run").exists()


CODED = {"saved": "coat", "optimizer": {"use": "coat", "around": {"use": "adamw", "lr": 1e-2}}}
WIDER = {**ranked.MODEL, "hidden_size": 64, "ffn_size": 96}


@pytest.mark.parametrize("name", ["fsdp-2", "pp-2", "ladder-4"])
def test_a_run_in_codes_goes_on_to_the_bit_and_under_another_layout(
    name: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    """Scales are of a rank's part, so ranks learn about what one rank learns; another layout goes on about there."""
    ranks, over = LAYOUTS[name]
    spec = ranked.table(text, cache, **over, **CODED, model=WIDER)
    whole, path = tmp_path / "whole", tmp_path / "run"
    gang.run(ranked.train, ranks, spec, str(whole))
    shutil.copytree(whole, path)
    keep_until(path, 5)
    gang.run(ranked.train, ranks, spec, str(path))
    assert ranked.losses(path)[-7:] == ranked.losses(whole)[-7:]
    ours, theirs = (save.read(complete(folder / "checkpoints")[-1]) for folder in (path, whole))
    for kind in ("model", "optimizer"):
        assert all(torch.equal(x.float(), theirs.tensors[kind][n].float()) for n, x in ours.tensors[kind].items())
    keep_until(path, 10)
    gang.run(ranked.train, 1, ranked.table(text, cache, **CODED, model=WIDER), str(path))
    assert ranked.losses(path)[-2:] == pytest.approx(ranked.losses(whole)[-2:], rel=2e-2)
    gang.run(ranked.train, 1, ranked.table(text, cache, **CODED, model=WIDER), str(tmp_path / "one"))
    assert ranked.losses(whole) == pytest.approx(ranked.losses(tmp_path / "one"), rel=3e-2)


FED_BACK = {
    "zero-3": {"levels": [2], "gradients_as": "int4", "feedback": 1.0, "block": 64},
    "topo": {"weights": 2, "levels": [2], "gradients_as": "int8", "feedback": 0.9, "block": 64},
}


@pytest.mark.parametrize("name", FED_BACK)
def test_feedback_goes_on_to_the_bit(name: str, text: Path, cache: Path, tmp_path: Path) -> None:
    """On the same ranks. Begun anew, the first loss after the checkpoint's next step would be another."""
    spec = ranked.table(text, cache, layout={"state": FED_BACK[name]}, micro_batch_size=1, steps=8)
    whole, path = tmp_path / "whole", tmp_path / "run"
    gang.run(ranked.train, 4, spec, str(whole))
    shutil.copytree(whole, path)
    keep_until(path, 5)
    notes = gang.run(ranked.train, 4, spec, str(path))
    assert not any("anew" in note for note in notes[0])
    assert ranked.losses(path) == ranked.losses(whole)
    ours, theirs = (save.read(complete(folder / "checkpoints")[-1]) for folder in (path, whole))
    assert any(found.startswith("rank-3/") and found.endswith("/codes") for found in theirs.tensors["missed"])
    for kind in ("model", "optimizer", "missed"):
        assert ours.tensors[kind].keys() == theirs.tensors[kind].keys()
        assert all(torch.equal(x, theirs.tensors[kind][n]) for n, x in ours.tensors[kind].items())


def test_feedback_begins_anew_on_another_layout_and_says_so(text: Path, cache: Path, tmp_path: Path) -> None:
    """Also where the checkpoint has none; without feedback nothing is said."""
    coded = {"gradients_as": "int8", "block": 64}
    plain, fed, other = (
        ranked.table(text, cache, layout={"state": {**coded, **more}}, steps=8)
        for more in ({}, {"feedback": 1.0}, {"feedback": 0.5})
    )
    path = tmp_path / "run"
    gang.run(ranked.train, 2, plain, str(path))
    assert not save.read(complete(path / "checkpoints")[-1]).tensors["missed"]
    for spec, said in ((fed, True), (other, True), (plain, False)):
        keep_until(path, 5)
        notes = gang.run(ranked.train, 2, spec, str(path))
        assert any("feedback begins anew" in note and "another layout" in note for note in notes[0]) == said


def test_coded_moments_are_cut_as_weights_are(text: Path, cache: Path, tmp_path: Path) -> None:
    """Matrices cut by columns and rows over tp: each rank saves its groups, and one rank goes on with all of them."""
    spec = ranked.table(text, cache, optimizer=CODED["optimizer"], model=WIDER)
    path = tmp_path / "run"
    gang.run(ranked.train, 2, {**spec, "layout": {"tp": 2}}, str(path))
    codes = save.read(complete(path / "checkpoints")[-1]).tensors["optimizer"]
    assert codes["blocks.0.ffn.down_proj.weight/exp_avg.codes"].shape == (64, 96)
    assert codes["blocks.0.ffn.down_proj.weight/exp_avg.scale"].shape == (64, 96 // 16)  # 48 columns a rank
    before = ranked.losses(path)
    keep_until(path, 5)
    gang.run(ranked.train, 1, spec, str(path))
    assert ranked.losses(path)[-2:] == pytest.approx(before[-2:], rel=2e-2)
