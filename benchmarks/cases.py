"""What is compared: shapes, arms, and the bars they are held against."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from peers.job import Shape


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model shape with the batch it is trained on."""

    shape: Shape
    batch: int
    sequence: int
    line: str


SIZES = Path(__file__).resolve().parents[1] / "recipes" / "sizes"


def size(name: str, *, vocab_size: int | None = None) -> Shape:
    """A shipped shape. `vocab_size` is for those that leave it to the tokenizer."""
    table = tomllib.loads((SIZES / f"{name}.toml").read_text(encoding="utf-8"))
    known = {field.name for field in fields(Shape)}
    return Shape(
        **{**({"vocab_size": vocab_size} if vocab_size else {}), **{k: table[k] for k in known & table.keys()}}
    )


CASES = {
    "10m": Case(
        shape=size("llama-10m", vocab_size=8192),
        batch=8,
        sequence=512,
        line="recipes/sizes/llama-10m.toml with a vocabulary of 8,192 (11.5M parameters), 8 rows of 512 tokens",
    ),
    "135m": Case(
        shape=size("smollm2-135m"),
        batch=2,
        sequence=512,
        line="recipes/sizes/smollm2-135m.toml (134.5M parameters, vocabulary 49,152), 2 rows of 512 tokens",
    ),
    "tiny": Case(
        shape=Shape(vocab_size=512, n_layers=2, hidden_size=64, n_heads=4, n_kv_heads=2, ffn_size=128, tied=True),
        batch=2,
        sequence=64,
        line="107k parameters: only to try the benchmark itself",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    module: str
    """Below `peers`."""
    variants: dict[str, str] = field(default_factory=lambda: {"fp32": "", "bf16": ""})
    """Precision -> the variant of the module; an arm runs in these precisions only."""
    python: str = "own"
    """own: this interpreter; litgpt: the one with LitGPT in it."""
    is_peer: bool = True
    """Whether lmworks is compared with it."""
    by_default: bool = True
    line: str = ""


ARMS = {
    "lmworks": Arm(module="lmworks_train", is_peer=False, line="`lmworks train`, one document per row"),
    "trainer": Arm(module="hf_trainer", line="transformers' Trainer with its defaults (bf16=True for bf16)"),
    "litgpt": Arm(
        module="litgpt_pretrain",
        variants={"fp32": "32-true", "bf16": "bf16-mixed"},
        python="litgpt",
        line="`litgpt pretrain`, which compiles; bf16-mixed, its default, for bf16",
    ),
    "litgpt-true": Arm(
        module="litgpt_pretrain",
        variants={"bf16": "bf16-true"},
        python="litgpt",
        line="`litgpt pretrain --precision bf16-true`: weights and optimizer in bf16 as well",
    ),
    "plain": Arm(module="plain_loop", line="a plain PyTorch loop; autocast for bf16"),
    "lmworks-packed": Arm(
        module="lmworks_train",
        variants={"fp32": "packed", "bf16": "packed"},
        is_peer=False,
        line="`lmworks train` with several documents per row",
    ),
    "lmworks-compile": Arm(
        module="lmworks_train",
        variants={"fp32": "compile", "bf16": "compile"},
        is_peer=False,
        by_default=False,
        line="`lmworks train` with compile = true",
    ),
    "litgpt-eager": Arm(
        module="litgpt_pretrain",
        variants={"fp32": "32-true+eager", "bf16": "bf16-mixed+eager"},
        python="litgpt",
        by_default=False,
        line="LitGPT with its call of torch.compile taken out",
    ),
    "litgpt-true-eager": Arm(
        module="litgpt_pretrain",
        variants={"bf16": "bf16-true+eager"},
        python="litgpt",
        by_default=False,
        line="the same in bf16-true",
    ),
    "plain-compile": Arm(
        module="plain_loop",
        variants={"fp32": "compile", "bf16": "compile"},
        by_default=False,
        line="the plain loop with torch.compile",
    ),
}
PRODUCT = Arm(module="product", is_peer=False, line="2048 x 2048 x 2048 product")

SPEED_BARS = {"fp32": 1.2, "bf16": 1.5}
"""Tokens/s against the best peer."""
PRODUCT_BAR = 0.60
"""Least share of the measured fp32 product rate."""
OVERHEAD_BAR = 0.01
"""Most that the loop, events and watchers may add to a step, as a share of the whole turn."""
LOAD_LIMIT = 0.05
"""Other load above which a run is repeated."""
