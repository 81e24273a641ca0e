"""Run `lmworks quickstart` several times, keep every result as evidence, and write the README's table from it.

python benchmarks/quickstart.py --runs 3     measure, write benchmarks/evidence/quickstart.json, rewrite README.md
python benchmarks/quickstart.py --table      only rewrite the table from the evidence that is there
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmworks.core.run import code_version, hardware, versions

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "benchmarks" / "evidence" / "quickstart.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- evidence: benchmarks/evidence/quickstart.json -->\n", "<!-- end -->\n"

Run = dict[str, Any]


def measure(runs: int) -> dict[str, Any]:
    """The evidence: hardware, versions, commit, and the answer of every run."""
    command = [sys.executable, "-m", "lmworks", "quickstart", "--json"]
    results = []
    for number in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            print(f"run {number + 1} of {runs}", flush=True)
            done = subprocess.run(
                [*command, "--run", f"{folder}/quickstart"], check=True, stdout=subprocess.PIPE, text=True
            )
            results.append({k: v for k, v in json.loads(done.stdout).items() if k not in ("export", "look_at")})
    return {
        "what": "lmworks quickstart: train, get killed, resume, sample, export, prove the export",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/quickstart.py",
        "code": code_version(),
        "hardware": hardware(),
        "versions": versions(),
        "runs": results,
    }


def table(evidence: dict[str, Any]) -> str:
    """The README's table: medians over the runs, with the slowest and the fastest where they differ."""
    runs: list[Run] = evidence["runs"]
    first = runs[0]
    machine = evidence["hardware"]
    rows = {
        "model": f"{first['parameters']} parameters, {first['tokens_seen']} tokens seen",
        "validation loss": f"{first['validation_loss']} nats/token, {first['validation_bits_per_byte']} bits/byte",
        "speed": f"{_spread(runs, 'tokens_per_second')} tokens/s",
        "peak memory": f"{_spread(runs, 'peak_memory_GiB')} GiB",
        "killed and resumed": f"{first['steps_run_twice_bitwise_equal']} steps run twice, equal to the last bit",
        "export": f"largest difference of a logit after the reload: {first['export_largest_logit_difference']:.1e}",
        "time": f"{_clock(runs)} (minutes:seconds) after the installation",
    }
    lines = [
        "| `lmworks quickstart` | result |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    many = f"Median of {len(runs)} runs (lowest to highest)" if len(runs) > 1 else "One run"
    torch = evidence["versions"]["torch"]
    source = f"{many}, {evidence['date']}, {machine['processor']}, {machine['cores']} cores, torch {torch}."
    return "\n".join([*lines, "", f"*{source} [Evidence](benchmarks/evidence/quickstart.json)*", ""])


def _spread(runs: list[Run], key: str) -> str:
    values = [run[key] for run in runs]
    middle = statistics.median(values)
    if all(isinstance(value, int) for value in values):
        middle = round(middle)
    if len(set(values)) == 1:
        return f"{middle:,}"
    return f"{middle:,} ({min(values):,} to {max(values):,})"


def _clock(runs: list[Run]) -> str:
    clocks = sorted((run["minutes"] for run in runs), key=_seconds)
    return clocks[0] if clocks[0] == clocks[-1] else f"{clocks[0]} to {clocks[-1]}"


def _seconds(clock: str) -> int:
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total


def with_table(readme: str, evidence: dict[str, Any]) -> str:
    """The README's text with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(evidence)}{END}{after}"


def main() -> None:
    """Measure unless only the table is asked for, then rewrite the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        EVIDENCE.parent.mkdir(exist_ok=True)
        EVIDENCE.write_text(json.dumps(measure(options.runs), indent=2) + "\n")
    README.write_text(with_table(README.read_text(), json.loads(EVIDENCE.read_text())))


if __name__ == "__main__":
    main()
