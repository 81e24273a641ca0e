"""One reader for several: what is taken is what was laid out, in order; each reads for itself when that ends."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.data import sharing
from lmworks.data.load import Batch, Loader
from lmworks.data.pack import Stream
from lmworks.data.sharing import ENDED, Board, Reading, Taking, clear_away
from tests.data.test_load import SOURCES, WEIGHTS
from tests.data.toy import loader


def batch(number: int, rows: int, length: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(*(torch.randint(0, 2**40, (rows, length), generator=generator) for _ in range(5)))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in sharing.TENSORS)


def never() -> Batch:
    raise AssertionError("it was to be taken")


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12), readers=st.integers(1, 3), slots=st.integers(1, 4))
def test_what_is_taken_is_what_was_laid_out(
    sizes: list[int], readers: int, slots: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("board") / "b"
    board = Board.make(path, readers=readers, room=5 * 5 * 6, slots=slots)
    taking = [Taking(Board.find(path, place), place) for place in range(readers)]
    assert board.here.all()
    path.unlink()
    with ThreadPoolExecutor(readers) as pool:
        found = [pool.submit(lambda t=t: [t(i, never) for i in range(len(sizes))]) for t in taking]
        reading = Reading(board)
        laid = [reading(i, lambda i=i, rows=rows: batch(i, rows)) for i, rows in enumerate(sizes)]
    for taken in found:
        assert all(same(ours, theirs) for ours, theirs in zip(taken.result(), laid, strict=True))
    assert board.taken.tolist() == [len(sizes)] * readers


def test_memory_that_is_not_there_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Board.make(tmp_path / "gone" / "b", readers=1, room=10)
    with pytest.raises(OSError, match=r"."):
        Board.make(tmp_path / "b", readers=1, room=1 << 55)
    assert not list(tmp_path.iterdir())


def test_full_memory_is_an_error_before_anything_is_written(little_room: Path) -> None:
    """And no signal that kills, when a page that is not there is touched."""
    with pytest.raises(OSError, match="No space left"):
        Board.make(little_room / "b", readers=1, room=1 << 16)
    assert not list(little_room.iterdir())
    Board.make(little_room / "b", readers=1, room=1 << 8)


def test_bytes_that_are_not_those_laid_out_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is seen before what it stands for."""
    monkeypatch.setattr(sharing, "PATIENCE", 0.02)
    board = Board.make(tmp_path / "b", readers=1, room=100)
    other = Board.find(tmp_path / "b", 0)
    assert board.lay(0, batch(0, 2))
    board.values[0, 3] ^= 1
    assert other.take(0, 0) is None
    board.values[0, 3] ^= 1
    taken = other.take(0, 0)
    assert taken is not None
    assert same(taken, batch(0, 2))


def test_whoever_waits_too_long_reads_for_itself_and_so_do_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PATIENCE", 0.02)
    board = Board.make(tmp_path / "b", readers=2, room=100, slots=1)
    first, second = (Taking(Board.find(tmp_path / "b", i), i) for i in range(2))
    reading = Reading(board)
    assert same(reading(0, lambda: batch(0, 2)), batch(0, 2))
    assert same(first(0, never), batch(0, 2))
    assert same(reading(1, lambda: batch(1, 2)), batch(1, 2)), "the second one does not take"
    assert board.state == ENDED
    assert same(first(1, lambda: batch(1, 2)), batch(1, 2))
    assert same(second(0, never), batch(0, 2)), "what lies there may still be taken"
    assert same(second(1, lambda: batch(1, 2)), batch(1, 2))


def test_a_batch_that_does_not_fit_is_read_by_each(tmp_path: Path) -> None:
    board = Board.make(tmp_path / "b", readers=1, room=5 * 5 * 2)
    taking, reading = Taking(Board.find(tmp_path / "b", 0), 0), Reading(board)
    assert same(reading(0, lambda: batch(0, 3)), batch(0, 3))
    assert same(taking(0, lambda: batch(0, 3)), batch(0, 3))


