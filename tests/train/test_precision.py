"""precision = 'float8' in whole runs: learned, resumed, told, refused; what is left behind is plain."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import MissingExtra, RecipeError
from lmworks.core.journal import rows
from lmworks.generate.writer import open_writer
from lmworks.model import ops
from lmworks.model.checkpoint import complete
from lmworks.model.layers import Linear
from lmworks.parallel import gang
from lmworks.train.build import build, settle
from lmworks.train.precision import SCALES, compute_dtype
from tests.train import ranked, toy

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra gpu")
KINDS = list(SCALES)
FITTING = {"use": "decoder", "n_layers": 2, "hidden_size": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}


def recipe(text: Path, cache: Path, precision: str, **over: Any) -> Any:
    return toy.recipe(text, cache, **{"precision": precision, "model": FITTING, **over})


def losses(folder: Any) -> list[float]:
    return [row["loss"] for row in rows(folder.metrics) if "loss" in row]


def test_activations_of_float8_runs_are_bf16() -> None:
    assert {name: compute_dtype(name) for name in ("fp32", "bf16", *KINDS)} == {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "float8": torch.bfloat16,
        "float8-rowwise": torch.bfloat16,
    }


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_as_bf16_does(kind: str, text: Path, cache: Path, tmp_path: Path) -> None:
    calm = {"steps": 24, "optimizer": {"use": "adamw", "lr": 3e-3}}
    plain, _ = toy.train(recipe(text, cache, "bf16", **calm), tmp_path / "bf16")
    folder, report = toy.train(recipe(text, cache, kind, **calm), tmp_path / kind)
    want, found = losses(plain), losses(folder)
    assert found != want
    assert want[-1] < want[0] - 1.0
    assert found == pytest.approx(want, rel=0.02)
    assert not [note for note in report.notes if "bf16" in note], "every product fits"
    assert recipes.load(folder.recipe).precision == kind


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("over", [{}, {"saved": "recompute"}, {"micro_batch_size": 2}])
def test_two_resumes_are_bitwise_the_unbroken_run(
    over: dict[str, Any], text: Path, cache: Path, tmp_path: Path
) -> None:
    made = recipe(text, cache, "float8", **over)
    unbroken, _ = toy.train(made, tmp_path / "unbroken")
    for step in (3, 7):
        toy.stopped(made, tmp_path / "broken", step)
    broken, _ = toy.train(made, tmp_path / "broken")
    assert toy.learned(broken) == toy.learned(unbroken)


@needs_torchao
@pytest.mark.slow
def test_recomputed_blocks_give_the_same_bits(text: Path, cache: Path, tmp_path: Path) -> None:
    kept, _ = toy.train(recipe(text, cache, "float8"), tmp_path / "kept")
    again, _ = toy.train(recipe(text, cache, "float8", saved="recompute"), tmp_path / "again")
    assert toy.learned(again) == toy.learned(kept)


@needs_torchao
def test_what_a_run_leaves_behind_is_plain(text: Path, cache: Path, tmp_path: Path) -> None:
    samples = {"prompts": ["line "], "tokens": 8, "temperature": 0.0}
    folder, _ = toy.train(recipe(text, cache, "float8", steps=4, samples=samples), tmp_path / "run")
    writer = open_writer(folder.path, precision="bf16", device="cpu")
    linears = [m for m in writer.model.modules() if isinstance(m, Linear)]
    assert all(layer.product is ops.linear for layer in linears)
    (told,) = rows(folder.samples)
    checkpoint = complete(folder.checkpoints)[-1]
    assert checkpoint.is_dir()
    assert told["text"]


@needs_torchao
def test_validation_is_that_of_the_plain_weights(text: Path, cache: Path, tmp_path: Path) -> None:
    """No update is made (rate 0), so both runs validate the same weights."""
    still = {"optimizer": {"use": "sgd", "lr": 1e-30}, "steps": 2}
    found = []
    for kind in ("bf16", "float8"):
        folder, _ = toy.train(recipe(text, cache, kind, **still), tmp_path / kind)
        found.append([row["val_loss"] for row in rows(folder.metrics) if "val_loss" in row])
    assert found[0] == found[1]


@needs_torchao
def test_what_does_not_fit_is_told(text: Path, cache: Path, tmp_path: Path) -> None:
    made = recipe(text, cache, "float8", steps=1, model=FITTING | {"ffn_size": [48, 40]})
    _, report = toy.train(made, tmp_path / "run")
    (note,) = [note for note in report.notes if "bf16" in note]
    assert note.endswith("blocks.1.ffn.gate_proj, blocks.1.ffn.up_proj, blocks.1.ffn.down_proj")


@needs_torchao
def test_experts_are_told(text: Path, cache: Path) -> None:
    model = FITTING | {"experts": {"count": 4, "size": 16}}
    made = build(settle(recipe(text, cache, "float8", model=model)))
    assert made.notes == ("experts and routers stay in bf16; the other products of the blocks are in float8",)


@needs_torchao
def test_a_model_of_which_nothing_fits_is_refused(text: Path, cache: Path) -> None:
    made = recipe(text, cache, "float8", model=FITTING | {"hidden_size": 36, "n_heads": 3, "ffn_size": 40})
    with pytest.raises(RecipeError, match="precision: has no effect: float8 takes matrices"):
        build(settle(made))


@needs_torchao
def test_tokens_come_in_sixteens(text: Path, cache: Path) -> None:
    made = recipe(text, cache, "float8", data=toy.table(text, cache)["data"] | {"sequence_length": 40})
    with pytest.raises(RecipeError, match=r"data.sequence_length: is 40; .* a multiple of 16: 48"):
        settle(made)


@needs_torchao
def test_an_old_gpu_is_refused(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(RecipeError, match=r"precision: this GPU has no products for eight-bit floats.*8\.0"):
        settle(recipe(text, cache, "float8", device="cuda"))


def test_without_torchao_it_says_what_to_install(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="'torchao' is not installed, and precision = 'float8' needs it") as caught:
        settle(recipe(text, cache, "float8"))
    assert "lmworks[gpu]" in str(caught.value)


@needs_torchao
def test_curvature_is_taken_of_plain_products(text: Path, cache: Path, tmp_path: Path) -> None:
    """Products in float8 cannot be differentiated twice; the probe's passes are plain."""
    optimizer = {"use": "sophia", "lr": 1e-3, "estimator": "hutchinson", "every": 2}
    folder, _ = toy.train(recipe(text, cache, "float8", steps=4, optimizer=optimizer), tmp_path / "run")
    assert [row["step"] for row in rows(folder.metrics) if "sophia/h_norm" in row] == [1, 3]


@needs_torchao
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "layout"),
    [("fsdp", {}), ("tp", {"tp": 2}), ("sp", {"tp": 2, "sequence_parallel": True}), ("cp", {"cp": 2})],
)
def test_two_ranks_learn_what_one_does(
    name: str, layout: dict[str, Any], text: Path, cache: Path, tmp_path: Path
) -> None:
    """Scales are those of a rank's own values, so losses agree within float8's error, not to the last bit."""
    wide = FITTING | {"hidden_size": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 96}
    table = ranked.table(text, cache, precision="float8", model=wide, steps=6)
    gang.run(ranked.train, 1, table, str(tmp_path / "one"))
    notes = gang.run(ranked.train, 2, table | {"layout": layout}, str(tmp_path / "two"))
    one, two = ([row["loss"] for row in ranked.rows(tmp_path / run) if "loss" in row] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=0.02)
    assert not [note for of_rank in notes for note in of_rank if "bf16" in note]
