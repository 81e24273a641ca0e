"""Optimizers whose moments are coded between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lmworks.core.errors import CheckpointError
from lmworks.methods.coat.states import Coat, Eight
from lmworks.methods.megascale import Lamb
from lmworks.methods.sophia import Sophia
from lmworks.train.codec import CodedUpdate, Exact, buckets, gathered, run_of, spread, unpacked
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import SGD, AdamW, Lion, Muon
from lmworks.train.probe import Probe
from lmworks.train.slots import Optimizer, Update


class Toy(nn.Module):
    """Names as a decoder has them; sizes that are and are not whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 24)
        self.blocks = nn.ModuleDict({"0": nn.Linear(24, 128), "1": nn.Linear(128, 33)})
        self.norm = nn.LayerNorm(33, bias=False)
        self.head = nn.Linear(33, 7, bias=False)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def run(model: nn.Module, update: Update, steps: range, *, double: bool = False) -> dict[str, float]:
    """Steps with the same made-up gradients for everybody; the last step's notes."""
    probe = Probe(model, CrossEntropy(), seed=0)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 0.1
        probe.begin()
        update.step(probe)
    return probe.notes()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


PLAIN: list[Optimizer] = [
    AdamW(lr=1e-2),
    Lion(lr=1e-3),
    SGD(lr=1e-2, momentum=0.9),
    Muon(lr=1e-2),
    Lamb(lr=1e-2),
]


@pytest.mark.parametrize("settings", PLAIN, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("bucket", [1, 4000, 1 << 24])
def test_a_codec_that_passes_through_changes_nothing(settings: Optimizer, bucket: int) -> None:
    ours, theirs = toy(), toy()
    run(ours, CodedUpdate(settings.build(ours), Exact(), bucket=bucket), range(50))  # type: ignore[arg-type]  # enough of a model
    run(theirs, settings.build(theirs), range(50))  # type: ignore[arg-type]
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=0, atol=1e-6)


def coat(around: Optimizer, **settings: Any) -> tuple[Toy, CodedUpdate]:
    model = toy()
    update = Coat(around=around, **settings).build(model)  # type: ignore[arg-type]
    assert isinstance(update, CodedUpdate)
    return model, update


@pytest.mark.parametrize("settings", PLAIN, ids=lambda o: type(o).__name__)
def test_what_is_coded_follows_the_exact_optimizer(settings: Optimizer) -> None:
    """Codes carry 3 bits: weights move as they would, to a few percent of the way that they went."""
    ours, update = coat(settings)
    theirs = toy()
    start = weights(theirs)
    run(ours, update, range(20))
    run(theirs, settings.build(theirs), range(20))  # type: ignore[arg-type]
    for name in start:
        way = float((weights(theirs)[name] - start[name]).norm())
        assert float((weights(ours)[name] - weights(theirs)[name]).norm()) < 0.25 * way


def test_moments_stay_coded_between_steps_and_take_less_than_a_third() -> None:
    model, update = coat(AdamW(lr=1e-2))
    run(model, update, range(3))
    values = sum(p.numel() for p in model.parameters())
    assert not [x for o in update.optimizers() for s in o.state.values() for x in s.values() if x.ndim]
    kept = {name: x for name, x in update.state().items() if name.endswith(".codes")}
    assert {x.dtype for x in kept.values()} == {torch.float8_e4m3fn}
    assert sum(x.nbytes for x in kept.values()) == 2 * values
    assert update.held_bytes() <= 0.30 * 8 * values
    exact = AdamW(lr=1e-2).build(model)  # type: ignore[arg-type]
    run(model, exact, range(1))
    assert exact.held_bytes() == 8 * values + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("settings", PLAIN, ids=lambda o: type(o).__name__)
