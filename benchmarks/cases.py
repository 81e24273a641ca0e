"""What is compared: shapes, arms, and the bars they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

from peers.job import Shape


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model shape with the batch it is trained on."""

    shape: Shape
    batch: int
    sequence: int
    line: str


CASES = {
    "10m": Case(
        shape=Shape(vocab_size=8192, n_layers=6, hidden_size=320, n_heads=5, n_kv_heads=5, ffn_size=896, tied=True),
        batch=8,
        sequence=512,
        line="10.2M parameters, 6 x 320, vocabulary 8,192, 8 rows of 512 tokens",
    ),
    "135m": Case(
        shape=Shape(
            vocab_size=49152,
            n_layers=30,
            hidden_size=576,
            n_heads=9,
            n_kv_heads=3,
            ffn_size=1536,
            tied=True,
            rope_theta=100000.0,
        ),
        batch=2,
        sequence=512,
        line="134.5M parameters, SmolLM2-135M's shape, vocabulary 49,152, 2 rows of 512 tokens",
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
