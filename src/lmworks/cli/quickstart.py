"""lmworks quickstart: the first ten minutes, shown and proved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lmworks.cli.console import answer, clock, count, say, table

RECIPE = "quickstart"
VALIDATION = {"validation_loss": "val_loss", "validation_bits_per_byte": "val_bits_per_byte"}
"""What the answer calls a figure of summary.json, where documents are held out."""


def quickstart(
    run: Annotated[Path, typer.Option("--run", help="The run folder; must not hold a run yet.")] = Path(
        "runs/quickstart"
    ),
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting of the recipe.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Delete an earlier quickstart run in that folder first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Train a small model on text that is on every machine, kill it, resume it, sample, export, prove the export.

    Example: lmworks quickstart --run runs/first
    """
    begun = time.monotonic()
    folder = _free(run, again=again)
    sets = [word for item in set_ or [] for word in ("--set", item)]
    command = [sys.executable, "-m", "lmworks", "train", RECIPE, "--run", str(folder.path), *sets]
    steps = _plan(set_ or [])
    say("\n1. Train. Half-way this process will be killed without warning (SIGKILL).")
    seen = _train_until_killed(command, folder, after=steps // 2)
    say(f"\n2. Killed at step {seen.step}, newest checkpoint of step {seen.checkpoint}. The same command goes on.")
    _resume(command, folder)
    same = seen.compare(folder)
    say(f"   {same} steps ran twice, before the kill and after the resume: their losses are equal to the last bit.")
    say("\n3. Sample.")
    say(_sample(folder))
    say("\n4. Export to a Hugging Face folder, reload it in a fresh process, compare the logits.")
    proof = _export(folder)
    found = _result(folder, seen=seen, same=same, proof=proof, seconds=time.monotonic() - begun)
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items()]
    answer(found, as_json=as_json, text="\n" + table(rows, header=["", "result"]) + f"\n\n{folder.path}")


def _free(run: Path, *, again: bool) -> Any:
    from lmworks.core.errors import UsageError
    from lmworks.core.run import RunFolder

    folder = RunFolder(run)
    if folder.exists() and again:
        shutil.rmtree(run)
    if run.exists() and any(run.iterdir()):
        raise UsageError(
            "is not empty", where=str(run), next_step="--again deletes it first, --run DIR takes another folder"
        )
    return folder


def _plan(sets: list[str]) -> int:
    """Tell what is about to be trained; returns its number of steps."""
    from lmworks.core import recipe as recipes

    recipe = recipes.load(RECIPE, verb="train", sets=sets)
    rows, length = recipe.batch_size, recipe.data.sequence_length
    tokens = count(recipe.steps * rows * length)
    say(f"Plan: {recipe.steps} steps of {rows} x {length} tokens = {tokens} tokens")
    readers = ", ".join(reader.label for reader in recipe.data.readers)
    say(f"      of the text of {readers}; the tokenizer is trained on the same text.")
    return int(recipe.steps)


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What the first attempt had written when it was killed."""

    step: int
    checkpoint: int
    rows: dict[int, tuple[float, float]]
    """Loss and gradient norm by step."""

    def compare(self, folder: Any) -> int:
        """How many steps after the checkpoint are the same in both attempts. Raises LmworksError when one differs."""
        from lmworks.core.errors import LmworksError

        now = _rows(folder)
        twice = [step for step in self.rows if step > self.checkpoint]
        for step in twice:
            if now[step] != self.rows[step]:
                raise LmworksError(
                    f"step {step} has loss {now[step][0]!r} after the resume, {self.rows[step][0]!r} before the kill",
                    where=str(folder.path),
                    next_step="this should never happen: please report it with the run folder's record.json",
                )
        return len(twice)


def _rows(folder: Any) -> dict[int, tuple[float, float]]:
    from lmworks.core.journal import rows

    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(folder.metrics) if "loss" in row}


def _train_until_killed(command: list[str], folder: Any, *, after: int) -> Killed:
    """Start the training, let it get some steps past a checkpoint that is not before step `after`, kill it."""
    from lmworks.core.errors import LmworksError
    from lmworks.model.checkpoint import complete, step_of

    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while child.poll() is None:
            time.sleep(0.1)
            saved = [path for path in complete(folder.checkpoints) if step_of(path) >= after]
            found = _rows(folder) if saved else {}
            if saved and max(found, default=0) >= step_of(saved[-1]) + 5:
                break
        else:
            if child.returncode == 0:
                step = "more steps, or more frequent checkpoints: --set checkpoints.every=N"
                raise LmworksError(
                    "the training ended before it could be killed", where=str(folder.path), next_step=step
                )
            raise LmworksError(
                f"the training failed with exit code {child.returncode}, see above", where=str(folder.path)
            )
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    found = _rows(folder)
    return Killed(step=max(found), checkpoint=step_of(complete(folder.checkpoints)[-1]), rows=found)


def _resume(command: list[str], folder: Any) -> None:
    from lmworks.core.errors import LmworksError

    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code != 0:
        raise LmworksError(
            f"the training failed with exit code {code} after the kill, see above", where=str(folder.path)
        )


def _sample(folder: Any) -> str:
    from lmworks.core.journal import rows

    found = list(rows(folder.samples))
    return f"{found[-1]['prompt']}{found[-1]['text']}" if found else "   no texts: samples.prompts is empty"


def _export(folder: Any) -> dict[str, Any]:
    from lmworks.serve.export import export_model

    target = folder.path / "export"
    proof: dict[str, Any] = export_model(folder.path, target)
    return proof


def _result(folder: Any, *, seen: Killed, same: int, proof: dict[str, Any], seconds: float) -> dict[str, Any]:
    import json

    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    return {
        "parameters": count(summary["parameters"]),
        "tokens_seen": count(summary["tokens"]),
        **{name: round(summary[key], 4) for name, key in VALIDATION.items() if key in summary},
        "tokens_per_second": round(summary["tokens_per_second"]),
        "peak_memory_GiB": round(summary["peak_memory_bytes"] / 2**30, 2),
        "killed_at_step": seen.step,
        "steps_run_twice_bitwise_equal": same,
        "export_largest_logit_difference": proof["max_difference"],
        "export": str(folder.path / "export"),
        "minutes": clock(seconds),
        "look_at": str(folder.curves),
    }
