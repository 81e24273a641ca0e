"""Every command and every recipe of README, CONTRIBUTING and docs is run, decoded, or checked for what it names.

| what stands in a bash block | what is done with it |
| --- | --- |
| lmworks train | run as it stands, on a tiny model; decoded (--check) where it compiles |
| lmworks compare | run with one seed, on a tiny model |
| lmworks prove | the proof and its arms are decoded (--check) |
| lmworks mix | the recipe is decoded (--check); with --fit, which needs tables of runs, the options exist |
| lmworks quickstart, launch, guard, drill, probe, fetch, chat | verb and options exist (minutes, ranks, people) |
| lmworks board | run with --json, otherwise verb and options exist (a server) |
| any other lmworks command | run, in a folder that holds a tiny run at runs/quickstart |
| make | the targets and variables exist |
| pip install | the extras exist |
| other programs | stand in OTHERS with a reason |

A toml block that is a recipe is decoded; any other is laid over the shipped quickstart recipe and decoded.
A python block is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmworks.core import recipe
from tests.docs.blocks import ROOT, Block, Command, blocks, commands

HOW = {
    "train": "train",
    "compare": "compare",
    "prove": "prove",
    "mix": "mix",
    "quickstart": "parse",
    "fetch": "parse",
    "launch": "parse",
    "guard": "parse",
    "drill": "parse",
    "probe": "parse",
    "chat": "parse",
    "board": "parse",
}
OTHERS = {
    "python3": "makes an environment",
    "tensorboard": "a server",
    "lm_eval": "needs the extra eval",
    ".ci/run": "calls this test",
    "sbatch": "needs Slurm",
}
TINY = {
    "steps": 4,
    "batch_size": 2,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "model.n_layers": 1,
    "model.hidden_size": 32,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.ffn_size": 64,
    "data.sequence_length": 64,
    "data.validation": 0.2,
    "data.tokenizer.use": "bytes",
    "data.readers": '[{use="text", paths=["notes/**/*.txt"], split="block"}]',
    "schedule.warmup": 1,
    "validation.every": 2,
    "validation.rows": 4,
    "samples.every": 2,
    "samples.tokens": 8,
    "checkpoints.every": 2,
    "sinks": "[]",
}
ALL = commands()
OURS = [command for command in ALL if command.program == "lmworks"]


TINY_SETS = [word for path, value in TINY.items() for word in ("--set", f"{path}={value}")]


def _job(command: Command, cwd: Path) -> dict[str, object]:
    argv = list(command.words[1:])
    how = "run" if argv[0] == "board" and "--json" in argv else HOW.get(argv[0], "run")
    if how == "train":
        verb, name, *rest = argv
        small = [] if "--check" in rest else TINY_SETS  # before the command's own settings, which win
        minutes = ["--check"] if "compile=true" in rest else []
        return {"cwd": str(cwd), "argv": [verb, name, *small, *rest, *minutes], "how": "run"}
    if how == "compare":
        return {"cwd": str(cwd), "argv": [*argv, *TINY_SETS, "--seeds", "1"], "how": "run"}
    if how == "prove":
        return {"cwd": str(cwd), "argv": [*argv, *([] if "--check" in argv else ["--check"])], "how": "run"}
    if how == "mix":
        given = "--fit" in argv
        return {"cwd": str(cwd), "argv": argv if given else [*argv, "--check"], "how": "parse" if given else "run"}
    return {"cwd": str(cwd), "argv": argv, "how": how}


def last_checkpoints() -> list[str]:
    """Names of the checkpoints that the shipped quickstart leaves: the docs may speak of these."""
    shipped = recipe.load("quickstart", verb="train")
    every, keep = shipped.checkpoints.every, shipped.checkpoints.keep
    return [f"step-{shipped.steps - i * every:08d}" for i in range(keep)]


def _drive(jobs: list[dict[str, object]], folder: Path) -> list[dict[str, object]]:
    asked, answered = folder / "jobs.json", folder / "results.json"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.docs.drive", str(asked), str(answered)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, timeout=600, cwd=ROOT, env=environment)
    return json.loads(answered.read_text())


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, lmworks_home: Path) -> dict[Command, dict[str, object]]:
    """What every lmworks command of the docs answers. Each page has a folder of its own, commands run in order."""
    base = tmp_path_factory.mktemp("docs")
    home = base / "template"
    (home / "notes" / "2026").mkdir(parents=True)
    for month in ("water", *range(1, 13)):
        notes = (f"Note {i}: water boils at {i} degrees on the planet of {month} moons." for i in range(8))
        (home / "notes" / "2026" / f"{month}.txt").write_text("\n\n".join(notes))
    (home / "notes" / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of many"}) + "\n" for i in range(40))
    )
    shutil.copy(ROOT / "README.md", home / "README.md")
    (home / "higher-rate.toml").write_text('base = "train/quickstart"\noptimizer = { use = "adamw", lr = 6e-3 }\n')
    training = {"cwd": str(home), "argv": ["train", "quickstart", *TINY_SETS], "how": "run"}
    (made,) = _drive([training], base)
    assert made["code"] == 0, made["err"]
    checkpoints = home / "runs" / "quickstart" / "checkpoints"
    for name in last_checkpoints():
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    folders = {}
    for number, page in enumerate(dict.fromkeys(command.page for command in OURS)):
        folders[page] = shutil.copytree(home, base / f"page{number}")
    results = _drive([_job(command, folders[command.page]) for command in OURS], base)
    return dict(zip(OURS, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", OURS, ids=str)
def test_lmworks_command(command: Command, answers: dict[Command, dict[str, object]]) -> None:
    found = answers[command]
    assert found["code"] == command.code, f"{found['err']}\n{found['out']}"
    assert "Traceback" not in str(found["err"])


@pytest.mark.parametrize("command", [c for c in ALL if c.program == "make"], ids=str)
def test_make_targets_and_variables_exist(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name}\s*\?=" if equals else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), (
            f"Makefile has no {'variable' if equals else 'target'} {name}"
        )


@pytest.mark.parametrize("command", [c for c in ALL if c.program == "pip"], ids=str)
def test_pip_extras_exist(command: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in command.words:
        match = re.fullmatch(r"(?:lmworks|\.)\[(.*)\]", word)
        for extra in match[1].split(",") if match else []:
            assert extra in project["optional-dependencies"]
        if word.startswith("torch"):
            assert word in project["dependencies"], "the range of torch is another one in pyproject.toml"


@pytest.mark.parametrize("command", [c for c in ALL if c.program not in ("lmworks", "make", "pip")], ids=str)
def test_other_programs_are_known(command: Command) -> None:
    assert command.program in OTHERS


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "toml"], ids=str)
def test_toml_decodes(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.body)
    if "do" not in table and "base" not in table:
        table = recipe.merge(recipe.read(recipe.find("quickstart", "train")), table)
        recipe.decode(table)
        return
    (tmp_path / "recipe.toml").write_text(block.body)
    recipe.load(tmp_path / "recipe.toml")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", block.body], check=True, timeout=120, cwd=tmp_path)


def test_blocks_name_their_language() -> None:
    known = {"bash", "toml", "python", "text", "json"}
    # benchmarks/ take hours and have an environment of their own: nothing there is run here
    ours = [block for block in blocks() if not block.page.startswith("benchmarks/")]
    assert [str(block) for block in ours if block.language not in known] == []


def test_the_readme_has_exactly_two_set_up_commands() -> None:
    targets = [command.words[1] for command in ALL if command.page == "README.md" and command.program == "make"]
    assert targets == ["demo", "test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text(), "CI calls the README's test command"
