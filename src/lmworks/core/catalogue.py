"""Every part by slot and name, as text. Nothing is imported until a recipe names it.

To add a part, add one line. The line is what `lmworks methods` prints.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from lmworks.core.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Part:
    """Where a part's class lives ('module:Class' below `lmworks`) and what it is, in one line."""

    path: str
    line: str


@dataclass(frozen=True)
class Shelf:
    """What can stand in one slot: the kind of part, the parts, the one taken when a table has no `use`."""

    line: str
    parts: dict[str, Part] = field(default_factory=dict)
    default: str | None = None
    presets: str | None = None
    """Folder below `recipes/` whose files a table of this slot may name with `size`."""


SLOTS: dict[str, Shelf] = {
    "model": Shelf(
        "the network that is trained",
        {
            "decoder": Part("model.decoder:DecoderConfig", "Llama-shaped decoder with sizes per block"),
            "gpt2": Part("model.gpt2:GPT2Config", "GPT-2: learned positions, LayerNorm, GELU"),
            "neox": Part("model.neox:NeoXConfig", "GPT-NeoX / Pythia: partial rotary, parallel residual"),
            "pretrained": Part("model.pretrained:Pretrained", "weights and shape of a Hugging Face or run folder"),
        },
        presets="sizes",
    ),
    "source": Shelf(
        "where batches come from",
        {"packed": Part("data.packed:Packed", "documents, tokenised once and packed into rows")},
        default="packed",
    ),
    "reader": Shelf(
        "where documents come from",
        {
            "python-stdlib": Part("data.read:PythonStdlib", "sources and docs of the running Python: on every machine"),
            "text": Part("data.read:TextFiles", "text files by path or glob"),
            "jsonl": Part("data.read:Jsonl", "one JSON object a line"),
            "parquet": Part("data.read:Parquet", "a column of Parquet files"),
            "cleaned": Part("make.reader:Cleaned", "what a data recipe leaves of a source; it is run where it was not"),
            "huggingface": Part("data.read:HuggingFace", "a Hugging Face dataset, local folder or hub name"),
        },
    ),
    "stage": Shelf(
        "what is done with documents before they are tokens",
        {
            "repair": Part("data.repair:Repair", "undo mojibake, one Unicode spelling (ftfy)"),
            "length": Part("data.length:Length", "drop documents that are too short or too long"),
            "lines": Part("data.rules:Lines", "take out lines: C4's rules"),
            "rules": Part("data.rules:Rules", "quality rules as data: Gopher, C4, FineWeb, or a file of one's own"),
            "language": Part("data.language:Language", "mark the language, keep the wanted ones (py3langid)"),
            "private": Part("data.private:Private", "mask e-mail addresses, IP addresses, numbers, keys"),
            "licence": Part("data.licences:Licence", "keep documents by their licence"),
            "dedup": Part("data.dedup:Dedup", "keep one of the documents that are the same"),
            "decontaminate": Part("data.decontaminate:Decontaminate", "drop documents that hold items of test sets"),
            "split": Part("data.split:Split", "training, validation and test documents by hash"),
        },
    ),
    "key": Shelf(
        "what makes two documents the same",
        {
            "exact": Part("data.keys:Exact", "equal texts"),
            "minhash": Part("data.keys:MinHash", "near copies, by MinHash and bands (rensa)"),
            "embedding": Part("data.embedding:Embedding", "equal meanings, by the cosine of word vectors (wordllama)"),
        },
        default="minhash",
    ),
    "tokenizer": Shelf(
        "how text becomes token ids",
        {
            "bpe": Part("data.tokenizer:Bpe", "byte-level BPE trained on the run's own text"),
            "file": Part("data.tokenizer:TokenizerFile", "an existing tokenizer.json"),
            "bytes": Part("data.tokenizer:Bytes", "UTF-8 bytes and one special token"),
        },
    ),
    "objective": Shelf(
        "what is minimised",
        {"cross-entropy": Part("train.objective:CrossEntropy", "next-token cross-entropy, head in chunks")},
        default="cross-entropy",
    ),
    "selector": Shelf(
        "which candidates of a draw are trained on",
        {
            "all": Part("train.slots:SelectAll", "every row that was drawn"),
            "colm": Part("methods.colm:Colm", "small sources whole, medoids of the others (CoLM)"),
        },
        default="all",
    ),
    "gradient": Shelf(
        "what happens between backward and the update",
        {"clip": Part("train.gradient:Clip", "scale the gradient to at most a global norm")},
    ),
    "saved": Shelf(
        "what is kept for the backward pass",
        {
            "keep": Part("train.saved:Keep", "keep every saved tensor"),
            "recompute": Part("train.saved:Recompute", "recompute each block in the backward pass"),
            "offload": Part("train.saved:Offload", "send saved tensors to files or host memory, and back in time"),
            "coat": Part("methods.coat.blocks:CoatActivations", "products on eight-bit floats, and nothing wider kept"),
            "ssdtrain": Part(
                "methods.ssdtrain:SSDTrain", "as many blocks on a disk as it brings back in time (SSDTrain)"
            ),
            "by-block": Part("train.by_block:ByBlock", "another policy for other blocks"),
        },
        default="keep",
    ),
    "layout": Shelf(
        "how the ranks of a run share the work",
        {
            "ranks": Part("parallel.layout:Layout", "ranks by axis: pipeline, data, context, tensor"),
            "zero": Part("parallel.zero:Zero", "weights, gradients and optimizer state shared as a known stage says"),
            "tokenring": Part("methods.tokenring:TokenRing", "rows divided among ranks that pass queries round"),
            "distca": Part("methods.distca:DistCA", "rows on ranks that compute each other's attention"),
            "torchtitan": Part("methods.torchtitan:TorchTitan", "one to four dimensions over all ranks"),
            "frontier-zero": Part("methods.frontier_zero:FrontierZero", "states shared by pair, node and all ranks"),
            "zero++": Part("parallel.zeropp:ZeroPlusPlus", "ZeRO-3 that sends int8 weights and int4 gradients"),
            "pipette": Part(
                "methods.pipette.part:Pipette", "what takes least time on measured links, each machine placed"
            ),
            "megatron": Part("methods.megatron:Megatron", "least tensor and pipeline parallelism that fits in memory"),
        },
        default="ranks",
    ),
    "optimizer": Shelf(
        "how gradients change weights",
        {
            "adamw": Part("train.optim:AdamW", "Adam with decoupled weight decay"),
            "sgd": Part("train.optim:SGD", "gradient descent with momentum"),
            "lion": Part("train.optim:Lion", "sign of an interpolated momentum"),
            "muon": Part("train.optim:Muon", "orthogonalised momentum for matrices, AdamW for the rest"),
            "sophia": Part("methods.sophia:Sophia", "momentum over cheap curvature, clipped in every coordinate"),
            "lamb": Part("methods.megascale:Lamb", "Adam with a step per matrix as long as the matrix times the rate"),
            "coat": Part("methods.coat.states:Coat", "another optimizer with its moments in eight-bit floats"),
        },
    ),
    "schedule": Shelf(
        "how the learning rate moves over the run",
        {
            "cosine": Part("train.schedule:Cosine", "warm-up, then half a cosine down"),
            "linear": Part("train.schedule:Linear", "warm-up, then a straight line down"),
            "wsd": Part("train.schedule:WarmupStableDecay", "warm-up, constant, decay at the end"),
            "constant": Part("train.schedule:Constant", "warm-up, then constant"),
            "ptwd": Part("methods.slimpajama_dc:Ptwd", "another schedule's rate, and weight decay in phases (PTWD)"),
        },
        default="cosine",
    ),
    "watcher": Shelf(
        "what looks at the run while it goes, and may answer with a change",
        {
            "early-stop": Part("train.watch:EarlyStop", "stop when the validation loss no longer falls"),
            "health": Part("train.health:Health", "say so when a metric leaves its healthy band, with its batch"),
            "green-ai": Part("methods.green_ai:GreenAI", "stop when energy, CO2 or money is spent, or buys too little"),
            "sophia-health": Part("methods.sophia:SophiaHealth", "say so when Sophia clips nearly all or hardly any"),
        },
    ),
    "mixture": Shelf(
        "how the shares of the sources are sought",
        {
            "regmix": Part("methods.regmix:RegMix", "a regression on many small runs, and the best of many mixtures"),
            "admire-bayesopt": Part(
                "methods.admire_bayesopt.part:AdmireBayesOpt", "one run after another, small or large, by what it tells"
            ),
        },
    ),
    "executor": Shelf(
        "where jobs run that do not depend on each other",
        {
            "local": Part("jobs.local:Local", "processes of this machine"),
            "slurm": Part("jobs.slurm:Slurm", "an array of a Slurm cluster"),
            "ray": Part("jobs.ray:Ray", "tasks of a Ray cluster"),
        },
        default="local",
    ),
    "sink": Shelf(
        "where metrics are sent besides the run folder",
        {
            "tensorboard": Part("train.sinks:TensorBoard", "TensorBoard files in the run folder"),
            "wandb": Part("train.sinks:WandB", "Weights & Biases"),
            "mlflow": Part("train.sinks:MLflow", "MLflow"),
            "trackio": Part("train.sinks:Trackio", "trackio"),
        },
    ),
}

