"""Near-duplicate removal: documents/s and peak memory of lmworks beside rensa's and datasketch's indices in memory.

python benchmarks/dedup.py --documents 10000 100000

Every arm reads the same files of JSON lines, makes 13-grams of the plain characters and 128 permutations, and says how
many documents it keeps. lmworks and datasketch have 9 bands of 13 rows, rensa 8 of 16, its nearest. Each run is a
process of its own with one thread; arms take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import evidence_file

SHARD = 20_000
"""Documents of one file."""
RECENT = 20_000
"""How far back a copy's original may lie."""
SLOW = 20_000
"""Documents above which datasketch is left out: it takes milliseconds for each."""


# --- documents


def documents(count: int, seed: int) -> Iterator[str]:
    """Texts of blocks of the standard library's sources and texts; 10 % are exact copies, 20 % copies with edits."""
    from lmworks.data.read import PythonStdlib
    from lmworks.data.record import Record
    from lmworks.data.stage import text_of

    reader = PythonStdlib(split="block", tests=True)
    blocks = [text_of(item) for item in reader.read() if isinstance(item, Record)]
    blocks = [block for block in blocks if 80 <= len(block) <= 1500]
    rng = np.random.default_rng(seed)
    recent: list[str] = []
    for number in range(count):
        kind = rng.random()
        if recent and kind < 0.3:
            text = recent[int(rng.integers(len(recent)))]
            text = text if kind < 0.1 else _edited(text, rng)
        else:
            chosen = rng.choice(len(blocks), size=int(rng.integers(2, 7)))
            text = "\n\n".join(blocks[i] for i in chosen)
        if len(recent) < RECENT:
            recent.append(text)
        else:
            recent[number % RECENT] = text
        yield text


def _edited(text: str, rng: np.random.Generator) -> str:
    """A few words replaced by numbers."""
    words = text.split(" ")
    for place in rng.integers(len(words), size=int(rng.integers(1, 4))):
        words[place] = str(int(rng.integers(10_000)))
    return " ".join(words)


def write_documents(count: int, folder: Path, seed: int) -> int:
    """Write the documents as JSON lines; their UTF-8 bytes."""
    size, out = 0, None
    for number, text in enumerate(documents(count, seed)):
        if number % SHARD == 0:
            out = _next(out, folder / f"{number // SHARD:05d}.jsonl")
        assert out is not None, "opened at the first document"
        out.write(json.dumps({"id": f"{number:09d}", "text": text, "source": "made"}) + "\n")
        size += len(text.encode())
    _next(out, None)
    return size


def _next(out: Any, path: Path | None) -> Any:
    if out is not None:
        out.close()
    return path.open("w", encoding="utf-8") if path is not None else None


# --- arms


def lmworks(files: list[Path]) -> int:
    """The stage as it is: keys of every shard on disk, then band by band."""
    from lmworks.data.dedup import Dedup
    from lmworks.data.stage import Context, Surveyed
    from lmworks.data.units import read_records

    stage = Dedup()
    with tempfile.TemporaryDirectory() as folder:
        surveys = []
        for number, file in enumerate(files):
            place = Path(folder) / str(number)
            place.mkdir()
            stage.survey(read_records(file), place, Context(seed=0))
            surveys.append(Surveyed(folder=place, records=file))
        verdict = Path(folder) / "verdict"
        verdict.mkdir()
        stage.settle(surveys, [], verdict, Context(seed=0))
        told = stage.findings(verdict)["documents"]
    return int(told["compared"] - told["removed"])


def rensa_hashed(files: list[Path]) -> int:
    """rensa's matrices and its index in memory, on lmworks' hashes of n-grams: the most that it can do."""
    import rensa

    from lmworks.data.keys import MinHash, batches_of
    from lmworks.data.stage import text_of
    from lmworks.data.units import read_records

    key = MinHash()
    index = rensa.RMinHashLSH(threshold=0.8, num_perm=128, num_bands=8)
    kept = total = 0
    for file in files:
        for batch in batches_of([text_of(record) for record in read_records(file)]):
            hashes, starts = key.hashed(batch)
            matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.astype(np.uint64), 128, 0)
            flags = index.insert_matrix_and_query_duplicate_flags(matrix, total)
            kept += len(flags) - sum(flags)
            total += len(batch)
    return kept


