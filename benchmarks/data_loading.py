"""Tokenising and row assembly: MB/s against the bare library call, milliseconds a row.

python benchmarks/data_loading.py --rounds 5     measure, write benchmarks/evidence/data_loading.json

Each round tokenises the standard library (its tests included) twice: with one `encode_batch_fast` call on texts that
lie in memory, and as `lmworks train` does it: read, hash, tokenise, write, fsync. CPU seconds stand beside wall
seconds, since they change less when the machine is busy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from lmworks.core.run import code_version, hardware, versions
from lmworks.data.fingerprint import scan
from lmworks.data.packed import Packed
from lmworks.data.read import PythonStdlib
from lmworks.data.record import Record, Text
from lmworks.data.shards import make_shards
from lmworks.data.tokenizer import Bpe

EVIDENCE = Path(__file__).parent / "evidence" / "data_loading.json"
READER = PythonStdlib(tests=True)


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of one call, all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def tokenising(rounds: int, folder: Path) -> dict[str, Any]:
    """Both ways in turn, every run kept."""
    cache = folder / "cache"
    prepared = Packed(readers=(READER,), sequence_length=512, tokenizer=Bpe(), cache=str(cache))
    tokenizer = prepared.make_tokenizer()
    tokenizer.save(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    records = [item for item in READER.read() if isinstance(item, Record)]
    texts = [part.text for record in records for part in record.content if isinstance(part, Text)]
    source = scan(READER, cache)
    runs = []
    for number in range(rounds):
        alone = timed(lambda: library.encode_batch_fast(texts, add_special_tokens=False))
        whole = timed(lambda n=number: make_shards(READER, source, tokenizer, folder / str(n)))  # type: ignore[misc]  # bound now
        runs.append({"library": alone, "lmworks": whole, "load_average": os.getloadavg()[0]})
    size = sum(len(text.encode()) for text in texts)
    return {"bytes": size, "documents": len(texts), "vocab_size": tokenizer.vocab_size, "runs": runs}


def drawing(rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds a row of 512 tokens, without a thread that prepares ahead; 200 draws of 16 rows a round."""
    part = Packed(readers=(READER,), sequence_length=512, tokenizer=Bpe(), cache=str(folder / "cache"))
    loader = part.prepare(seed=0).train(prefetch=0)
    loader.draw(16)
    runs = []
    for _ in range(rounds):
        taken = timed(lambda: [loader.draw(16) for _ in range(200)])
        runs.append({"milliseconds_a_row": 1000 * taken["seconds"] / 3200, **taken})
    return runs


def summary(tokens: dict[str, Any], draws: list[dict[str, Any]]) -> dict[str, float]:
    """Medians: MB/s of both ways, the ratio of each round, milliseconds a row."""
    size = tokens["bytes"] / 1e6
    found = {}
    for name in ("library", "lmworks"):
        found[f"{name}_MB_per_second"] = statistics.median(size / run[name]["seconds"] for run in tokens["runs"])
    for key in ("seconds", "cpu_seconds"):
        found[f"{key}_lmworks_over_library"] = statistics.median(
            run["lmworks"][key] / run["library"][key] for run in tokens["runs"]
        )
    found["milliseconds_a_row"] = statistics.median(run["milliseconds_a_row"] for run in draws)
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Measure, print the medians, keep everything as evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenising(options.rounds, Path(folder))
        draws = drawing(options.rounds, Path(folder))
    evidence = {
        "what": "tokenising the standard library, and assembling rows of 512 tokens",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python benchmarks/data_loading.py --rounds {options.rounds}",
        "code": code_version(),
        "hardware": hardware(),
        "versions": versions(),
        "median": summary(tokens, draws),
        "tokenising": tokens,
        "drawing": draws,
    }
    EVIDENCE.parent.mkdir(exist_ok=True)
    EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(evidence["median"], indent=1))


if __name__ == "__main__":
    main()
