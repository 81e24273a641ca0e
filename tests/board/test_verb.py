"""`lmworks board` from the command line: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lmworks.board import serve
from lmworks.board.guard import Guard
from lmworks.core.errors import UsageError

pytestmark = pytest.mark.slow


def lmworks(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    command = [sys.executable, "-m", "lmworks", "board", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_the_list_as_json(runs: Path) -> None:
    done = lmworks("--json", cwd=runs.parent)
    assert done.returncode == 0, done.stderr
    assert {run["name"]: run["status"] for run in json.loads(done.stdout)} == {"plain": "done", "killed": "dead"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = lmworks("nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing: there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_evidence_that_is_none_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "mine" / "sophia").mkdir(parents=True)
    (tmp_path / "mine" / "sophia" / "2026-01-01.json").write_text('{"findings": 3}')
    done = lmworks("--evidence", "mine", "--port", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "evidence cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_answers_until_it_is_interrupted(runs: Path) -> None:
    command = [sys.executable, "-m", "lmworks", "board", str(runs), "--port", "0", "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    port, token = address.split(":")[2].partition("/")[0], address.partition("token=")[2]
    try:
        here = f"http://127.0.0.1:{port}/api/runs"
        asked = urllib.request.Request(here, headers={"authorization": f"Bearer {token}"})
        assert len(json.load(urllib.request.urlopen(asked, timeout=20))["runs"]) == 2
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(here, timeout=20)
        refused.value.close()
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "the board is closed" in err
    assert token not in out + err, "the token is printed once"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1, port {port}"):
            serve.bound("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.7"):
        serve.bound("203.0.113.7", 0)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/"),
        ("::1", "http://[::1]:80/"),
        ("0.0.0.0", f"http://{socket.gethostname()}:80/"),
    ],
)
def test_the_address_that_is_printed(host: str, shown: str) -> None:
    guard = Guard.of(host, 80)
    assert serve.address(guard, 80) == shown + (f"?token={guard.token}" if guard.token else "")
