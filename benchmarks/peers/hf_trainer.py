"""Arm `trainer`: transformers' Trainer over LlamaForCausalLM, with the Trainer's own defaults; `bf16=True` for bf16.

Set by us because the job says so: batch size, learning rate, weight decay, clipping (1.0 is also the default), CPU, a
folder. Everything else is what a person gets who writes `Trainer(model, args, train_dataset=...).train()`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peers.job import Enough, Job, Timeline, read_job, token_rows


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of `sequence` tokens; labels equal inputs, the model shifts them."""

    def __init__(self, job: Job) -> None:
        self._rows = token_rows(job)[:, :, : job.sequence].flatten(0, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Marks(TrainerCallback):
    """Tells the timeline of each step."""

    def __init__(self, timeline: Timeline, parameters: int) -> None:
        self._timeline = timeline
        self._parameters = parameters

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """After the optimizer's step."""
        self._timeline.mark(parameters=self._parameters)


def model_of(job: Job) -> LlamaForCausalLM:
    """The job's shape, float32 weights, the library's default attention."""
    shape = job.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=max(2048, job.sequence),
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train until the timeline has enough."""
    job = read_job()
    timeline = Timeline(job, transformers=transformers.__version__)
    torch.set_default_dtype(torch.float32)
    model = model_of(job)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            max_steps=job.warmup + job.steps,
            learning_rate=job.lr,
            weight_decay=job.weight_decay,
            max_grad_norm=job.clip,
            bf16=job.precision == "bf16",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(job), callbacks=[Marks(timeline, parameters)])
        try:
            trainer.train()
        except Enough:
            return


if __name__ == "__main__":
    main()