def test_going_on_from_a_checkpoint_is_bitwise_the_unbroken_run(settings: Optimizer, shadow: bool) -> None:
    if shadow and isinstance(settings, Lamb):
        pytest.skip("refused in a recipe")
    whole, unbroken = coat(settings, shadow=shadow)
    run(whole, unbroken, range(7))
    first, update = coat(settings, shadow=shadow)
    run(first, update, range(4))
    second, resumed = coat(settings, shadow=shadow)
    second.load_state_dict(first.state_dict())
    resumed.load(update.state())
    before = {name: x.clone() for name, x in update.state().items()}
    assert {name: x.dtype for name, x in resumed.state().items()} == {name: x.dtype for name, x in before.items()}
    run(second, resumed, range(4, 7))
    assert all(torch.equal(x, weights(second)[name]) for name, x in weights(whole).items())
    for name, x in unbroken.state().items():
        assert torch.equal(x.double(), resumed.state()[name].double()), name


def test_state_of_another_codec_is_refused() -> None:
    model, update = coat(AdamW(lr=1e-2))
    run(model, update, range(2))
    for other in (coat(AdamW(lr=1e-2), expand=False), coat(AdamW(lr=1e-2), second="e5m2")):
        with pytest.raises(CheckpointError, match="codec settings"):
            other[1].load(update.state())
    with pytest.raises(CheckpointError, match="not coded"):
        coat(AdamW(lr=1e-2))[1].load({})


def test_the_shadow_has_the_exact_moments_and_moves_no_weight() -> None:
    plain = toy()
    exact = AdamW(lr=1e-2).build(plain)  # type: ignore[arg-type]
    run(plain, exact, range(5))
    ours, with_shadow = coat(AdamW(lr=1e-2), shadow=True)
    alone, without = coat(AdamW(lr=1e-2))
    notes = run(ours, with_shadow, range(5))
    run(alone, without, range(5))
    assert all(torch.equal(a, b) for a, b in zip(weights(ours).values(), weights(alone).values(), strict=True))
    moments = {name: x for name, x in exact.state().items() if not name.endswith("/step")}
    for name, x in moments.items():
        torch.testing.assert_close(with_shadow.state()[f"{name}.shadow"], x)
    assert set(notes) == {"codec/first_error", "codec/second_error", "codec/direction_error"}
    assert 0 < notes["codec/first_error"] < 0.05
    rough, loose = coat(AdamW(lr=1e-2), shadow=True, expand=False)
    assert run(rough, loose, range(5))["codec/direction_error"] > notes["codec/direction_error"]


@pytest.mark.parametrize("shape", [(6, 128), (5, 24), (3, 4, 96), (100,), (1,), (7, 33)])
def test_codes_can_be_cut_and_joined(shape: tuple[int, ...]) -> None:
    codec = Eight(Coat(around=AdamW(lr=1.0), group=64))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    code = codec.encode(x, 0)
    laid_out = spread(codec, code)
    back = gathered(codec, laid_out)
    assert back is not None
    assert all(torch.equal(back[name].float(), part.float()) for name, part in code.items())
    run = run_of(codec, shape)
    assert laid_out["scale"].shape == (*shape[:-1], shape[-1] // run)
    value = unpacked(codec, code)
    for i in range(shape[0]):  # any row comes back by itself
        part = {name: y[i : i + 1] for name, y in laid_out.items()}
        wide = {
            n: y.repeat_interleave(part["codes"].shape[-1] // y.shape[-1], -1) for n, y in part.items() if n != "codes"
        }
        torch.testing.assert_close(codec.decode(part["codes"], wide), value[i : i + 1], rtol=0, atol=0)


def test_codes_of_another_cut_are_noticed() -> None:
    codec = Eight(Coat(around=AdamW(lr=1.0), group=64))
    halves = [
        spread(codec, codec.encode(torch.randn(1, 96, generator=torch.Generator().manual_seed(s)), 0)) for s in (1, 2)
    ]
    joined = {
        name: torch.cat([half[name].view(torch.uint8) if name == "codes" else half[name] for half in halves])
        for name in halves[0]
    }
    joined["codes"] = joined["codes"].view(torch.float8_e4m3fn)
    assert gathered(codec, joined) is None


def test_buckets_hold_what_they_may() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 9, 1, 1)]
    assert [[p.numel() for p in part] for part in buckets(parameters, 7)] == [[3, 4], [9], [1, 1]]


def test_sophia_is_stepped_whole() -> None:
    model = toy()
    update = Coat(around=Sophia(lr=1e-3)).build(model)  # type: ignore[arg-type]
    assert isinstance(update, CodedUpdate)
    assert update._bucket is None
