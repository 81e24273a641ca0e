"""The table of layouts: ten losses, all gradients and all weights are those of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lmworks.parallel import gang
from lmworks.parallel.servers import Servers
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.traffic import traffic
from lmworks.train.rehearse import UNPLANNED, Seen, perform
from tests.parallel.table import LENGTH, MODELS, STEPS, Case, train_all

pytestmark = pytest.mark.ranks


def placed(weights: int | None = None, gradients: int | None = None, optimizer: int | None = None) -> StatePlacement:
    return StatePlacement(weights=weights, gradients=gradients, optimizer=optimizer)


SERVERS = Servers(tolerance=0.0, tile=2)
"""Documents of a few tokens are cut, and as much moves as can."""
SERVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fsdp-2", {"dp_shard": 2}, {"micro": 2}),
    ("fsdp-2-recompute", {"dp_shard": 2}, {"recompute": True}),
    ("replicate-2-accumulation", {"dp_replicate": 2}, {"micro": 1, "model": "untied"}),
    ("biases", {"dp_shard": 2}, {"model": "gpt2"}),
    ("parallel", {"dp_shard": 2}, {"model": "parallel"}),
    ("neox", {"dp_replicate": 2}, {"model": "neox"}),
    ("cp-2", {"cp": 2}, {"micro": 2}),
    ("cp-2-contiguous", {"cp": 2, "order": "contiguous"}, {"recompute": True}),
    ("cp-2-striped", {"cp": 2, "order": "striped"}, {"micro": 4}),
    ("ep-2", {"dp_shard": 2, "ep": 2}, {"micro": 2, "model": "experts"}),
    ("cp-2-fsdp-2", {"cp": 2, "dp_shard": 2}, {"micro": 2}),
    ("hsdp-2x2", {"dp_replicate": 2, "dp_shard": 2}, {"recompute": True}),
    ("tp-2-fsdp-2", {"tp": 2, "dp_shard": 2}, {"micro": 4}),
    ("sp-2-cp-2", {"tp": 2, "cp": 2, "sequence_parallel": True}, {}),
    ("pp-2-fsdp-2", {"pp": 2, "dp_shard": 2}, {"micro": 2}),
    ("pp-2-cp-2-interleaved", {"pp": 2, "cp": 2, "schedule": "interleaved-1f1b"}, {"micro": 2}),
    ("pp-2-zero-bubble-fsdp-2", {"pp": 2, "dp_shard": 2, "schedule": "zero-bubble-v"}, {"micro": 1, "model": "untied"}),
    ("pp-2-dualpipe-cp-2", {"pp": 2, "cp": 2, "schedule": "dualpipe-v"}, {"micro": 2, "model": "untied"}),
]
CASES = [
    Case("accumulation", micro=3),
    Case("recompute", micro=4, recompute=True),
    Case("fsdp-2", {"dp_shard": 2}),
    Case("fsdp-2-accumulation", {"dp_shard": 2}, micro=1),
    Case("fsdp-2-recompute", {"dp_shard": 2}, recompute=True),
    Case("fsdp-2-untied", {"dp_shard": 2}, model="untied"),
    Case("fsdp-2-gathered-once", {"dp_shard": 2, "reshard": False}, micro=2),
    Case("fsdp-2-uneven", {"dp_shard": 2}, micro=3, recompute=True),
    Case("tp-2-uneven", {"tp": 2}, micro=3, recompute=True),
    Case("sp-2-uneven", {"tp": 2, "sequence_parallel": True}, micro=5),
    Case("cp-2-uneven", {"cp": 2}, micro=3, model="experts"),
    Case("replicate-2", {"dp_replicate": 2}),
    Case("replicate-2-accumulation", {"dp_replicate": 2}, micro=1, model="untied"),
    Case("pp-2-replicate-2", {"pp": 2, "dp_replicate": 2}, micro=2),
    Case("tp-2-replicate-2", {"tp": 2, "dp_replicate": 2, "sequence_parallel": True}),
    Case("hsdp-2x2", {"dp_replicate": 2, "dp_shard": 2}, micro=1),
    Case("tp-2", {"tp": 2}, micro=4),
    Case("tp-2-untied", {"tp": 2}, model="untied"),
    Case("tp-2-biases", {"tp": 2}, model="gpt2"),
    Case("tp-2-neox", {"tp": 2}, model="neox"),
    Case("tp-2-window", {"tp": 2}, model="window"),
    Case("tp-2-recompute", {"tp": 2}, recompute=True),
    Case("sp-2", {"tp": 2, "sequence_parallel": True}, micro=4),
    Case("sp-2-biases", {"tp": 2, "sequence_parallel": True}, model="gpt2"),
    Case("sp-2-untied-window", {"tp": 2, "sequence_parallel": True}, model="window"),
    Case("tp-4-of-gpt2", {"tp": 4}, model="gpt2"),
    Case("pp-2-gpipe", {"pp": 2, "schedule": "gpipe"}, micro=2),
    Case("pp-2-1f1b", {"pp": 2}, micro=2),
    Case("pp-2-interleaved", {"pp": 2, "schedule": "interleaved-1f1b"}, micro=2),
    Case("pp-2-zero-bubble", {"pp": 2, "schedule": "zero-bubble-v"}, micro=2),
    Case("pp-2-dualpipe", {"pp": 2, "schedule": "dualpipe-v"}, micro=2),
    Case("pp-2-untied", {"pp": 2}, micro=1, model="untied"),
    Case("pp-2-biases", {"pp": 2}, micro=4, model="gpt2"),
    Case("pp-2-uneven", {"pp": 2, "split": (3, 1)}, micro=2),
    Case("pp-2-recompute", {"pp": 2}, micro=2, recompute=True),
    Case("pp-4-fewer-micro-batches", {"pp": 4, "schedule": "gpipe"}, micro=4),
    Case("pp-4-1f1b", {"pp": 4}, micro=2),
    Case("cp-2", {"cp": 2}, micro=4),
    Case("cp-2-window", {"cp": 2}, model="window"),
    Case("cp-2-biases", {"cp": 2}, model="gpt2"),
    Case("cp-4", {"cp": 4}),
    *(Case(f"cp-2-{order}", {"cp": 2, "order": order}, micro=4) for order in ("contiguous", "striped")),
    *(
        Case(f"cp-2-{engine}-{order}", {"cp": 2, "context": engine, "order": order}, micro=4)
        for engine in ("ring", "tokenring", "ulysses")
        for order in ("zigzag", "contiguous", "striped")
    ),
    *(
        Case(f"cp-2-{engine}-window", {"cp": 2, "context": engine, "order": order}, model="window")
        for engine, order in (("ring", "contiguous"), ("tokenring", "striped"), ("ulysses", "zigzag"))
    ),
    *(Case(f"cp-2-{e}-recompute", {"cp": 2, "context": e}, recompute=True) for e in ("ring", "tokenring", "ulysses")),
    Case("cp-4-ring", {"cp": 4, "context": "ring", "order": "contiguous"}, model="window"),
    Case("cp-4-tokenring", {"cp": 4, "context": "tokenring"}),
    Case("cp-4-ulysses", {"cp": 4, "context": "ulysses", "order": "striped"}, model="gpt2"),
    Case("cp-2-tp-2-tokenring", {"cp": 2, "tp": 2, "context": "tokenring"}, micro=4),
    Case("pp-2-tp-2", {"pp": 2, "tp": 2}, micro=2),
    Case("pp-2-sp-2", {"pp": 2, "tp": 2, "sequence_parallel": True}, micro=2),
    Case("pp-2-fsdp-2", {"pp": 2, "dp_shard": 2}, micro=1),
    Case("pp-2-interleaved-fsdp-2", {"pp": 2, "schedule": "interleaved-1f1b", "dp_shard": 2}, micro=2),
    Case("pp-2-zero-bubble-replicate-2", {"pp": 2, "schedule": "zero-bubble-v", "dp_replicate": 2}, micro=2),
    Case("pp-2-zero-bubble-fsdp-2", {"pp": 2, "schedule": "zero-bubble-v", "dp_shard": 2}, micro=2, model="untied"),
    Case("pp-2-cp-2", {"pp": 2, "cp": 2}, micro=2),
    Case("fsdp-2-tp-2", {"dp_shard": 2, "tp": 2}, micro=2),
    Case("fsdp-2-cp-2", {"dp_shard": 2, "cp": 2}, micro=2),
    Case("experts-accumulation", micro=2, model="experts"),
    Case("experts-fsdp-2", {"dp_shard": 2}, model="experts"),
    Case("ep-2", {"dp_shard": 2, "ep": 2}, micro=2, model="experts"),
    Case("ep-2-recompute", {"dp_shard": 2, "ep": 2}, model="experts", recompute=True),
    Case("ep-2-of-cp-2", {"cp": 2, "ep": 2}, model="experts"),
    Case("ep-2-of-fsdp-4", {"dp_shard": 4, "ep": 2}, model="experts"),
    Case("ep-2-hsdp", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, model="experts"),
    Case("ep-2-pp-2", {"pp": 2, "dp_shard": 2, "ep": 2}, micro=2, model="experts"),
    Case("zero-1", {"dp_shard": 2, "state": placed(1, 1)}, micro=1),
    Case("zero-2", {"dp_shard": 2, "state": placed(1)}, micro=1, model="untied"),
    Case("zero-2-of-4", {"dp_shard": 4, "state": placed(1)}, model="gpt2"),
    Case("zero-3", {"dp_shard": 2, "state": placed()}, micro=1),
    Case("one-copy-each", {"dp_shard": 2, "state": placed(1, 1, 1)}, micro=1),
    Case("mics", {"dp_shard": 4, "state": placed(2, 2, 2)}, micro=1),
    Case("second-copy", {"dp_shard": 4, "state": StatePlacement(secondary=2)}, micro=1),
    Case("ladder-1-2-4", {"dp_shard": 4, "state": placed(1, 2)}, micro=1),
    Case("ladder-2-2-4", {"dp_shard": 4, "state": placed(2, 2)}, micro=1),
    Case("ladder-1-2-2-copies", {"dp_shard": 4, "state": placed(1, 2, 2)}, micro=1, model="experts"),
    Case("ladder-of-cp-2", {"dp_shard": 2, "cp": 2, "state": placed(1, 2)}, micro=2),
    Case("zero-2-tp-2", {"dp_shard": 2, "tp": 2, "state": placed(1)}, micro=2),
    Case("zero-1-sp-2", {"dp_shard": 2, "tp": 2, "sequence_parallel": True, "state": placed(1, 1)}, micro=2),
    Case("zero-2-pp-2", {"pp": 2, "dp_shard": 2, "state": placed(1)}, micro=1),
    Case(
        "zero-1-zero-bubble",
        {"pp": 2, "schedule": "zero-bubble-v", "dp_shard": 2, "state": placed(1, 1)},
        micro=2,
        model="untied",
    ),
    Case("zero-2-recompute", {"dp_shard": 2, "state": placed(1)}, recompute=True),
    Case("served-zero-2", {"dp_shard": 2, "state": placed(1), "servers": SERVERS}, micro=2),
    Case("served-mics", {"dp_shard": 4, "state": placed(2, 2, 2), "servers": SERVERS}, micro=2),
    *(Case(f"served-{name}", {**axes, "servers": SERVERS}, **more) for name, axes, more in SERVED),
    *(
        Case(f"served-fsdp-2-{name}", {"dp_shard": 2, "servers": dataclasses.replace(SERVERS, **settings)})
        for name, settings in {"one-stream": {"ping_pong": False}, "cache": {"keep": "cache"}}.items()
    ),
    *(Case(f"tp-2-slices-{k}", {"tp": 2, "tp_slices": k}, micro=4) for k in (2, 4)),
    *(Case(f"sp-2-slices-{k}", {"tp": 2, "sequence_parallel": True, "tp_slices": k}, micro=4) for k in (2, 4)),
    Case("sp-2-slices-recompute", {"tp": 2, "sequence_parallel": True, "tp_slices": 2}, recompute=True),
    Case("sp-2-slices-biases", {"tp": 2, "sequence_parallel": True, "tp_slices": 2}, model="gpt2"),
    Case("tp-2-slices-parallel", {"tp": 2, "tp_slices": 2}, model="window"),
    Case("tp-2-slices-neox", {"tp": 2, "tp_slices": 2}, model="neox"),
    Case("sp-2-slices-fsdp-2", {"tp": 2, "dp_shard": 2, "sequence_parallel": True, "tp_slices": 2}, micro=2),
    Case("sp-2-slices-cp-2", {"tp": 2, "cp": 2, "sequence_parallel": True, "tp_slices": 2}, micro=4),
    Case("tp-4-slices", {"tp": 4, "tp_slices": 4}, model="gpt2"),
    Case("pp-2-early", {"pp": 2, "sends": "early"}, micro=2),
    Case("pp-2-early-gpipe", {"pp": 2, "schedule": "gpipe", "sends": "early"}, micro=2),
    Case("pp-2-early-fsdp-2", {"pp": 2, "dp_shard": 2, "sends": "early"}, micro=1),
    Case("pp-2-early-sp-2-slices", {"pp": 2, "tp": 2, "sequence_parallel": True, "tp_slices": 2, "sends": "early"}, 2),
    Case("pp-4-early", {"pp": 4, "sends": "early"}, micro=2),
    Case("cp-2-sp-2", {"cp": 2, "tp": 2, "sequence_parallel": True}, micro=4),
]
BY_NAME = {case.name: case for case in CASES}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@cache
def one(model: str, dtype: torch.dtype) -> Seen:
    """One process, all rows at once."""
    return perform(0, Case("one", model=model).scene, dtype, STEPS)


@cache
def ran(ranks: int, dtype: torch.dtype) -> dict[str, list[Seen]]:
    """All cases of so many ranks, run in one gang: what each rank saw, by case."""
    cases = [case for case in CASES if case.layout.ranks == ranks]
    if ranks == 1:
        return {case.name: [perform(0, case.scene, dtype, STEPS)] for case in cases}
    found = gang.run(train_all, ranks, cases, dtype)
    return {case.name: [seen[i] for seen in found] for i, case in enumerate(cases)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_layout_is_one_process(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    want, found = one(case.model, dtype), ran(case.layout.ranks, dtype)[name]
    bound = TOLERANCE[dtype]
    # A token whose second and third expert score alike may go to the other one after a rounding of float32.
    compared = STEPS if dtype == torch.float64 or case.model != "experts" else 1
    for seen in found:
        assert seen.losses[:compared] == pytest.approx(want.losses[:compared], rel=bound)
        if dtype == torch.float64:  # in float32 ten steps carry the first rounding further than 1e-5
            assert seen.norms == pytest.approx(want.norms, rel=bound)
    assert all(seen.losses == found[0].losses for seen in found), "every rank tells the same losses"
    covered(found, want, lambda seen: seen.gradients, bound)
    if dtype == torch.float64:
        # Adam divides by the root of what may be nearly nothing, ten times
        covered(found, want, lambda seen: seen.weights, bound * 100)


def covered(found: list[Seen], want: Seen, of: Callable[[Seen], dict], bound: float) -> None:
    """Every value of every tensor is on some rank, and equal."""
    scale = max(np.abs(gradient).max() for _, gradient in want.gradients.values())
    for name, (_, whole) in of(want).items():
        if name in want.gradients and np.abs(want.gradients[name][1]).max() < 1e-6 * scale:
            continue  # a key's bias moves all scores of a query alike: its gradient is zero but for rounding
        left = np.ones(whole.shape, dtype=bool)
        for seen in found:
            if name in of(seen):
                box, piece = of(seen)[name]
                worst = np.abs(piece - whole[box.index]).max(initial=0)
                assert worst <= bound * np.abs(whole).max(), name
                left[box.index] = False
        assert not left.any(), f"nobody holds all of {name}"


@pytest.mark.parametrize("name", ["tp-2", "sp-2", "tp-2-biases"])
def test_whole_parameters_have_bit_equal_gradients_on_all_ranks_of_tp(name: str) -> None:
    first, second = ran(2, torch.float32)[name]
    whole = [n for n, (box, _) in first.gradients.items() if box.lengths == box.whole]
    assert any(n.endswith("norm.weight") for n in whole)
    for n in whole:
        assert np.array_equal(first.gradients[n][1], second.gradients[n][1]), n


def billed(case: Case, axis: str, model: str) -> float:
    """Bytes over an axis in one step, over both kinds of models."""
    found = gang.run(train_all, case.layout.ranks, [Case(case.name, case.axes, case.micro, model)], torch.float32, 1)
    return sum(size for (over, _), (_, size) in found[0][0].bills.items() if over == axis)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_sends_what_the_formula_says(sequence_parallel: bool) -> None:
    """8 b s h (t - 1) / t values per block and micro-batch (Narayanan et al. 2021): the difference that blocks make."""
    axes = {"tp": 2, **({"sequence_parallel": True} if sequence_parallel else {})}
    case = Case("bill", axes, micro=4)
    deep, shallow = (billed(case, "tp", model) for model in ("untied", "untied-2"))
    per_block = 8 * 4 * LENGTH * 32 * (2 - 1) / 2 * 4  # micro-batches of 4 rows, float32
    norms = 2 * 2 * 32 * 4 * (2 - 1) / 2 if sequence_parallel else 0.0  # two norms' gradients, once a step
    assert deep - shallow == 2 * (2 * per_block + norms)


def test_a_pipeline_sends_hidden_states_forward_and_their_gradients_back() -> None:
    """b s h values each way per micro-batch and boundary, v times as many when interleaved."""
    boundary = 2 * LENGTH * 32 * 4 * 4  # rows of a micro-batch, tokens, width, bytes, micro-batches
    assert billed(Case("bill", {"pp": 2}, micro=2), "pp", "untied") == boundary
    interleaved = Case("bill", {"pp": 2, "schedule": "interleaved-1f1b"}, micro=2)
    # rank 0 holds stages 0 and 2: forward from both, the gradient of stage 2 back
    assert billed(interleaved, "pp", "untied") == 3 * boundary


def test_fsdp_gathers_twice_and_scatters_once() -> None:
    parameters = sum(torch.Size(shape).numel() for _, shape in MODELS["untied"].shapes())
    blocks = sum(torch.Size(s).numel() for name, s in MODELS["untied"].shapes() if name.startswith("blocks"))
    half = 4 * (2 - 1) / 2
    found = gang.run(train_all, 2, [Case("bill", {"dp_shard": 2}, model="untied")], torch.float32, 1)
    bills = found[0][0].bills
    # tables of 257 rows are padded to 258
    padded = 2 * 32
    assert bills["fsdp", "reduce-scatter"][1] == half * (parameters + padded)
    assert bills["fsdp", "all-gather"][1] == half * (parameters + padded + blocks)


def test_data_parallel_sends_each_gradient_twice() -> None:
    """2 P (d - 1) / d values a step, as an all-reduce."""
    parameters = sum(torch.Size(shape).numel() for _, shape in MODELS["untied"].shapes())
    found = gang.run(train_all, 2, [Case("bill", {"dp_replicate": 2}, model="untied")], torch.float32, 1)
    assert found[0][0].bills["dp_replicate", "all-reduce"][1] == 2 * 4 * parameters * (2 - 1) / 2


def gathers_by_the_step(case: Case) -> bool:
    """Whether FSDP's gathers follow from the micro-batches: torch's schedules order those of several stages."""
    return not (case.layout.held > 1 and case.layout.size("fsdp") > 1)


@pytest.mark.parametrize("name", [c.name for c in CASES if c.layout.ranks > 1 and gathers_by_the_step(c)])
def test_the_bill_is_what_the_formulas_say(name: str) -> None:
    case = BY_NAME[name]
    layout = case.layout
    work = case.scene.work(value_bytes=4)
    for rank, seen in enumerate(ran(layout.ranks, torch.float32)[name]):
        sent = seen.sent(STEPS)
        facts = {axis: sent.pop(axis, 0.0) for axis in ("world", "batch")}
        for axis in UNPLANNED:
            sent.pop(axis, None)
        assert sent == pytest.approx(traffic(MODELS[case.model], layout, rank, work)), f"rank {rank}"
        assert max(facts.values()) < 100, "counts, the loss and the norm are a few numbers"
