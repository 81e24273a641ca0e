"""Slow, plain formulas of the model: loops over tokens, heads and pairs, in Python numbers or float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q_BTNh: Tensor, k_BTGh: Tensor, v_BTGh: Tensor, window: int | None, documents_BT: Tensor | None
) -> Tensor:
    """(B, T, N, h), one query at a time."""
    batch, length, heads, head_dim = q_BTNh.shape
    per_group = heads // k_BTGh.shape[2]
    rows = []
    for b in range(batch):
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            seen = [
                s for s in range(first, t + 1) if documents_BT is None or bool(documents_BT[b, s] == documents_BT[b, t])
            ]
            for n in range(heads):
                g = n // per_group
                scores = torch.stack([q_BTNh[b, t, n] @ k_BTGh[b, s, g] / math.sqrt(head_dim) for s in seen])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                rows.append(sum((w * v_BTGh[b, s, g] for w, s in zip(weights, seen, strict=True)), torch.zeros(())))
    return torch.stack([torch.as_tensor(row) for row in rows]).view(batch, length, heads, head_dim)


def rope(x_BTNh: Tensor, positions_BT: Tensor, frequencies: list[float]) -> Tensor:
    """Turn pair (i, i + r/2) of every head by position * frequency i, one pair at a time."""
    out = x_BTNh.clone()
    half = len(frequencies)
    for b in range(x_BTNh.shape[0]):
        for t in range(x_BTNh.shape[1]):
            for i, frequency in enumerate(frequencies):
                angle = float(positions_BT[b if positions_BT.shape[0] > 1 else 0, t]) * frequency
                cos, sin = math.cos(angle), math.sin(angle)
                first, second = x_BTNh[b, t, :, i], x_BTNh[b, t, :, i + half]
                out[b, t, :, i] = first * cos - second * sin
                out[b, t, :, i + half] = second * cos + first * sin
    return out


def frequencies(theta: float, width: int) -> list[float]:
    """theta^(-2i / width)."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


def llama3_frequencies(plain: list[float], *, factor: float, low: float, high: float, original: int) -> list[float]:
    """Llama 3.1's published rule, case by case."""
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x / (1 + torch.exp(-x))


def swiglu_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, ignore: int) -> Tensor:
    """(C,): log of the sum of exponentials minus the target's logit, row by row; 0 for a row to ignore."""
    rows = []
    for row, target in zip(logits_CV, targets_C.tolist(), strict=True):
        normaliser = torch.log(torch.exp(row - row.max()).sum()) + row.max()
        rows.append(row.sum() * 0 if target == ignore else normaliser - row[target])
    return torch.stack(rows)
