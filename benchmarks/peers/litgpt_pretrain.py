"""Arm `litgpt`: `litgpt pretrain` itself, called with a data module that hands out our rows.

LitGPT compiles the model always and takes bf16-mixed on a CPU by default. Variants: '32-true', 'bf16-mixed',
'bf16-true', each with '+eager' for the same without compilation (`torch.compile` is then replaced by the identity: the
program has no switch for it). An iteration ends when the loop asks for the next batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litgpt
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from peers.job import Enough, Job, Timeline, read_job, token_rows


class Rows(IterableDataset[Tensor]):
    """Batches of (batch, sequence + 1) ids, which mark the timeline when the next one is asked for."""

    def __init__(self, job: Job, timeline: Timeline) -> None:
        self._rows = token_rows(job)
        self._timeline = timeline
        self._facts = {"parameters": parameter_count(job)}

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._rows:
            yield batch
            self._timeline.mark(**self._facts)


class Data(DataModule):  # type: ignore[misc]  # LitGPT carries no types
    """What LitGPT asks data of."""

    def __init__(self, job: Job, timeline: Timeline) -> None:
        super().__init__()
        self._job, self._timeline = job, timeline

    def connect(
        self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **unused: Any
    ) -> None:
        """The job has decided all of it."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Ready batches, in order."""
        return DataLoader(Rows(self._job, self._timeline), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """One batch, for the look at the settings that LitGPT takes before it starts."""
        return DataLoader([token_rows(self._job)[0]], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def config_of(job: Job) -> Config:
    """The job's shape in LitGPT's words."""
    shape = job.shape
    return Config(
        name="benchmark",
        block_size=job.sequence,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.hidden_size,
        n_query_groups=shape.n_kv_heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape.ffn_size,
        rope_base=int(shape.rope_theta),
        norm_eps=shape.norm_eps,
    )


def parameter_count(job: Job) -> int:
    """Of the model as it trains."""
    with torch.device("meta"):
        model = litgpt.GPT(config_of(job))
    total: int = sum(p.numel() for p in model.parameters())
    head: int = model.lm_head.weight.numel()
    return total - head if job.shape.tied else total


def main() -> None:
    """Pretrain until the timeline has enough."""
    job = read_job()
    precision, _, eager = job.variant.partition("+")
    if eager:
        torch.compile = lambda model, **unused: model  # type: ignore[assignment]  # LitGPT has no setting for it
    timeline = Timeline(job, litgpt=version("litgpt"))
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=job.batch,
        micro_batch_size=job.batch,
        max_tokens=(job.warmup + job.steps + 1) * job.batch * job.sequence,
        max_seq_length=job.sequence,
        max_norm=job.clip,
        lr_warmup_steps=job.warmup,
        tie_embeddings=job.shape.tied,
    )
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": job.lr, "weight_decay": job.weight_decay, "betas": (0.9, 0.95)},
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            setup(
                model_name="benchmark",
                model_config=config_of(job),
                out_dir=Path(folder),
                precision=precision,
                data=Data(job, timeline),
                train=train,
                eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
                optimizer=optimizer,
                devices=1,
                logger_name="csv",
                seed=job.seed,
            )
        except Enough:
            return


if __name__ == "__main__":
    main()
