"""Arm `plain`: a PyTorch loop in the style of nanoGPT over a straightforward Llama model.

What a good tutorial would write: pre-norm blocks, `F.scaled_dot_product_attention`, `F.cross_entropy` over all logits,
autocast for bf16, `clip_grad_norm_`, fused AdamW. Variant `compile` compiles the model as a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.job import Enough, Job, Shape, Timeline, read_job, token_rows


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, N, T, h) turned by the angles of its positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    """Attention and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.hidden_size // shape.n_heads
        self.norm_1 = Norm(shape.hidden_size, shape.norm_eps)
        self.norm_2 = Norm(shape.hidden_size, shape.norm_eps)
        self.q = nn.Linear(shape.hidden_size, shape.n_heads * self.head_dim, bias=False)
        self.k = nn.Linear(shape.hidden_size, shape.n_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(shape.hidden_size, shape.n_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(shape.n_heads * self.head_dim, shape.hidden_size, bias=False)
        self.gate = nn.Linear(shape.hidden_size, shape.ffn_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.ffn_size, bias=False)
        self.down = nn.Linear(shape.ffn_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, length, _ = x.shape
        y = self.norm_1(x)
        q, k, v = (m(y).view(batch, length, -1, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm_2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Llama(nn.Module):
    """Token ids and targets to a mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, sequence: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if shape.tied:
            self.head.weight = self.embed.weight
        head_dim = shape.hidden_size // shape.n_heads
        frequency = shape.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(sequence).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> scalar."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


def optimizer_of(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, as in nanoGPT."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=job.lr, betas=(0.9, 0.95), fused=True)


def main() -> None:
    """Train until the timeline has enough."""
    job = read_job()
    rows = token_rows(job)
    timeline = Timeline(job)
    model = Llama(job.shape, job.sequence)
    optimizer = optimizer_of(model, job)
    run = torch.compile(model) if job.variant == "compile" else model
    parameters = sum(p.numel() for p in model.parameters())
    try:
        for batch in rows:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.precision == "bf16"):
                loss = run(batch[:, :-1], batch[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            timeline.mark(loss=loss.item(), parameters=parameters)
    except Enough:
        return


if __name__ == "__main__":
    main()
