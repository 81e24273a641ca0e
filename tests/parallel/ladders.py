"""A small model of three blocks on eight ranks, two nodes of two pairs, with states placed in every known way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lmworks.model.decoder import DecoderConfig
from lmworks.parallel.layout import Layout
from lmworks.parallel.shard import local
from lmworks.parallel.state import StatePlacement
from lmworks.train.gradient import Clip
from lmworks.train.optim import AdamW
from lmworks.train.rehearse import MadeUp, Scene, Seen, perform, placed, stepping

STEPS, ROWS, RANKS = 5, 32, 8
MODEL = DecoderConfig(
    vocab_size=37, n_layers=3, hidden_size=16, n_heads=2, n_kv_heads=1, ffn_size=20, tied=False, qk_norm=True
)
LEVELS = (2, 4)


def state(weights: int, gradients: int, optimizer: int = RANKS, **more: Any) -> Layout:
    degrees: dict[str, Any] = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return Layout(dp_shard=RANKS, state=StatePlacement(**degrees, levels=LEVELS, **more))


LAYOUTS = {
    "ddp": state(1, 1, 1),
    "zero-1": state(1, 1),
    "zero-2": state(1, 8),
    "zero-3": state(8, 8),
    "mics": state(4, 4, 4),
    "hpz": state(8, 8, secondary=4),
    "topo": state(2, 4),
    "hsdp": Layout(dp_replicate=2, dp_shard=4),
    "copies-of-pairs": state(1, 2, 4),
}


@dataclass(frozen=True)
class Case:
    """A layout, and the rows of a micro-batch on each rank; there are four of a step."""

    name: str
    micro: int

    @property
    def scene(self) -> Scene:
        return scene_of(LAYOUTS[self.name], self.micro)


def scene_of(layout: Layout, micro: int = ROWS) -> Scene:
    return Scene(
        model=MODEL,
        layout=layout,
        rows=ROWS,
        micro_rows=micro,
        length=12,
        optimizer=AdamW(lr=1e-2),
        gradient=(Clip(),),
    )


def trained(rank: int, cases: list[Case]) -> list[Seen]:
    return [perform(rank, case.scene, torch.float64, STEPS) for case in cases]


def after_a_change(rank: int) -> list[float]:
    """Of plain sharding and of hpZ: the norm of all gradients, of all ranks, once weights have been changed by hand
    behind a step and a pass without gradient, which leaves its second copy."""
    found = []
    for more in ({}, {"secondary": 2}):
        layout = Layout(dp_shard=4, state=StatePlacement(**more))
        scene = scene_of(layout)
        made = placed(rank, scene, torch.float64)
        step = stepping(made, scene)
        step()
        held = {name: local(p).detach().clone() for name, p in made.model.named_parameters()}
        made.hidden(MadeUp(scene, made.share).draw(ROWS))
        made.fill(lambda name, box, held=held: held[name] * 1.5)
        found.append(step().grad_norm)
    return found


def in_bf16(rank: int) -> list[tuple[str, str, list[float]]]:
    """Of plain FSDP and a ladder: types of weights and of what is stepped, and losses."""
    found = []
    for layout in (Layout(dp_shard=4), Layout(dp_shard=4, state=StatePlacement(weights=1, gradients=2))):
        scene = scene_of(layout, 1)
        made = placed(rank, scene, torch.bfloat16, param_dtype=torch.float32)
        step = stepping(made, scene)
        losses = [step().loss for _ in range(STEPS)]
        types = (str(next(source.parameters()).dtype) for source in (made.weights, made.model))
        found.append((*types, losses))
    return found
