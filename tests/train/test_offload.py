"""The books of saved bytes, and saved tensors that leave memory."""

import gc
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lmworks.core.errors import LmworksError
from lmworks.train.backends import Disk, Host, Slot
from lmworks.train.ledger import Ledger, counted_beside
from lmworks.train.offload import TensorCache

WIDTH, ROWS, BLOCKS = 64, 128, 5
SQUARE = ROWS * WIDTH * 4


@pytest.fixture(params=["host", "disk"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Host | Disk:
    return Host() if request.param == "host" else Disk([tmp_path / "a", tmp_path / "b"])


@pytest.fixture(params=["block", "chunk", "off"])
def offload(request: pytest.FixtureRequest, backend: Host | Disk) -> Iterator[TensorCache]:
    cache = TensorCache(backend, Ledger(), least=0, threads=2, ahead=request.param)
    yield cache
    cache.close()


def weights() -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(WIDTH, WIDTH, generator=source) / 8) for _ in range(BLOCKS)]


def one(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return torch.nn.functional.silu(y) * y + torch.relu(y)


def gradients(
    matrices: list[nn.Parameter],
    offload: TensorCache | None,
    *,
    micros: int = 1,
    again: bool = False,
    device: str = "cpu",
) -> Any:
    """All weights' gradients after some micro-batches."""
    for w in matrices:
        w.grad = None
    for micro in range(micros):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(micro), device="cpu").to(device)
        if offload is not None:
            offload.begin()
        for i, w in enumerate(matrices):
            form = (lambda x, w: checkpoint(one, x, w, use_reentrant=False)) if again else one
            if offload is None:
                x = form(x, w)
            else:
                with offload.block(str(i)):
                    x = form(x, w)
        x.square().mean().backward()
    return [w.grad.clone() for w in matrices if w.grad is not None]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("micros", [1, 3])
def test_gradients_are_those_of_plain_training_to_the_bit(offload: TensorCache, micros: int, again: bool) -> None:
    matrices = weights()
    expected = gradients(matrices, None, micros=micros)
    for _ in range(5):
        found = gradients(matrices, offload, micros=micros, again=again)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert offload.live == 0
    assert offload.ledger.total == 0


def test_a_tensor_that_is_saved_three_times_goes_out_once(offload: TensorCache) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
    with offload.block("0"):
        y = x * x + x.square()
    offload.settle()
    assert offload.facts.stored == SQUARE
    y.sum().backward()
    assert offload.live == 0


def test_parts_of_one_packed_tensor_come_back_each_as_it_was(offload: TensorCache) -> None:
    packed = torch.randn(ROWS, 3 * WIDTH, requires_grad=True)
    plain = packed.detach().clone().requires_grad_()
    for source, inside in ((packed, True), (plain, False)):
        whole = source * 1.0
        q, k, v = whole.split(WIDTH, dim=1)
        if inside:
            with offload.block("0"):
                out = (q * k).tanh() * v
            del q, k, v, whole
            offload.settle()
        else:
            out = (q * k).tanh() * v
        out.sum().backward()
    assert torch.equal(packed.grad, plain.grad)  # type: ignore[arg-type]


def test_an_address_that_is_used_again_is_another_storage(offload: TensorCache) -> None:
    for i in range(200):
        x = torch.full((ROWS,), float(i), requires_grad=True)
        with offload.block("0"):
            y = (x * 1.0).square()
        if i % 2:
            offload.settle()
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((ROWS,), 2.0 * i))  # type: ignore[arg-type]
        offload.begin()
    assert offload.live == 0


@pytest.mark.parametrize("late", [False, True])
def test_an_edit_in_place_after_the_save_is_an_error(offload: TensorCache, late: bool) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    hidden = x * 1.0
    with offload.block("7"):
        y = hidden.square()
    if late:
        offload.settle()
    hidden.data.add_(0)  # does not count as an edit
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="saved in block 7"):
        y.sum().backward()


def test_backward_can_be_made_twice_where_the_graph_is_kept(offload: TensorCache) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with offload.block("0"):
        y = (x * 1.0).square().sum()
    offload.settle()
    y.backward(retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    y.backward()
    assert torch.equal(x.grad, 2 * first)  # type: ignore[arg-type]


def test_gradients_of_gradients_find_their_tensors(offload: TensorCache) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    found = []
    for inside in (False, True):
        with offload.block("0") if inside else nullcontext():
            y = (x * 2.0).tanh().square()
        offload.settle()
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*found)


class Slow(Host):
    """Takes its time to write, and counts what is read."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.read = seconds, 0

    def store(self, values: Tensor, ready: Any = None) -> Tensor:
        time.sleep(self.seconds)
        return super().store(values, ready)

    def load(self, slot: Tensor, out: Tensor, ready: Any = None) -> None:
        self.read += 1
        super().load(slot, out, ready)


def test_what_is_still_being_written_is_taken_from_memory() -> None:
    backend = Slow(0.1)
    offload = TensorCache(backend, Ledger(), least=0, threads=1, ahead="block")
    matrices = weights()
    expected = gradients(matrices, None)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(matrices, offload), strict=True))
    assert backend.read == 0
    assert offload.facts.forwarded > 0
    offload.close()
    assert offload.live == 0


class Stuck(Host):
    """Writes nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def store(self, values: Tensor, ready: Any = None) -> Tensor:
        self.may.wait()
        return super().store(values, ready)


