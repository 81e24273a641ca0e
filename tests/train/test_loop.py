"""The loop: complete run folders, bitwise repetition and resume, refusals."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from lmworks.core.errors import CheckpointError, DataError, LmworksError, RecipeError, Stopped, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete
from lmworks.train import offload, save
from lmworks.train.loop import run
from tests.train import toy


def weights(folder: RunFolder) -> dict[str, Any]:
    return dict(save.read(complete(folder.checkpoints)[-1]).tensors["model"])


def test_a_run_folder_is_complete(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(
        text, cache, sinks=["tensorboard"], samples={"prompts": ["line "], "tokens": 8}, validation={"every": 6}
    )
    folder, report = toy.train(made, tmp_path / "run")
    names = {p.name for p in folder.path.iterdir()}
    assert names == {
        "recipe.toml", "model.toml", "record.json", "events.jsonl", "metrics.jsonl", "summary.json", "samples.jsonl",
        "tokenizer", "checkpoints", "tensorboard", "curves.png",
    }  # fmt: skip
    found = list(rows(folder.metrics))
    steps, checks = [r for r in found if "loss" in r], [r for r in found if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in checks] == [6, 12]
    wanted = {"step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second", "mfu", "memory_bytes"}
    assert wanted <= set(steps[0])
    assert {"val_loss", "val_bits_per_byte"} <= set(checks[0])
    assert steps[-1]["loss"] < steps[0]["loss"]
    summary = json.loads(folder.summary.read_text())
    assert summary["steps"] == 12
    assert summary["loss"] == steps[-1]["loss"]
    record = json.loads(folder.record.read_text())
    assert record["code"]["sha256"]
    assert record["data"]["fingerprint"]
    assert record["data"]["tokenizer_id"]
    assert record["versions"]["torch"]
    assert {"start", "step", "validate", "save"} <= {e["name"] for e in rows(folder.events)}
    assert report.rows == found
    (sample,) = rows(folder.samples)
    assert sample["prompt"] == "line "


def test_the_resolved_recipe_runs_again_to_the_same_losses(text: Path, cache: Path, tmp_path: Path) -> None:
    from lmworks.core import recipe as recipes

    first, _ = toy.train(toy.recipe(text, cache), tmp_path / "a")
    again, _ = toy.train(recipes.load(first.recipe), tmp_path / "b")
    assert toy.learned(first) == toy.learned(again)
    a, b = weights(first), weights(again)
    assert all((a[name] == b[name]).all() for name in a)


def test_another_seed_gives_other_losses(text: Path, cache: Path, tmp_path: Path) -> None:
    first, _ = toy.train(toy.recipe(text, cache), tmp_path / "a")
    other, _ = toy.train(toy.recipe(text, cache, seed=1), tmp_path / "b")
    assert toy.learned(first) != toy.learned(other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_two_stops_and_two_resumes_are_bitwise_the_unbroken_run(
    optimizer: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    over: dict[str, Any] = {
        "optimizer": {"use": optimizer, "lr": 3e-3},
        "validation": {"every": 5},
        "samples": {"every": 5, "prompts": ["li"], "tokens": 4},
        "watchers": [{"use": "early-stop", "patience": 99}],
        "micro_batch_size": 3,
    }
    made = toy.recipe(text, cache, **over)
    whole, _ = toy.train(made, tmp_path / "whole")
    assert toy.stopped(made, tmp_path / "run", 3).exit_code == 3
    toy.stopped(made, tmp_path / "run", 7, signal.SIGUSR1)
    folder, report = toy.train(made, tmp_path / "run")
    assert "going on from step 7" in " ".join(report.notes)
    assert toy.learned(folder) == toy.learned(whole)
    assert list(rows(folder.samples)) == list(rows(whole.samples))
    a, b = weights(folder), weights(whole)
    assert all((a[name] == b[name]).all() for name in a)


def test_a_time_limit_stops_with_exit_code_3(text: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="limit of 1e-06 minutes") as caught:
        run(toy.recipe(text, cache, max_minutes=1e-6), tmp_path / "run", resume="auto", report=toy.Silent())
    assert caught.value.exit_code == 3
    folder, _ = toy.train(toy.recipe(text, cache), tmp_path / "run")
    assert folder.is_done()


def test_a_finished_run_is_left_as_it_is(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache)
    folder, _ = toy.train(made, tmp_path / "run")
    before = folder.summary.read_text()
    _, report = toy.train(made, tmp_path / "run")
    assert report.rows == []
    assert "already done" in report.notes[0]
    assert folder.summary.read_text() == before


def test_resume_never_starts_a_new_run_beside(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, steps=2, checkpoints={})
    toy.train(made, tmp_path / "run")
    folder, _ = toy.train(made, tmp_path / "run", resume="never")
    assert folder.path == tmp_path / "run-2"


def test_a_folder_of_another_recipe_is_refused_and_says_what_differs(text: Path, cache: Path, tmp_path: Path) -> None:
    toy.train(toy.recipe(text, cache, steps=2, checkpoints={}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"optimizer\.lr: now 0\.5, there 0\.01"):
        toy.train(
            toy.recipe(text, cache, steps=2, checkpoints={}, optimizer={"use": "adamw", "lr": 0.5}), tmp_path / "run"
        )


def test_cadences_may_change_when_a_run_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    whole, _ = toy.train(toy.recipe(text, cache), tmp_path / "whole")
    toy.stopped(toy.recipe(text, cache), tmp_path / "run", 5)
    folder, _ = toy.train(
        toy.recipe(text, cache, checkpoints={"every": 2}, samples={"prompts": ["x"]}), tmp_path / "run"
    )
    assert toy.learned(folder) == toy.learned(whole)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache)
    whole, _ = toy.train(made, tmp_path / "whole")
    toy.stopped(made, tmp_path / "run", 10)
    newest = tmp_path / "run" / "checkpoints" / "step-00000010"
    data = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        toy.train(made, tmp_path / "run")
    earlier = newest.with_name("step-00000008")
    assert str(earlier) in str(caught.value)
    folder, _ = toy.train(made, tmp_path / "run", resume=str(earlier))
    assert toy.learned(folder) == toy.learned(whole)


def test_a_checkpoint_of_another_model_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    toy.train(toy.recipe(text, cache), tmp_path / "small")
    model = {"use": "decoder", "n_layers": 3, "hidden_size": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}
    with pytest.raises(CheckpointError, match="another model"):
        toy.train(
            toy.recipe(text, cache, model=model),
            tmp_path / "large",
            resume=str(tmp_path / "small/checkpoints/step-00000012"),
        )


def test_a_checkpoint_that_is_not_there_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint folder"):
        toy.train(toy.recipe(text, cache), tmp_path / "run", resume=str(tmp_path / "nothing"))


def test_changed_documents_refuse_to_go_on_and_are_named(cache: Path, tmp_path: Path) -> None:
    text = toy.corpus(tmp_path / "text")
    made = toy.recipe(text, cache)
    toy.stopped(made, tmp_path / "run", 5)
    (text / "003.txt").write_text("something else\nentirely, and longer than before")
    with pytest.raises(DataError, match=r"003\.txt"):
        toy.train(made, tmp_path / "run")


def test_a_vocabulary_that_contradicts_the_tokenizer_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    model = {"use": "decoder", "n_layers": 1, "hidden_size": 32, "n_heads": 2, "ffn_size": 48}
    with pytest.raises(RecipeError, match="the tokenizer has 257 tokens"):
        toy.train(toy.recipe(text, cache, model={**model, "vocab_size": 300}), tmp_path / "run")
    folder, _ = toy.train(
        toy.recipe(text, cache, steps=2, checkpoints={}, model={**model, "vocab_size": 320}), tmp_path / "run"
    )
    assert weights(folder)["embed.weight"].shape[0] == 320


def test_early_stop_ends_the_run_and_says_why(text: Path, cache: Path, tmp_path: Path) -> None:
    watchers = [{"use": "early-stop", "patience": 2, "least": 10.0}]
    folder, _ = toy.train(toy.recipe(text, cache, watchers=watchers, validation={"every": 2}), tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    assert summary["steps"] == 6
    assert "2 validations" in summary["stopped"]


def test_bf16_learns_and_keeps_float32_weights(text: Path, cache: Path, tmp_path: Path) -> None:
    folder, _ = toy.train(toy.recipe(text, cache, precision="bf16"), tmp_path / "run")
    losses = [row["loss"] for row in rows(folder.metrics) if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert {str(t.dtype) for t in weights(folder).values()} == {"torch.float32"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own, by the dozen
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_give_the_same_losses(text: Path, cache: Path, tmp_path: Path) -> None:
    eager, _ = toy.train(toy.recipe(text, cache, steps=4, checkpoints={}), tmp_path / "a")
    made = toy.recipe(text, cache, steps=4, checkpoints={}, compile=True, samples={"prompts": ["li"], "tokens": 3})
    compiled, _ = toy.train(made, tmp_path / "b")
    a, b = ([row["loss"] for row in rows(folder.metrics) if "loss" in row] for folder in (eager, compiled))
    assert b == pytest.approx(a, abs=1e-4)


OFFLOAD = {"use": "offload", "least_bytes": 0}


class AtOnce(Executor):
    """No threads: what is handed over is done before anything else. So no figure depends on how fast a disk is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Any, /, *words: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*words, **named))
        return done


