"""The proof of an export: a fresh process reads the folder; its logits must be those of the model in memory.

The child is this module: python -m lmworks.serve.proof FOLDER WORK READER... It reads token rows from WORK, loads
FOLDER with our reader and with transformers (when that is installed), and writes the logits of each to WORK.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmworks.core.errors import ExportError
from lmworks.core.need import need
from lmworks.data.tokenizer import Tokenizer
from lmworks.model import hf
from lmworks.model.backbone import Backbone

TOLERANCE = 1e-4
"""Largest difference of a float32 logit."""
RELATIVE = 1e-5
"""The same as a share of the largest logit, for models with large logits: other orders of summing differ by this."""
ROWS, LENGTH = 2, 128


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one reader made of the folder."""

    reader: str
    max_difference: float
    where: str
    """Row, position and token of the largest difference."""
    tolerance: float


def token_rows(model: Backbone, tokenizer: Tokenizer | None) -> Tensor:
    """(2, T) real token ids: the start of a source file of the running Python, or counting ids without a tokenizer."""
    vocab = model.config.vocab_size or 0
    length = min(LENGTH, int(getattr(model.config, "max_position", LENGTH)))
    if tokenizer is None:
        return torch.arange(ROWS * length).remainder(vocab).view(ROWS, length)
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    ids = [token for token in tokenizer.encode(text[: 64 * length]).tolist() if token < vocab]
    ids = ids * (ROWS * length // len(ids) + 1)
    return torch.tensor(ids[: ROWS * length]).view(ROWS, length)


def prove(
    model: Backbone, folder: Path, *, rows_BT: Tensor, tolerance: float = TOLERANCE, transformers: bool | None = None
) -> list[Check]:
    """Compare the folder, read in a fresh process, with the model (float32) in memory.

    `transformers`: also read it with that library; None = when it is installed. Raises ExportError with the largest
    difference and its place, or with what the child process said when it could not read the folder.
    """
    with torch.inference_mode():
        expected_BTV = model.logits(model(rows_BT.to(next(model.parameters()).device))).cpu()
    wanted = importlib.util.find_spec("transformers") is not None if transformers is None else transformers
    answers = _ask(folder, rows_BT, ["lmworks", "transformers"] if wanted else ["lmworks"])
    checks = [_compare(reader, expected_BTV, logits, rows_BT, tolerance) for reader, logits in answers.items()]
    for check in checks:
        if not check.max_difference <= check.tolerance:
            raise ExportError(
                f"{check.reader} gives other logits than the model in memory: "
                f"largest difference {check.max_difference:.3g} at {check.where}",
                where=str(folder),
                legal=f"at most {check.tolerance:.3g}",
            )
    return checks


def _compare(reader: str, expected_BTV: Tensor, found_BTV: Tensor, rows_BT: Tensor, tolerance: float) -> Check:
    if found_BTV.shape != expected_BTV.shape:
        raise ExportError(
            f"{reader} gives logits of shape {list(found_BTV.shape)}, the model {list(expected_BTV.shape)}"
        )
    difference_BTV = (found_BTV - expected_BTV).abs().nan_to_num(nan=torch.inf)
    place = int(difference_BTV.argmax())
    token, logit = divmod(place, expected_BTV.shape[-1])
    row, position = divmod(token, expected_BTV.shape[1])
    return Check(
        reader=reader,
        max_difference=float(difference_BTV.max()),
        where=f"row {row}, position {position}, token {int(rows_BT[row, position])}, logit {logit}",
        tolerance=max(tolerance, RELATIVE * float(expected_BTV.abs().max())) if tolerance > 0 else tolerance,
    )


def _ask(folder: Path, rows_BT: Tensor, readers: list[str]) -> dict[str, Tensor]:
    """Logits by reader, from a fresh process."""
    with tempfile.TemporaryDirectory(prefix="lmworks-proof-") as name:
        work = Path(name)
        save_file({"rows": rows_BT}, work / "rows.safetensors")
        command = [sys.executable, "-m", "lmworks.serve.proof", str(folder), str(work), *readers]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise ExportError(f"a fresh process cannot read the folder: {lines[-1]}", where=str(folder))
        answers = load_file(work / "logits.safetensors")
        return {reader: answers[reader] for reader in readers}


def _our_logits(folder: Path, rows_BT: Tensor) -> Tensor:
    model = hf.load(folder)
    return model.logits(model(rows_BT))


def _their_logits(folder: Path, rows_BT: Tensor) -> Tensor:
    library: Any = need("transformers", extra="hf")
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    logits: Tensor = model(rows_BT).logits
    return logits


def main(folder: Path, work: Path, readers: list[str]) -> None:
    """The child's work: read the folder with each reader, write the logits."""
    rows_BT = load_file(work / "rows.safetensors")["rows"]
    read = {"lmworks": _our_logits, "transformers": _their_logits}
    with torch.inference_mode():
        answers = {reader: read[reader](folder, rows_BT).contiguous() for reader in readers}
    save_file(answers, work / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