def test_a_disk_that_falls_behind_gets_no_more_than_may_wait() -> None:
    backend = Stuck()
    offload = TensorCache(backend, Ledger(), least=0, threads=1, ahead="block", most_waiting=2 * SQUARE)
    matrices = weights()
    expected = gradients(matrices, None)
    with pytest.warns(UserWarning, match=f"{SQUARE} bytes of block . stay in memory: .* wait for their write") as told:
        found = gradients(matrices, offload)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(told) == 1, "it is told once"
    assert offload.facts.forwarded == 2 * SQUARE
    assert offload.facts.kept >= (BLOCKS - 1) * SQUARE
    backend.may.set()
    offload.close()
    assert (offload.live, offload.waiting) == (0, 0)


def test_a_write_that_is_called_off_holds_no_memory() -> None:
    """The queue of a slow disk may be long: it must not keep tensors alive that nobody needs any more."""
    backend = Stuck()
    offload = TensorCache(backend, Ledger(), least=0, threads=1, ahead="block")
    with offload.block("0"):
        a = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
        b = a.sin()
        c = b.sin()
        d = c.sin()
    held = [StorageWeakRef(x.untyped_storage()) for x in (a, b, c)]  # type: ignore[no-untyped-call]
    d.sum().backward()
    del a, b, c, d
    assert [ref.expired() for ref in held[1:]] == [True, True], "the first one is being written"
    backend.may.set()
    offload.close()
    assert held[0].expired()


class Torn(Disk):
    """Loses what was written."""

    def load(self, slot: Slot, out: Tensor, ready: Any = None) -> None:
        os.ftruncate(self._files[slot.file]._file, 0)
        super().load(slot, out, ready)


def test_what_cannot_be_read_back_is_an_error_for_people(tmp_path: Path) -> None:
    offload = TensorCache(Torn([tmp_path]), Ledger(), least=0, threads=1, ahead="off")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with offload.block("3"):
        y = (x * 1.0).square()
    offload.settle()
    with pytest.raises(LmworksError, match=r"block 3 cannot be read back: .*missing from its file"):
        y.sum().backward()
    offload.close()


def test_threads_start_with_the_first_tensor_that_goes_out(backend: Host | Disk) -> None:
    offload = TensorCache(backend, Ledger(), least=1 << 20, threads=2, ahead="block")
    gradients(weights(), offload)
    assert offload._pools is None, "a process that is forked now inherits no thread"
    offload.least = 0
    gradients(weights(), offload)
    assert [t for t in threading.enumerate() if t.name.startswith("offload")]
    offload.close()


class Full(Host):
    """A disk with no room."""

    def store(self, values: Tensor, ready: Any = None) -> Tensor:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_stays_and_is_told_once() -> None:
    offload = TensorCache(Full(), Ledger(), least=0, threads=2, ahead="block")
    matrices = weights()
    expected = gradients(matrices, None)
    with pytest.warns(UserWarning, match="No space left"):
        found = gradients(matrices, offload)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not told again
        found = gradients(matrices, offload)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    offload.close()


def test_an_error_in_the_forward_pass_leaves_no_file_and_no_thread(tmp_path: Path) -> None:
    offload = TensorCache(Disk([tmp_path]), Ledger(), least=0, threads=2, ahead="block")

    def fails() -> None:
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        with offload.block("0"):
            (x * 1.0).square()
            raise ValueError("in the forward pass")

    with pytest.raises(ValueError, match="forward"):
        fails()
    gc.collect()
    assert offload.live == 0
    offload.close()
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("offload")]


def test_a_file_is_no_larger_than_what_waits_at_one_time(tmp_path: Path) -> None:
    disk = Disk([tmp_path])
    offload = TensorCache(disk, Ledger(), least=0, threads=2, ahead="block")
    matrices = weights()
    sizes = []
    for _ in range(6):
        gradients(matrices, offload)
        sizes.append(disk.nbytes)
    assert sizes[-1] <= BLOCKS * 6 * SQUARE
    offload.close()


def test_the_books_count_each_storage_once_and_no_weight() -> None:
    ledger = Ledger()
    w = weights()[0]
    with ledger.counting("block"):
        x = torch.randn(ROWS, WIDTH)
        y = x @ w  # keeps x
        z = y * y + torch.relu(y)  # keeps y, and relu's result
    assert ledger.total == ledger.live["block"] == 3 * SQUARE
    ledger.begin()
    z.sum().backward()
    assert (ledger.total, ledger.peak, ledger.at_peak) == (0, 3 * SQUARE, {"block": 3 * SQUARE})


def test_the_books_know_what_is_recomputed() -> None:
    ledger, matrices = Ledger(), weights()

    def contexts(name: str) -> tuple[Any, Any]:
        return nullcontext(), counted_beside(ledger, name)

    def run(again: bool) -> tuple[int, dict[str, int]]:
        ledger.begin()
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
        for i, w in enumerate(matrices):
            with ledger.counting(str(i)):
                x = (
                    checkpoint(one, x, w, use_reentrant=False, context_fn=partial(contexts, str(i)))
                    if again
                    else one(x, w)
                )
        with ledger.counting():
            loss = x.sum()
        loss.backward()
        return ledger.peak, ledger.at_peak

    kept, _ = run(False)
    recomputed, where = run(True)
    assert ledger.total == 0
    inside = kept // BLOCKS
    assert inside < recomputed < 0.6 * kept
    assert where[str(BLOCKS - 1)] >= inside - SQUARE