VERBS: dict[str, str] = {
    "data": "make.recipe:Data",
    "train": "train.recipe:Train",
    "prove": "prove.recipe:Proof",
    "mix": "mix.recipe:Mix",
}
"""Verbs that run a recipe, and the dataclass that such a recipe decodes to."""

FOLDERS: dict[str, str] = {
    "data": "data",
    "train": "train",
    "prove": "proofs",
    "mix": "mix",
}
"""Where the shipped recipes of a verb lie, below `recipes/`."""


def shelf(name: str) -> Shelf:
    """The shelf of that name. Raises UsageError with the nearest name."""
    if name not in SLOTS:
        raise UsageError(f"no slot is called '{name}'{did_you_mean(name, SLOTS)}", legal=", ".join(SLOTS))
    return SLOTS[name]


def resolve(path: str) -> Any:
    """Import 'module:Class' below `lmworks` and return the class."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(f"lmworks.{module}"), attribute)


def name_of(part: object) -> str | None:
    """The catalogue name of a part, from its class; None for a class that is not in the catalogue."""
    cls = type(part)
    path = f"{cls.__module__.removeprefix('lmworks.')}:{cls.__qualname__}"
    for entry in SLOTS.values():
        for name, listed in entry.parts.items():
            if listed.path == path:
                return name
    return None
