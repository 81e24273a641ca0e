"""How long a person waits for `lmworks --help` and `lmworks methods`: the bar is 0.3 s for help.

python benchmarks/start_up.py --runs 20
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(words: list[str]) -> float:
    """One start of the command, wall time."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lmworks", *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print median, least and most for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="starts of each command")
    runs = parser.parse_args().runs
    for words in (["--help"], ["methods"], ["train", "--help"]):
        times = [seconds(words) for _ in range(runs)]
        print(f"{' '.join(words):16} median {statistics.median(times):.3f} s  {min(times):.3f} to {max(times):.3f}")


if __name__ == "__main__":
    main()
