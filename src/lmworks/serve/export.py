"""Export with proof: write a Hugging Face folder, read it in a fresh process, compare logits, and only then name it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import processors

from lmworks.core import files
from lmworks.data.tokenizer import Tokenizer
from lmworks.generate.writer import DTYPES, tokenizer_of
from lmworks.model import hf
from lmworks.model.backbone import Backbone
from lmworks.model.checkpoint import Located, load, locate
from lmworks.model.hf_write import new_folder, write
from lmworks.serve.card import card_of
from lmworks.serve.proof import TOLERANCE, prove, token_rows

SHARD_BYTES = 5_000_000_000


def export_model(
    source: Path,
    target: Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    tolerance: float = TOLERANCE,
    transformers: bool | None = None,
) -> dict[str, Any]:
    """Export a run folder, checkpoint or Hugging Face folder to `target`; the report of the proof.

    The folder is compared with the model in memory, whose weights were rounded to `dtype`, in float32. What the
    rounding itself changes is reported as rounding_difference. Raises ExportError, and leaves nothing at `target`, when
    a logit differs by more than `tolerance` or the model has no family.
    """
    begun = time.monotonic()
    where = locate(source)
    tokenizer = tokenizer_of(where)
    model = load(where.weights, device="cpu")
    rows_BT = token_rows(model, tokenizer)
    rounding = _round(model, DTYPES[dtype], rows_BT)
    with new_folder(target) as folder:
        write(
            model,
            folder,
            tokenizer_folder=where.tokenizer,
            tokens=_special(where, tokenizer),
            dtype=DTYPES[dtype],
            shard_bytes=shard_bytes,
            card=card_of(model, name=target.name, source=source, run=where.run),
        )
        if where.run is not None:
            start_with_bos(folder / "tokenizer.json", tokenizer)
        checks = prove(model, folder, rows_BT=rows_BT, tolerance=tolerance, transformers=transformers)
    return {
        "path": str(target),
        "source": str(where.weights),
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "max_difference": max(check.max_difference for check in checks),
        "rounding_difference": rounding,
        "checks": [asdict(check) for check in checks],
        "tokens_compared": rows_BT.numel(),
        "seconds": round(time.monotonic() - begun, 2),
    }


@torch.inference_mode()
def _round(model: Backbone, dtype: torch.dtype, rows_BT: torch.Tensor) -> float:
    """Round the weights to what the folder can hold; the largest change of a logit."""
    if dtype == torch.float32:
        return 0.0
    before_BTV = model.logits(model(rows_BT))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return float((model.logits(model(rows_BT)) - before_BTV).abs().max())


def _special(where: Located, tokenizer: Tokenizer) -> hf.Tokens:
    """The special ids: the folder's own where it says them, otherwise the tokenizer's."""
    if where.run is None:
        table: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            path = where.weights / name
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                table |= {key: value for key, value in found.items() if isinstance(value, int)}
        named = {kind: table.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        if named["eos"] is not None:
            return hf.Tokens(**named)
    return hf.Tokens(bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.eos)


def start_with_bos(path: Path, tokenizer: Tokenizer) -> None:
    """Let the exported tokenizer put bos before a text, as it stood there in training.

    Without it, readers of the folder would show the model texts that begin as none of its documents did.
    """
    inner = tokenizers.Tokenizer.from_file(str(path))
    token = inner.id_to_token(tokenizer.bos)
    template = {"single": f"{token} $A", "pair": f"{token} $A {token} $B:1"}
    inner.post_processor = processors.TemplateProcessing(**template, special_tokens=[(token, tokenizer.bos)])
    files.write_text(path, inner.to_str(pretty=True))
