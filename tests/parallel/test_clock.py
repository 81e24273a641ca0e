"""A GPU's marks lie on the host's clock, in order, and name their streams."""

from __future__ import annotations

import time

import pytest
import torch

from lmworks.core.spans import MAIN, HostClock, Spans
from lmworks.parallel.clock import GpuClock, align, clock_of
from lmworks.parallel.wire import alone


def test_a_cpu_has_the_hosts_clock_and_one_rank_is_aligned() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    found = align(alone(), lambda: 5.0)
    assert (found.seconds, found.error, found.at) == (0.0, 0.0, 5.0)


@pytest.mark.gpu
def test_marks_of_a_gpu_lie_on_the_hosts_clock() -> None:
    device = torch.device("cuda", 0)
    clock = GpuClock(device)
    x = torch.randn(2048, 2048, device=device)
    before = clock.now()
    start = clock.mark()
    for _ in range(50):
        x = x @ x / 2048
    end = clock.mark()
    torch.cuda.synchronize()
    after = clock.now()
    assert before - 5e-3 < clock.at(start) < clock.at(end) < after + 5e-3
    assert clock.between(start, end) == pytest.approx(clock.at(end) - clock.at(start), abs=1e-5)


@pytest.mark.gpu
def test_spans_of_a_gpu_are_read_a_step_later_and_name_their_stream() -> None:
    device = torch.device("cuda", 0)
    spans = Spans(GpuClock(device))
    spans.on = True
    assert spans.clock.behind == 1
    beside = torch.cuda.Stream()
    with spans.span("forward"):
        torch.cuda._sleep(10_000_000)
    with torch.cuda.stream(beside), spans.span("fsdp all-gather", exchange=True):
        torch.cuda._sleep(1_000_000)
    begun = time.perf_counter()
    taken = spans.take()
    assert time.perf_counter() - begun < 1e-2, "nothing is waited for"
    forward, gather = (each.read() for each in taken)
    assert (forward.stream, gather.stream.split()[0]) == (MAIN, "stream")
    assert forward.end - forward.start > gather.end - gather.start > 0
