"""Spans nest, their own seconds add up, and what is written fast is what is written slowly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.events import Events
from lmworks.core.journal import rows
from lmworks.core.spans import BESIDE, HostClock, Span, Spans, sums


def tree(draw: st.DrawFn, start: float, end: float, depth: int) -> list[Span]:
    """A span and random ones inside it, that do not overlap each other."""
    found = [Span(draw(st.sampled_from("abc")), "main", start, end)]
    cuts = sorted(draw(st.lists(st.floats(start, end), max_size=4, unique=True))) if depth else []
    for left, right in zip(cuts[::2], cuts[1::2], strict=False):
        found += tree(draw, left, right, depth - 1)
    return found


@st.composite
def trees(draw: st.DrawFn) -> list[Span]:
    return tree(draw, 0.0, 8.0, 3)


def slowly(spans: list[Span]) -> dict[str, float]:
    """Own seconds by a walk over all moments between two borders: the innermost span has them."""
    borders = sorted({edge for span in spans for edge in (span.start, span.end)})
    found = dict.fromkeys((span.name for span in spans), 0.0)
    for left, right in pairwise(borders):
        around = [span for span in spans if span.start <= left and span.end >= right]
        if around:
            # of two of one length the one that was recorded later
            found[min(reversed(around), key=lambda span: span.end - span.start).name] += right - left
    return found


@given(trees())
def test_own_seconds_are_those_of_the_innermost_span(spans: list[Span]) -> None:
    found, want = sums(spans), slowly(spans)
    assert set(found) == set(want)
    for name, seconds in want.items():
        assert abs(found[name].seconds - seconds) < 1e-9
    assert abs(sum(entry.seconds for entry in found.values()) - 8.0) < 1e-9


def test_what_goes_on_beside_is_taken_from_nobody() -> None:
    found = sums(
        [Span("work", "main", 0, 4), Span("sum", BESIDE, 1, 3, 64, True, 1), Span("sum", BESIDE, 2, 5, 64, True)]
    )
    assert found["work"].seconds == 4
    assert (found["sum"].calls, found["sum"].seconds, found["sum"].bytes, found["sum"].exchange) == (2, 5, 128, True)


def test_recorded_spans_nest_and_what_goes_on_stays() -> None:
    spans = Spans()
    spans.on = True
    going = spans.span("outer", number=3)
    going.__enter__()
    with spans.span("inner", exchange=True, bytes=12.0):
        assert spans.doing() == ["outer 3", "inner"]
    (inner,) = (each.read() for each in spans.take())
    assert (inner.name, inner.bytes, inner.exchange) == ("inner", 12, True)
    assert spans.doing() == ["outer 3"]
    going.__exit__()
    (outer,) = (each.read() for each in spans.take())
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert spans.take() == []


def test_nothing_is_recorded_while_it_is_off() -> None:
    spans = Spans()
    with spans.span("work"):
        assert spans.doing() == []
    assert spans.take() == []


def test_a_clock_has_its_skew_and_counts_on_by_the_monotonic_one() -> None:
    plain, ahead = HostClock(), HostClock(skew=1.0)
    assert 0.9 < ahead.now() - plain.now() < 1.1
    mark = plain.mark()
    assert plain.at(mark) <= plain.now()


@settings(max_examples=25)
@given(
    st.text(max_size=8),
    st.floats(0, 2e9, allow_nan=False),
    st.integers(0, 10**12),
    st.booleans(),
    st.none() | st.integers(0, 99),
)
def test_the_fast_line_says_what_the_slow_one_does(
    name: str, start: float, size: int, exchange: bool, number: int | None
) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        fast, slow = (Events(Path(folder) / kind, run='r"ä', rank=3, axes={"pp": 1}) for kind in ("fast", "slow"))
        fast.spans([Span(name, "main", start, start + 1.5, size, exchange, number)], step=7)
        slow.step = 7
        attrs = ({"exchange": True} if exchange else {}) | ({} if number is None else {"number": number})
        slow.write(name, start=start, end=start + 1.5, bytes=size, **attrs)
        fast.flush()
        slow.flush()
        assert list(rows(Path(folder) / "fast")) == list(rows(Path(folder) / "slow"))
        (row,) = rows(Path(folder) / "fast")
        assert tuple(row) == ("run", "step", "rank", "axes", "stream", "name", "start", "end", "bytes", "attrs")
