"""A dated record of a benchmark: what ran where, every run, what follows."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "evidence"
PACKAGES = ("lmworks", "torch", "numpy", "transformers", "accelerate", "tokenizers", "safetensors", "torchao")
ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def head(name: str) -> dict[str, Any]:
    """Name, date, command, commit, hardware, versions and the thread settings of the environment."""
    now = datetime.now(UTC)
    return {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "code": code(),
        "hardware": hardware(),
        "versions": versions(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))},
    }


def code() -> dict[str, Any]:
    """The commit, and whether src/ or benchmarks/ differ from it; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "src", "benchmarks"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "uncommitted": [line for line in changed if "/evidence/" not in line]}


def hardware() -> dict[str, Any]:
    """Processor, its matrix and vector instructions, cores, memory, kernel; GPUs where torch sees any."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in lines}
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "instructions": [name for name in ISA if name in flags],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide numbers, as far as they are installed."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages, of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write the record under its date and name; never over another one."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = record["date"][:16].replace(":", "")
    mark = "-loaded" if record.get("loaded") else ""
    path = folder / f"{stamp}-{record['benchmark']}{mark}.json"
    number = 2
    while path.exists():
        path = folder / f"{stamp}-{record['benchmark']}{mark}-{number}.json"
        number += 1
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
