"""Which faults can be where, and that each is planned so that it can happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.core.errors import UsageError
from lmworks.guard import faults
from lmworks.guard.faults import KINDS, LEGAL, PHASES, Fault, phase_of, planned


def fault(at: str, kind: str = "kill") -> Fault:
    return Fault(kind=kind, at=at, step=3, rank=1, mark="/m", run="/r")


def test_every_fault_has_its_phases_and_every_phase_a_fault() -> None:
    assert set(LEGAL) == set(KINDS)
    assert {phase for phases in LEGAL.values() for phase in phases} == set(PHASES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_phase_is_legal(kind: str) -> None:
    assert phase_of(kind, None) in LEGAL[kind]
    for phase in LEGAL[kind]:
        assert phase_of(kind, phase) == phase


def test_what_cannot_be_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match="did you mean 'hang'"):
        phase_of("hangs", None)
    with pytest.raises(UsageError, match="legal: save"):
        phase_of("diskfull", "update")


def test_a_fault_at_load_follows_a_kill() -> None:
    first, second = planned(fault("load", "hang"))
    assert (first.kind, first.at, second) == ("kill", "update", fault("load", "hang"))
    assert first.mark != second.mark
    assert planned(fault("save")) == [fault("save")]


def test_faults_come_back_from_their_file(tmp_path: Path) -> None:
    there = planned(fault("load"))
    faults.write(tmp_path / "f", there)
    assert faults.read(tmp_path / "f") == there
