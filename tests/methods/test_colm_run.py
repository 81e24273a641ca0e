"""CoLM in whole runs: ratio 1, resume, memory, weights; and everything it refuses or has to bear."""

from __future__ import annotations

import dataclasses
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.data.load import Batch
from lmworks.methods.colm import small_sources
from lmworks.methods.colm.selector import candidates_for
from lmworks.model.backbone import Backbone
from lmworks.model.checkpoint import complete
from lmworks.train import save
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import SGD, AdamW, Muon
from lmworks.train.slots import Component, Objective, Selector
from lmworks.train.step import Step
from tests.methods.coresets import draw, numbers, probe_of, started
from tests.train import toy
from tests.train.test_step import step_on

SHARES = {"letters": 0.6, "digits": 0.3, "signs": 0.1}
SIGNS = {"letters": "abcdefgh", "digits": "0123456789", "signs": "+-*/=<>"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of text in a folder each."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, signs in SIGNS.items():
        (folder / name).mkdir()
        for i in range(20):
            text = "".join(signs[(i * 7919 + j * j * 104729) % len(signs)] for j in range(40 + 9 * i))
            (folder / name / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def over(corpus: Path, selector: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    """Settings of a run over the three kinds."""
    readers = [
        {"use": "text", "name": name, "paths": [str(corpus / name / "*.txt")], "weight": share}
        for name, share in SHARES.items()
    ]
    data = {"readers": readers, "tokenizer": "bytes", "sequence_length": 32, "validation": 0.2}
    return {"data": {**data, "cache": str(corpus / "cache")}, "selector": selector, **more}


def made(corpus: Path, selector: dict[str, Any] | str, **more: Any) -> Any:
    return toy.recipe(corpus, corpus / "cache", **over(corpus, selector, **more))


def learned(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of a run without times, energy and memory; what is counted of memory hangs on where an attempt began."""
    timed = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "saved_bytes", "state_bytes", "colm/seconds"}
    timed |= {"joules", "joules_modelled", "kwh", "kg_co2e", "checkpoint/blocked_seconds"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows(folder.metrics)]


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return dict(save.read(complete(folder.checkpoints)[-1]).tensors["model"])


# --- runs ------------------------------------------------------------------------------------------------------------


def test_ratio_one_is_plain_training_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    plain, _ = toy.train(made(corpus, "all"), tmp_path / "plain")
    colm, _ = toy.train(made(corpus, {"use": "colm", "ratio": 1.0}), tmp_path / "colm")
    assert learned(colm) == learned(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(colm).items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"perturbation": "fixed", "directions": 1}, {"perturbation": "row"}, {"proxy": "random", "keep": []}],
    ids=["step", "fixed", "row", "random"],
)
def test_a_run_that_was_stopped_goes_on_to_choose_the_same_rows(
    settings: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    recipe = made(corpus, {"use": "colm", "coordinates": 64, "measure_every": 4, **settings}, micro_batch_size=3)
    whole, _ = toy.train(recipe, tmp_path / "whole")
    assert toy.stopped(recipe, tmp_path / "run", 3).exit_code == 3
    toy.stopped(recipe, tmp_path / "run", 7, signal.SIGUSR1)
    folder, _ = toy.train(recipe, tmp_path / "run")
    assert learned(folder) == learned(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(folder).items())


def test_a_run_reports_what_it_chose(corpus: Path, tmp_path: Path) -> None:
    folder, _ = toy.train(made(corpus, {"use": "colm", "coordinates": 64, "weighted": True}), tmp_path / "run")
    steps = [row for row in rows(folder.metrics) if "loss" in row]
    for row in steps:
        assert sum(row[f"colm/rows/{name}"] for name in SHARES) == 4
        assert row["colm/kept"] == row["colm/rows/digits"] + row["colm/rows/signs"] or row["colm/kept"] == 4
        assert (row["colm/candidates"], row["colm/sources"], row["colm/fallbacks"]) == (8, 3, 0)
        assert row["colm/seconds"] > 0
        assert row["colm/saved_bytes_of_all"] == 2 * row["colm/saved_bytes"] > 0
        assert row["colm/selection_bytes"] == 4 * (16 * 32) * (4 + 2)
    assert steps[-1]["loss"] < steps[0]["loss"]
    (found,) = [row for row in rows(folder.metrics) if "val_loss" in row]
    assert found["val_loss/mean"] == pytest.approx(sum(found[f"val_loss/{name}"] for name in SHARES) / 3)
    assert steps[-1]["tokens"] <= 12 * 4 * 32


@pytest.mark.slow
def test_the_smallest_recipe_runs(tmp_path: Path) -> None:
    recipe = recipes.load("methods/colm", verb="train", sets=["device=cpu", "sinks=[]"])
    folder, report = toy.train(recipe, tmp_path / "run")
    steps = [row for row in report.rows if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert "colm/gradient_error" in steps[0]
    assert folder.is_done()


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps during a step for its backward pass, without the weights; each tensor once."""
    seen: dict[int, int] = {}
    held: list[Tensor] = []
    own = {p.data_ptr() for p in step.placement.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # alive until the step ends, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def test_half_of_a_double_batch_keeps_what_a_plain_batch_keeps() -> None:
    """The claim on memory: 2b rows chosen down to b need the saved tensors of b rows, half of those of 2b."""
    candidates = draw([0] * 14 + [1] * 2, length=16)

    def run(selector: Selector | None, drawn: Batch, rows: int) -> int:
        made = step_on(toy.model(dtype=torch.float32), [drawn], selector=selector)
        return saved_bytes(Step(**{**vars(made), "rows": rows}))

    colm = started(toy.model(dtype=torch.float32), {"a": 14 / 16, "b": 2 / 16})
    chosen, half, whole = run(colm, candidates, 8), run(None, candidates[slice(0, 8)], 8), run(None, candidates, 16)
    assert chosen == pytest.approx(half, rel=0.05)  # documents differ, and with them the tiles of attention
    assert chosen < 0.6 * whole


# --- settings --------------------------------------------------------------------------------------------------------


def problems(corpus: Path, selector: dict[str, Any], **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        made(corpus, {"use": "colm", **selector}, **more)
    return str(caught.value)


def test_a_keep_list_that_leaves_no_room_is_refused_with_the_counts(corpus: Path) -> None:
    text = problems(corpus, {"keep": ["letters", "signs"]})
    assert "of 8 candidates 5.6 are kept on average (letters 4.8, signs 0.8), and a step trains on 4" in text
    assert "keep = ['signs']" in text
    assert "selector.keep" in text
    assert "of 16 candidates 6.4" in problems(corpus, {"ratio": 0.25})  # the default rule: digits and signs
    made(corpus, {"use": "colm", "ratio": 1.0, "keep": ["letters", "signs"]})


def test_an_unknown_reader_is_answered_with_the_nearest(corpus: Path) -> None:
    assert "no reader is called 'sings'; did you mean 'signs'?" in problems(corpus, {"keep": ["sings"]})


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float, corpus: Path) -> None:
    assert "selector.ratio" in problems(corpus, {"ratio": ratio})


@pytest.mark.parametrize(
    ("name", "setting"), [("directions", 0), ("coordinates", 0), ("epsilon", 0.0), ("measure_every", 0)]
)
def test_settings_of_nothing_are_refused(name: str, setting: float, corpus: Path) -> None:
    assert f"selector.{name}" in problems(corpus, {name: setting})


def test_a_step_of_no_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one row, got 0"):
        started(toy.model(), {"a": 1.0}).candidates(0)


def test_a_matrix_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no matrix 'attn.v_porj'; did you mean 'attn.v_proj'\?"):
        started(toy.model(), {"a": 1.0}, matrix="attn.v_porj")


@final
@dataclass(frozen=True, kw_only=True)
class NoRows(Objective):
    """An objective without a loss of a single row."""

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return CrossEntropy().count(batch)

    def loss(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        return CrossEntropy().loss(model, batch, hidden_BTD)


def test_an_objective_without_a_loss_of_a_row_is_refused(corpus: Path) -> None:
    recipe = dataclasses.replace(made(corpus, {"use": "colm"}), objective=NoRows())
    (problem,) = recipe.selector.check(recipe)
    assert str(problem) == "proxy: NoRows has no loss of a single row, which proxies are made from"


def test_the_resolved_recipe_is_the_same_selector(corpus: Path) -> None:
    import tomllib

    recipe = made(corpus, {"use": "colm", "keep": [], "masked": False, "betas": [0.5, 0.6]})
    assert recipes.decode(tomllib.loads(recipes.dump(recipe))).selector == recipe.selector


def test_small_is_below_an_even_share_unless_named() -> None:
    assert small_sources({"a": 0.5, "b": 0.3, "c": 0.2}, None) == {"b", "c"}
    assert small_sources({"a": 0.5, "b": 0.5}, None) == set()
    assert small_sources({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, None) == set()
    assert small_sources({"a": 0.5, "b": 0.3, "c": 0.2}, ("a",)) == {"a"}
    assert small_sources({"a": 0.5, "b": 0.5}, ()) == set()
    assert small_sources({"only": 1.0}, None) == set()


@pytest.mark.parametrize(
    ("rows", "ratio", "want"), [(16, 0.5, 32), (3, 0.4, 8), (7, 0.7, 10), (5, 1.0, 5), (1, 0.3, 4)]
)
def test_candidates_are_rows_over_ratio_rounded_up(rows: int, ratio: float, want: int) -> None:
    assert candidates_for(rows, ratio) == want


def test_betas_are_the_optimizers_where_it_is_adam() -> None:
    adam = AdamW(lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    for optimizer, want in (
        (adam, ((0.8, 0.9), 1e-6)),
        (SGD(lr=1e-3), ((0.9, 0.999), 1e-8)),
        (Muon(lr=1e-3), ((0.9, 0.95), 1e-8)),
    ):
        history = started(toy.model(), {"a": 1.0}, optimizer).history
        assert (history.betas, history.eps) == want
    own = started(toy.model(), {"a": 1.0}, adam, betas=(0.1, 0.2), eps=1e-3).history
    assert (own.betas, own.eps) == ((0.1, 0.2), 1e-3)


# --- what a draw may hold --------------------------------------------------------------------------------------------


def without_targets(batch: Batch, rows: list[int]) -> Batch:
    targets_BT = batch.targets_BT.clone()
    targets_BT[rows] = -100
    return dataclasses.replace(batch, targets_BT=targets_BT)


def test_one_source_has_no_keep_list() -> None:
    model = toy.model()
    for shares in ({"only": 1.0}, {}):
        probe = probe_of(model)
        picked = started(model, shares).select(draw([0] * 8), 4, probe)
        assert len(set(numbers(picked))) == 4
        assert probe.notes()["colm/kept"] == 0
        assert probe.notes()["colm/sources"] == 1


def test_kept_rows_beyond_the_budget_are_cut_and_nothing_is_looked_at() -> None:
    model = toy.model()
    probe, selector = probe_of(model), started(model, {"a": 0.6, "b": 0.4})
    assert numbers(selector.select(draw([1, 0, 1, 1, 0, 1]), 3, probe)) == [0, 2, 3]
    assert probe.booked == 0
    assert selector.history.updates == 0


@pytest.mark.parametrize("proxy", ["zeroth-order", "exact"])
def test_rows_without_a_proxy_come_last(proxy: str) -> None:
    model = toy.model()
    batch = without_targets(draw([0] * 8), [0, 2, 5])
    selector = started(model, {"a": 1.0}, proxy=proxy)
    assert not set(numbers(selector.select(batch, 4, probe_of(model)))) & {0, 2, 5}
    assert set(numbers(selector.select(batch, 6, probe_of(model)))) == {0, 1, 3, 4, 6, 7}
    assert all(bool(torch.isfinite(value).all()) for value in selector.state().values())
    assert selector.fallbacks == 0


@pytest.mark.parametrize("proxy", ["zeroth-order", "exact"])
def test_when_no_row_has_a_proxy_rows_are_drawn_and_the_step_is_counted(proxy: str) -> None:
    model = toy.model()
    selector, probe = started(model, {"a": 0.9, "b": 0.1}, proxy=proxy), probe_of(model)
    picked = selector.select(without_targets(draw([0] * 7 + [1]), list(range(7))), 4, probe)
    assert len(set(numbers(picked))) == 4
    assert 7 in numbers(picked)
    assert probe.notes()["colm/fallbacks"] == 1
    assert selector.history.updates == 0
    assert started_again(selector, model).fallbacks == 1


def started_again(selector: Any, model: Backbone) -> Any:
    """Another selector with the first one's state."""
    other = started(model, {"a": 0.9, "b": 0.1}, proxy=selector.settings.proxy)
    other.load(selector.state())
    return other


def test_a_model_that_gives_no_number_stops_at_the_guard_and_not_in_the_selection() -> None:
    model = toy.model()
    with torch.no_grad():
        model.get_parameter("norm.weight")[0] = math.nan
    selector = started(model, {"a": 1.0})
    selector.select(draw([0] * 8), 4, probe_of(model))
    assert selector.fallbacks == 1


@pytest.mark.parametrize("micro_rows", [1, 3, 7])
def test_candidates_need_not_divide_by_the_micro_batch(micro_rows: int) -> None:
    model = toy.model()
    batch = draw([0] * 11)
    whole = numbers(started(model, {"a": 1.0}).select(batch, 5, probe_of(model)))
    assert numbers(started(model, {"a": 1.0}).select(batch, 5, probe_of(model, micro_rows=micro_rows))) == whole


def test_the_state_holds_moments_counters_and_the_seed() -> None:
    model = toy.model()
    first = started(model, {"a": 1.0}, perturbation="fixed")
    assert set(first.state()) == {"counters"}
    probe = probe_of(model)
    for step in range(3):
        first.select(draw([0] * 8, seed=step), 4, probe)
    other = started(model, {"a": 1.0}, perturbation="fixed")
    other.load(first.state())
    assert numbers(other.select(draw([0] * 8, seed=9), 4, probe)) == numbers(
        first.select(draw([0] * 8, seed=9), 4, probe)
    )
    assert all(torch.equal(value, first.state()[name]) for name, value in other.state().items())


def test_all_rows_chosen_weigh_alike_and_mean_one_when_weighted() -> None:
    model = toy.model()
    picked = started(model, {"a": 0.8, "b": 0.2}, weighted=True).select(draw([0] * 8 + [1] * 2), 5, probe_of(model))
    assert picked.weights_B is not None
    assert float(picked.weights_B.mean()) == pytest.approx(1.0)
    alone = picked.weights_B[-2:]  # the kept source: each row stands for itself
    assert torch.equal(alone, alone[:1].expand(2))
    assert float(picked.weights_B.sum() / alone[0]) == pytest.approx(10.0)  # all candidates are stood for
    assert started(model, {"a": 1.0}).select(draw([0] * 8), 4, probe_of(model)).weights_B is None
