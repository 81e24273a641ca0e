"""What a part costs, told from its settings alone, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Exact counts for one model shape at one sequence length.

    A multiply-add counts as two FLOPs. FLOPs are those of matrix products and attention; elementwise work is left
    out, as is customary when a model FLOPs utilisation (MFU) is computed.
    """

    parameters: int
    """Trainable values; a tied head is counted once."""
    idle_parameters: int = 0
    """The part of `parameters` that a token does not use: the experts that it did not choose."""
    embedding_parameters: int = 0
    """The part of `parameters` that is only looked up: token and position tables."""
    forward_flops_per_token: float = 0.0
    """FLOPs of one forward pass per token, head included, causal attention counted at half of the square."""
    activation_bytes_per_token: float = 0.0
    """Bytes that the blocks keep for the backward pass per token at the compute precision, without recomputation."""
    cache_bytes_per_token: float = 0.0
    """Bytes of key/value cache per token of a context of that length at the compute precision."""

    @property
    def active_parameters(self) -> int:
        """Values that one token uses; all of them without experts."""
        return self.parameters - self.idle_parameters

    @property
    def train_flops_per_token(self) -> float:
        """Forward plus backward: the backward pass of a product is two products."""
        return 3.0 * self.forward_flops_per_token
