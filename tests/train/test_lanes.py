"""Copies between a device and the memory that files are written from."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lmworks.core.errors import LmworksError
from lmworks.train.backends import Disk, Host
from lmworks.train.lanes import CHUNK, PAGE, Lane, moment
from lmworks.train.ledger import Ledger
from lmworks.train.offload import TensorCache
from tests.train.test_offload import gradients, weights


def test_every_thread_has_a_buffer_that_starts_at_a_page() -> None:
    lane, found = Lane(), list[torch.Tensor]()
    threads = [threading.Thread(target=lambda: found.append(lane.buffer)) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    found.append(lane.buffer)
    assert len({buffer.data_ptr() for buffer in found}) == 4
    assert all(buffer.data_ptr() % PAGE == 0 and buffer.nbytes == CHUNK for buffer in found)
    assert lane.buffer is found[-1]


def test_on_a_cpu_there_is_nothing_to_wait_for() -> None:
    assert moment(torch.device("cpu")) is None
    source, out = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    Lane().copy(source, out, None)
    assert torch.equal(source, out)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_gradients_on_a_gpu_are_those_of_plain_training(kind: str, tmp_path: Path) -> None:
    offload = TensorCache(Host() if kind == "host" else Disk([tmp_path]), Ledger(), least=0, threads=2, ahead="block")
    matrices = [torch.nn.Parameter(w.detach().cuda()) for w in weights()]
    expected = gradients(matrices, None, device="cuda")
    for _ in range(10):
        found = gradients(matrices, offload, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert (offload.live, offload.ledger.total) == (0, 0)
    offload.close()


@pytest.mark.gpu
def test_a_copy_waits_for_its_moment_and_the_stream_that_computes_for_no_copy() -> None:
    device = torch.device("cuda")
    source, host = torch.zeros(1 << 20, dtype=torch.uint8, device=device), torch.ones(1 << 20, dtype=torch.uint8)
    torch.cuda._sleep(100_000_000)
    source.fill_(7)
    ready = moment(device)
    torch.cuda._sleep(2_000_000_000)
    done = moment(device)
    Lane().copy(source, host, ready)
    assert not done.query(), "what computes is still at work"
    assert bool((host == 7).all())
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_cuda_graph_is_refused() -> None:
    offload = TensorCache(Host(), Ledger(), least=0, threads=1, ahead="block")
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(LmworksError, match="CUDA graph"), graph, offload.block("0"):
        (x * 2.0).square()
    offload.close()
