"""tools/limits.py refuses what it should, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.limits import look, main

SHORT = "def short() -> None:\n    return None\n"


def _function(lines: int) -> str:
    return "def long() -> None:\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(("lines", "found", "fails"), [(60, 0, 0), (61, 1, 0), (100, 1, 0), (101, 1, 1)])
def test_functions_are_measured_from_def_to_their_last_line(tmp_path: Path, lines: int, found: int, fails: int) -> None:
    path = tmp_path / "part.py"
    path.write_text(_function(lines))
    findings = list(look(path))
    assert len(findings) == found
    assert sum(finding.fails for finding in findings) == fails


@pytest.mark.parametrize(("lines", "found", "fails"), [(400, 0, 0), (401, 1, 0), (600, 1, 0), (601, 1, 1)])
def test_files_are_measured(tmp_path: Path, lines: int, found: int, fails: int) -> None:
    path = tmp_path / "part.py"
    path.write_text("x = 1\n" * lines)
    findings = list(look(path))
    assert len(findings) == found
    assert sum(finding.fails for finding in findings) == fails


@pytest.mark.parametrize("name", ["utils.py", "helpers/part.py", "common.py", "misc.py"])
def test_names_that_say_nothing_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(SHORT)
    assert [finding.fails for finding in look(path)] == [True]


def test_the_report_names_the_place_and_the_exit_code_says_whether_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(SHORT)
    assert main([str(tmp_path)]) == 0
    (tmp_path / "bad.py").write_text(SHORT + _function(120))
    assert main([str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert f"FAIL  {tmp_path / 'bad.py'}:3: long has 120 lines" in report
