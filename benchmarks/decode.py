"""Tokens a second of decoding one text with the real SmolLM2-135M: lmworks against transformers' generate.

python benchmarks/decode.py --rounds 5     fetch the model if needed, measure, write benchmarks/evidence/

Both decode greedily behind the same prompt, in turn, in one process with the same number of threads; every run is kept.
The third figure is the bare work: one F.linear for each matrix of the model, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks import evidence_file
from lmworks.generate.writer import DTYPES, Precision, Writer, open_writer
from lmworks.serve.fetch import fetch_model

MODEL = "smollm2-135m"
PROMPT = "Once upon a time, in a small village by the sea, there lived"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


def arms(folder: Path, precision: Precision, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed: each call makes `tokens` tokens, or does the products of as many."""
    writer: Writer = open_writer(folder, precision=precision, device="cpu")
    ids = writer.ids(PROMPT)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    matrices = [p.detach() for name, p in writer.model.named_parameters() if p.ndim == 2 and name != "embed.weight"]
    matrices.append(writer.model.head_weight().detach())
    inputs = [torch.ones(1, matrix.shape[1], dtype=matrix.dtype) for matrix in matrices]

    def products() -> None:
        for _ in range(tokens):
            for x, matrix in zip(inputs, matrices, strict=True):
                F.linear(x, matrix)

    return {
        "transformers": lambda: peer.generate(torch.tensor([ids]), **settings),
        "lmworks": lambda: writer.engine.complete([ids], max_tokens=tokens),
        "products": products,
    }


def measure(folder: Path, precision: Precision, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Every run of every arm in turn, their medians, and the ratio to transformers."""
    works = arms(folder, precision, tokens)
    runs: dict[str, list[float]] = {name: [] for name in works}
    loads: list[float] = []
    with torch.inference_mode():
        for work in works.values():
            work()
        for _ in range(rounds):
            loads.append(os.getloadavg()[0])
            for name, work in works.items():
                begun = time.perf_counter()
                work()
                runs[name].append(tokens / (time.perf_counter() - begun))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "precision": precision,
        "tokens_per_second": runs,
        "medians": medians,
        "ratio_to_transformers": medians["lmworks"] / medians["transformers"],
        "share_of_products": medians["lmworks"] / medians["products"],
        "load_average": loads,
    }


def main() -> None:
    """Measure every precision and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=evidence_file.FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(fetch_model(MODEL)["path"])
    found = [measure(folder, kind, tokens=options.tokens, rounds=options.rounds) for kind in PRECISIONS]
    record = evidence_file.head("decode") | {
        "model": MODEL,
        "threads": options.threads,
        "tokens": options.tokens,
        "results": found,
        "loaded": any(load > options.threads + 1 for result in found for load in result["load_average"]),
    }
    print(evidence_file.write(record, options.out))
    for result in found:
        shown = ", ".join(f"{name} {value:.1f}" for name, value in result["medians"].items())
        print(f"{result['precision']}: {shown} tokens/s; {result['ratio_to_transformers']:.2f} x transformers")


if __name__ == "__main__":
    main()