@pytest.mark.parametrize(
    "saved",
    [
        {"use": "recompute"},
        {**OFFLOAD, "to": "disk"},
        {**OFFLOAD, "to": "host", "last": 0, "ahead": False},
        {**OFFLOAD, "to": "disk", "last": 0, "around": "recompute"},
    ],
    ids=["recompute", "disk", "host", "recompute-disk"],
)
@pytest.mark.parametrize("micro", [4, 1])
def test_what_is_saved_where_does_not_change_what_is_learned(
    saved: dict[str, Any], micro: int, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))
    keep, _ = toy.train(toy.recipe(text, cache, micro_batch_size=micro), tmp_path / "a")
    other, _ = toy.train(toy.recipe(text, cache, micro_batch_size=micro, saved=saved), tmp_path / "b")
    assert toy.learned(keep) == toy.learned(other)
    assert not list((tmp_path / "home").rglob("saved-*"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offload")]
    if saved["use"] == "offload":
        moved = [row["offload/stored"] + row["offload/forwarded"] for row in rows(other.metrics) if "loss" in row]
        assert all(moved)
        monkeypatch.setattr(offload, "ThreadPoolExecutor", AtOnce)
        other, _ = toy.train(toy.recipe(text, cache, micro_batch_size=micro, saved=saved), tmp_path / "c")
        assert toy.learned(keep) == toy.learned(other)
    peaks = [[row["saved_bytes"] for row in rows(folder.metrics) if "saved_bytes" in row] for folder in (keep, other)]
    assert max(peaks[1]) < max(peaks[0])


@pytest.mark.parametrize("saved", ["recompute", "offload", {"use": "ssdtrain", "around": "recompute"}])
def test_a_run_goes_on_under_another_exact_policy(saved: Any, text: Path, cache: Path, tmp_path: Path) -> None:
    whole, _ = toy.train(toy.recipe(text, cache), tmp_path / "whole")
    toy.stopped(toy.recipe(text, cache), tmp_path / "run", 5)
    folder, _ = toy.train(toy.recipe(text, cache, saved=saved), tmp_path / "run")
    assert toy.learned(folder) == toy.learned(whole)


def test_a_run_does_not_go_on_under_a_policy_that_rounds(text: Path, cache: Path, tmp_path: Path) -> None:
    toy.stopped(toy.recipe(text, cache), tmp_path / "run", 5)
    for saved in ("coat", {"use": "offload", "around": "coat"}):
        with pytest.raises(UsageError, match=r"saved\.use: now '\w+', there 'keep'"):
            toy.train(toy.recipe(text, cache, saved=saved), tmp_path / "run")


def test_a_loss_that_explodes_stops_the_run_and_keeps_its_checkpoint(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = save.write

    def slowly(*words: Any, **named: Any) -> None:  # as on a busy disk: the loss explodes meanwhile
        time.sleep(0.5)
        written(*words, **named)

    monkeypatch.setattr(save, "write", slowly)
    made = toy.recipe(
        text, cache, optimizer={"use": "sgd", "lr": 1e18}, gradient=[], schedule="constant", checkpoints={"every": 1}
    )
    with pytest.raises(LmworksError, match="not made"):
        toy.train(made, tmp_path / "run")
    assert complete(tmp_path / "run" / "checkpoints")
    assert list(rows(tmp_path / "run" / "metrics.jsonl")), "the rows before the explosion are on disk"


def test_a_folder_that_cannot_be_written_says_so(text: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LmworksError, match="cannot write the run folder"):
        toy.train(toy.recipe(text, cache), tmp_path / "file" / "run")
