"""Which engine of context parallelism is faster on which links: rounds on a clock, nothing measured.

    python benchmarks/context_links.py

For rows of 4 K to 64 K tokens on 2, 4 and 8 ranks, with 32 query heads of 128 on 32, 16 and 8 key/value heads: seconds
of one block's attention, forward and backward, by engine, on each kind of links. The rounds and their bytes are those
that run (`plan/rounds.py`); rates of links and of attention are given below and are assumptions. Takes some seconds.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, replace
from typing import Any, get_args

import evidence_file

from lmworks.parallel.layout import Engine
from lmworks.plan.rounds import Calls, Links, backward, forward

ENGINES: tuple[Engine, ...] = get_args(Engine)
TERA = 1e12
PLACES = {
    "full mesh": (Links(line=50e9, latency=5e-6), 400 * TERA),
    "switch": (Links(line=450e9, port=450e9, latency=5e-6), 400 * TERA),
    "slow switch": (Links(line=50e9, port=50e9, latency=1e-5), 400 * TERA),
    "ring of lines": (Links(line=50e9, latency=5e-6, neighbours_only=True), 400 * TERA),
    "PCIe, 4 A10": (Links(line=14e9, port=21.4e9, latency=1e-5), 60 * TERA),
    "one way at a time": (Links(line=14e9, port=14e9, latency=1e-5, both_ways=False), 60 * TERA),
}
"""Links and FLOP/s of attention. The A10's links are fitted to two of the three times that TokenRing's repository
gives; the others are round figures: 50 GB/s is a network card or one NVLink, 450 GB/s an H100's NVLink switch."""


def case(place: str, ranks: int, sequence: int, groups: int) -> dict[str, Any]:
    """Milliseconds of each engine, and the fastest."""
    links, rate = PLACES[place]
    shape = Calls(
        engine="ring", ranks=ranks, sequence=sequence, heads=32, groups=groups, head_dim=128, rate=rate, rows=1
    )
    took = {}
    for engine in ENGINES:
        if engine == "ulysses" and groups % ranks:
            continue
        calls = replace(shape, engine=engine)
        clocks = forward(calls, links), backward(calls, links)
        took[engine] = {
            "forward_ms": round(1e3 * clocks[0].seconds, 4),
            "backward_ms": round(1e3 * clocks[1].seconds, 4),
            "exposed_ms": round(1e3 * sum(clock.exposed for clock in clocks), 4),
        }
    total = {engine: each["forward_ms"] + each["backward_ms"] for engine, each in took.items()}
    return {
        "links": place,
        "ranks": ranks,
        "sequence": sequence,
        "key_value_heads": groups,
        "engines": took,
        "fastest": min(total, key=lambda engine: total[engine]),
        "tokenring_over_ring": round(total["tokenring"] / total["ring"], 4),
        "forward_over_ring": round(took["tokenring"]["forward_ms"] / took["ring"]["forward_ms"], 4),
    }


def shown(rows: list[dict[str, Any]]) -> str:
    """The table for people: TokenRing's seconds over ring attention's, forward and backward, and the fastest engine."""
    head = f"{'links':<18}{'ranks':>6}{'tokens':>8}{'groups':>8}{'tokenring / ring':>18}{'forward':>10}  fastest"
    return "\n".join(
        [head]
        + [
            f"{row['links']:<18}{row['ranks']:>6}{row['sequence']:>8}{row['key_value_heads']:>8}"
            f"{row['tokenring_over_ring']:>18.3f}{row['forward_over_ring']:>10.3f}  {row['fastest']}"
            for row in rows
        ]
    )


def main() -> None:
    """Work out every case, print the table, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-evidence", action="store_true")
    options = parser.parse_args()
    sizes = itertools.product(PLACES, (2, 4, 8), (4096, 16_384, 65_536), (32, 16, 8))
    rows = [case(*each) for each in sizes]
    print(shown(rows))
    if options.no_evidence:
        return
    record = evidence_file.head("context_links") | {
        "kind": "modelled",
        "assumed": {name: asdict(links) | {"attention_flops": rate} for name, (links, rate) in PLACES.items()},
        "results": rows,
    }
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