class Shared:
    """Loaders over the same rows, of which the first one reads for the others."""

    def __init__(self, folder: Path, others: int, prefetch: int, room: int = 5 * 4 * 8) -> None:
        board = Board.make(folder / "b", readers=others, room=room)
        taking = [Taking(Board.find(folder / "b", i), i) for i in range(others)]
        self.loaders = [
            loader(SOURCES, weights=WEIGHTS, prefetch=prefetch, sharing=how) for how in (Reading(board), *taking)
        ]

    def each(self, what: Callable[[Loader], object]) -> list[object]:
        """Called on all of them at once, as by processes."""
        with ThreadPoolExecutor(len(self.loaders)) as pool:
            return list(pool.map(what, self.loaders))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_loaders_that_share_draw_what_each_would_draw(
    prefetch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows and the same state after each draw; tokens are read by one of them."""
    readers: set[int] = set()
    plain = Stream.windows

    def windows(self: Stream, *words: object) -> object:
        readers.add(id(self))
        return plain(self, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Stream, "windows", windows)
    shared, alone = Shared(tmp_path, 2, prefetch), loader(SOURCES, weights=WEIGHTS)
    read = {id(stream) for stream in (*shared.loaders[0]._streams, *alone._streams)}
    for rows in [3] * 12:
        want = alone.draw(rows)
        assert all(same(found, want) for found in shared.each(lambda one, rows=rows: one.draw(rows)))  # type: ignore[arg-type]
        assert all(one.state() == alone.state() for one in shared.loaders)
    assert readers <= read, "the others read nothing"
    shared.each(Loader.close)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_another_size_or_another_place_ends_what_is_shared_and_changes_no_row(prefetch: int, tmp_path: Path) -> None:
    for how in ("size", "place"):
        (folder := tmp_path / how).mkdir()
        shared, alone = Shared(folder, 2, prefetch), loader(SOURCES, weights=WEIGHTS)
        begin = alone.state()
        for rows in (3, 3, 5 if how == "size" else 3, 2, 2):
            if how == "place" and rows == 2:
                alone.load(begin)
                shared.each(lambda one, begin=begin: one.load(begin))
            want = alone.draw(rows)
            found = shared.each(lambda one, rows=rows: one.draw(rows))
            assert all(same(one, want) for one in found)  # type: ignore[arg-type]
        shared.each(Loader.close)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_shows_in_the_draw_that_it_is_of_on_everyone(
    prefetch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token file that cannot be read at row 9: the third draw of four; the state is still that of the second."""
    plain = Stream.windows

    def windows(self: Stream, row_B: object) -> object:
        if self.name == "a" and 4 in row_B:  # type: ignore[operator]
            raise OSError("damaged")
        return plain(self, row_B)  # type: ignore[arg-type]

    want = loader(SOURCES, weights=WEIGHTS)
    states, bad = [want.state()], None
    for i in range(6):
        before = want.state()["rows"]["a"]
        want.draw(4)
        if before <= 4 < want.state()["rows"]["a"]:
            bad = i
        states.append(want.state())
    assert bad is not None
    assert bad > 0
    monkeypatch.setattr(Stream, "windows", windows)
    shared = Shared(tmp_path, 1, prefetch)
    for _ in range(bad):
        shared.each(lambda one: one.draw(4))

    def failing(one: Loader) -> bool:
        with pytest.raises(OSError, match="damaged"):
            one.draw(4)
        return one.state() == states[bad]

    assert all(shared.each(failing))
    shared.each(Loader.close)


def test_nothing_runs_on_when_a_loader_is_closed(tmp_path: Path) -> None:
    """Also where the one that reads waits for others that take no more."""
    shared = Shared(tmp_path, 1, sharing.SLOTS + 1)
    assert shared.loaders[0].draw(2).rows == 2  # more are made than there are slots
    began = time.monotonic()
    for one in shared.loaders:
        one.close()
    assert time.monotonic() - began < sharing.PATIENCE / 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmworks-loader")]


def test_what_a_process_that_is_gone_left_is_deleted(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {"old": f"rows-{gone.pid}-a-0", "young": f"rows-{gone.pid}-b-0", "mine": f"rows-{os.getpid()}-a-0"}
    for label, name in names.items():
        (tmp_path / name).touch()
        if label != "young":
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "other-1-a").touch()
    clear_away(tmp_path, "rows")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names["young"], names["mine"], "other-1-a"])
