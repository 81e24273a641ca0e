"""Jobs: results kept once, failures told with their log, the same process under every executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmworks.core.errors import LmworksError, UsageError
from lmworks.core.recipe import decode_part
from lmworks.jobs.executor import Executor
from lmworks.jobs.job import Job, JobFolder
from lmworks.jobs.local import Local
from lmworks.jobs.slurm import Slurm

T = list[tuple[str, str]]


def stem(name: str, word: str) -> Job:
    """A job that answers with a JSON value: the nearest-name hint of a word."""
    return Job(name=name, call="core.errors:did_you_mean", arguments={"name": word, "known": ["sophia", "lion"]})


def run(executor: Executor, folder: JobFolder, jobs: list[Job]) -> T:
    told: T = []
    folder.add(jobs)
    executor.run(folder, [job.name for job in jobs], lambda name, event: told.append((name, event)))
    return told


def test_jobs_answer_and_are_not_run_again(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs")
    jobs = [stem("a", "sofia"), stem("b", "lyon"), stem("c", "zzz")]
    told = run(Local(processes=2), folder, jobs)
    assert [event for _, event in told].count("started") == 3
    assert "sophia" in folder.result("a")
    assert "lion" in folder.result("b")
    assert run(Local(), folder, jobs) == []


def test_a_changed_call_is_run_again(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs")
    run(Local(), folder, [stem("a", "sofia")])
    assert len(run(Local(), folder, [stem("a", "lyon")])) == 2
    assert "lion" in folder.result("a")


def test_the_first_failure_is_told_with_its_log_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs")
    bad = Job(name="bad", call="core.catalogue:shelf", arguments={"name": "optimiser"})
    with pytest.raises(LmworksError, match=r"(?s)job 'bad' failed.*did you mean 'optimizer'") as caught:
        run(Local(processes=1), folder, [stem("good", "sofia"), bad, stem("never", "lyon")])
    assert "goes on" in str(caught.value)
    assert folder.is_done("good")
    assert not folder.is_done("never")


def test_a_bug_in_a_job_leaves_its_trace_in_the_log(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs")
    with pytest.raises(LmworksError, match="TypeError"):
        run(Local(), folder, [Job(name="bug", call="core.errors:did_you_mean", arguments={"nonsense": 1})])


def test_names_are_unique_file_names(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    for names in (["a", "a"], ["a/b"], [".a"]):
        with pytest.raises(UsageError, match="cannot be the name"):
            folder.add([stem(name, "x") for name in names])


PARENT = """
import sys
from pathlib import Path
from lmworks.jobs.job import Job, JobFolder
from lmworks.jobs.local import Local
folder = JobFolder(Path(sys.argv[1]))
folder.add([Job(name="long", call="core.need:need", arguments={"module": "antigravity_that_waits", "extra": "x"})])
Local(processes=1).run(folder, ["long"], lambda *told: print(*told, flush=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "antigravity_that_waits.py").write_text("import time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "jobs")], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"long started\n"
    child = _child_of(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def _child_of(pid: int) -> int:
    for _ in range(100):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("the parent has no child")


SBATCH = """#!{python}
# A stand-in for Slurm's sbatch: reads --array from the script and runs its tasks one after the other.
import os, re, subprocess, sys
assert sys.argv[1] == "--wait"
text = open(sys.argv[2]).read()
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", text).groups())
for task in range(first, last + 1):
    subprocess.run(["bash", sys.argv[2]], env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}})
"""


def test_slurm_runs_every_task_of_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(SBATCH.format(python=sys.executable))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    folder = JobFolder(tmp_path / "with space")
    executor = decode_part("executor", {"use": "slurm", "partition": "long", "options": ["--account=physics"]})
    run(executor, folder, [stem("a", "sofia"), stem("b", "lyon")])
    assert "sophia" in folder.result("a")
    assert "lion" in folder.result("b")
    script = (folder.path / "array.sbatch").read_text()
    for line in ("--array=0-1", "--partition=long", "--account=physics", "--time=01:00:00"):
        assert f"#SBATCH {line}" in script


def test_slurm_says_when_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no `sbatch`"):
        run(Slurm(), JobFolder(tmp_path / "jobs"), [stem("a", "x")])


@pytest.mark.slow
def test_ray_runs_the_same_jobs(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    folder = JobFolder(tmp_path / "jobs")
    run(decode_part("executor", {"use": "ray"}), folder, [stem("a", "sofia"), stem("b", "lyon")])
    assert "sophia" in folder.result("a")


def test_a_result_is_plain_json(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs")
    run(Local(), folder, [stem("a", "sofia")])
    found = json.loads((folder.path / "a.result.json").read_text())
    assert set(found) == {"key", "value"}