def rensa_tokens(files: list[Path]) -> int:
    """rensa as its page shows it: a deduplicator that is given the n-grams as strings."""
    import rensa

    from lmworks.data.shingles import plain
    from lmworks.data.stage import text_of
    from lmworks.data.units import read_records

    index = rensa.RMinHashDeduplicator(threshold=0.8, num_perm=128, use_lsh=True)

    def pairs() -> Iterator[tuple[str, list[str]]]:
        for file in files:
            for record in read_records(file):
                text = plain(text_of(record))
                yield record.id, [text[i : i + 13] for i in range(len(text) - 12)]

    return int(sum(index.add_pairs(pairs())))


def datasketch(files: list[Path]) -> int:
    """datasketch's LSH, asked for each document before it is added."""
    from datasketch import MinHash, MinHashLSH

    from lmworks.data.shingles import plain
    from lmworks.data.stage import text_of
    from lmworks.data.units import read_records

    index = MinHashLSH(num_perm=128, params=(9, 13))
    kept = 0
    for file in files:
        for record in read_records(file):
            text = plain(text_of(record)).encode()
            sketch = MinHash(num_perm=128)
            sketch.update_batch({text[i : i + 13] for i in range(len(text) - 12)})
            kept += not index.query(sketch)
            index.insert(record.id, sketch)
    return kept


ARMS: dict[str, Callable[[list[Path]], int]] = {
    "lmworks": lmworks,
    "rensa-hashed": rensa_hashed,
    "rensa-tokens": rensa_tokens,
    "datasketch": datasketch,
}


def run_arm(name: str, folder: Path) -> dict[str, Any]:
    """Run one arm in this process."""
    files = sorted(folder.glob("*.jsonl"))
    __import__({"lmworks": "rensa", "rensa-hashed": "rensa", "rensa-tokens": "rensa"}.get(name, name))
    before = _peak()
    begun, cpu = time.perf_counter(), time.process_time()
    kept = ARMS[name](files)
    seconds = time.perf_counter() - begun
    spent = time.process_time() - cpu
    return {
        "arm": name,
        "kept": kept,
        "seconds": seconds,
        "cpu_seconds": spent,
        "peak_bytes": _peak(),
        "before": before,
    }


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --- measuring


def measure(count: int, arms: list[str], rounds: int, folder: Path, seed: int) -> dict[str, Any]:
    """All rounds at one number of documents."""
    place = folder / str(count)
    place.mkdir()
    size = write_documents(count, place, seed)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms if name != "datasketch" or count <= SLOW}
    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for _ in range(rounds):
        for name in runs:
            command = [sys.executable, __file__, "--arm", name, "--folder", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **one})
            runs[name].append({**json.loads(done.stdout.splitlines()[-1]), "load_average": os.getloadavg()[0]})
    for file in place.iterdir():
        file.unlink()
    return {
        "documents": count,
        "text_bytes": size,
        "runs": runs,
        "median": {n: _median(r, count) for n, r in runs.items()},
    }


def _median(runs: list[dict[str, Any]], count: int) -> dict[str, float]:
    return {
        "documents_per_second": round(statistics.median(count / run["seconds"] for run in runs), 1),
        "documents_per_cpu_second": round(statistics.median(count / run["cpu_seconds"] for run in runs), 1),
        "peak_mb": round(statistics.median(run["peak_bytes"] for run in runs) / 1e6, 1),
        "grown_mb": round(statistics.median(run["peak_bytes"] - run["before"] for run in runs) / 1e6, 1),
        "kept": runs[0]["kept"],
    }


def main() -> None:
    """Measure, print a table, keep everything as evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where documents are written; they need 2.5 GB a million.")
    parser.add_argument("--no-evidence", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.folder)))
        return
    record = evidence_file.head("dedup")
    record["versions"] |= evidence_file.versions_of(("rensa", "datasketch", "pyarrow"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        record["sizes"] = [
            measure(count, options.arms, options.rounds, Path(folder), options.seed) for count in options.documents
        ]
    record["loaded"] = (
        max(r["load_average"] for s in record["sizes"] for runs in s["runs"].values() for r in runs) > 1.5
    )
    for size in record["sizes"]:
        print(f"{size['documents']:,} documents, {size['text_bytes'] / 1e6:,.0f} MB")
        for name, found in size["median"].items():
            print(f"  {name:13} {'  '.join(f'{key} {value:,}' for key, value in found.items())}")
    if not options.no_evidence:
        print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
