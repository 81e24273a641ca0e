from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.data.fingerprint import changes, scan
from lmworks.data.pack import Documents
from lmworks.data.read import Jsonl, TextFiles
from lmworks.data.record import Ids, Record, Text
from lmworks.data.sample import sample_texts
from lmworks.data.shards import Shards, make_shards
from lmworks.data.tokenise import encode
from lmworks.data.tokenizer import Bpe, Bytes, Tokenizer

BYTES = Bytes().make(())
ROOT = Path(__file__).parents[2]


def write(folder: Path, texts: list[str]) -> TextFiles:
    """One file per text, and the reader of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return TextFiles(paths=(str(folder / "*.txt"),))


def make(reader: TextFiles | Jsonl, cache: Path, tokenizer: Tokenizer = BYTES, shard_tokens: int = 2**28) -> Shards:
    return make_shards(reader, scan(reader, cache), tokenizer, cache, shard_tokens=shard_tokens)


def read_back(documents: Documents, tokenizer: Tokenizer = BYTES) -> list[str]:
    """The texts of stored documents, after a look at their ends."""
    found = []
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        ids = documents.tokens.take(np.arange(start, start + length))
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        found.append(tokenizer.decode(ids[1:-1]))
    return found


TEXTS = ["alpha", "βῆτα", "gamma gamma", "d", "épsilon 🙂", "zeta\nzeta", "eta", "theta"]


@pytest.mark.parametrize("shard_tokens", [1, 12, 2**28])
def test_documents_come_back_in_order(shard_tokens: int, tmp_path: Path) -> None:
    shards = make(write(tmp_path / "in", TEXTS), tmp_path / "cache", shard_tokens=shard_tokens)
    documents = shards.training(0.0)
    assert read_back(documents) == TEXTS
    assert documents.n_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert shards.manifest["tokens"] == documents.n_tokens == sum(len(text.encode()) + 2 for text in TEXTS)
    count = len([entry for entry in shards.manifest["shards"] if entry["file"].startswith("tokens-")])
    assert count == {1: len(TEXTS), 12: 5, 2**28: 1}[shard_tokens]


def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", [" ".join(f"w{i}" for i in range(50))])
    assert make(reader, tmp_path / "cache").manifest["dtype"] == "<u2"
    wide = Bytes().make(())
    wide.vocab_size = 2**16 + 1
    assert make(reader, tmp_path / "wide", wide).manifest["dtype"] == "<u4"
    wide.vocab_size = 2**16
    assert make(reader, tmp_path / "narrow", wide).manifest["dtype"] == "<u2"


def test_the_manifest_balances_and_names_what_was_dropped(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", ["one", " ", "two"])
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    found = make(reader, tmp_path / "cache").manifest
    counts = found["documents"]
    assert counts["seen"] == 4 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"] == {"empty": 1, "not utf-8": 1}
    assert counts["dropped_names"]["not utf-8"] == [str(tmp_path / "in" / "bad.txt")]
    assert found["licences"] == {"unknown": 2}
    stat = (tmp_path / "in" / "000.txt").stat()
    first = found["files"][0]
    assert (first["size"], first["mtime_ns"]) == (3, stat.st_mtime_ns)
    assert first["sha256"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert (found["tokenizer_id"], found["bytes"], found["tokens"]) == (BYTES.id, 6, 10)


@pytest.mark.parametrize("content", ["", "\n \n", "\xff"])
def test_nothing_left_is_an_error_that_counts(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"no document is left of 1 seen; dropped: 1 (empty|not utf-8)") as caught:
        make(TextFiles(paths=(str(tmp_path / "a.txt"),)), tmp_path / "cache")
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))


def test_made_once_and_found_again(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    first = make(reader, tmp_path / "cache")
    before = (first.folder / "tokens-00000.bin").stat().st_mtime_ns
    again = make(reader, tmp_path / "cache")
    assert again.folder == first.folder
    assert (again.folder / "tokens-00000.bin").stat().st_mtime_ns == before
    elsewhere = make(reader, tmp_path / "other")
    assert (elsewhere.key, elsewhere.contents) == (first.key, first.contents)


def test_other_inputs_have_other_shards(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    keys = {make(reader, tmp_path / "cache").key}
    keys.add(make(reader, tmp_path / "cache", Bpe(vocab_size=260).make(TEXTS * 9)).key)
    keys.add(make(TextFiles(paths=reader.paths, split="block"), tmp_path / "cache").key)
    (tmp_path / "in" / "000.txt").write_text("another alpha")
    keys.add(make(reader, tmp_path / "cache").key)
    assert len(keys) == 4


# --- the split


@settings(max_examples=10, deadline=None)
@given(
    texts=st.sets(st.text("abcdef", min_size=1), min_size=2, max_size=30),
    fraction=st.floats(0.0, 0.99),
    data=st.data(),
)
def test_splits_are_stable_when_documents_join(
    texts: set[str], fraction: float, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("split")
    some = data.draw(st.lists(st.sampled_from(sorted(texts)), min_size=1, unique=True))

    def split(name: str, documents: list[str]) -> tuple[set[str], set[str]]:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
        shards = make(Jsonl(paths=(str(path),)), folder / "cache")
        return set(read_back(shards.training(fraction))), set(read_back(shards.validation(fraction)))

    training, held_out = split("some", some)
    assert training | held_out == set(some)
    all_training, all_held_out = split("all", sorted(texts, reverse=True))
    assert training <= all_training
    assert held_out <= all_held_out
    assert not all_training & all_held_out


def test_a_larger_fraction_holds_out_more_and_equal_texts_stay_together(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", [f"text {i % 100}" for i in range(200)])
    shards = make(reader, tmp_path / "cache")
    sizes = [len(shards.validation(fraction)) for fraction in (0.0, 0.1, 0.3, 0.9)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert 150 < sizes[-1] < 200
    counts = Counter(read_back(shards.validation(0.3)))
    assert set(counts.values()) == {2}


# --- content that is ids already


def test_ids_are_taken_over_and_foreign_ones_refused() -> None:
    record = Record(id="a", content=(Text("hi"), Ids((5, 6))), source="s")
    (found,) = encode([record], BYTES)
    assert found.tolist() == [0, ord("h") + 1, ord("i") + 1, 5, 6, 0]
    for wrong in (257, -1):
        with pytest.raises(DataError, match=f"token id {wrong} is not one") as caught:
            encode([Record(id="book 3", content=(Ids((1, wrong)),), source="s")], BYTES)
        assert (caught.value.where, caught.value.legal) == ("book 3", "0 to 256")


def test_ids_count_as_the_bytes_they_stand_for(tmp_path: Path) -> None:
    ids = BYTES.encode("né").tolist()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ids}))
    shards = make(Jsonl(paths=(str(tmp_path / "a.jsonl"),)), tmp_path / "cache")
    assert shards.training(0.0).n_bytes.tolist() == [3]
    assert read_back(shards.training(0.0)) == ["né"]


# --- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "lengths.npy", "bytes.npy", "hashes.npy"])
@pytest.mark.parametrize(
    ("damage", "message"), [(cut, "it was cut or written to"), (Path.unlink, "is missing"), (flip, "SHA-256 differs")]
)
def test_a_damaged_file_is_refused_by_name(
    name: str, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    reader = write(tmp_path / "in", TEXTS)
    folder = make(reader, tmp_path / "cache").folder
    damage(folder / name)
    with pytest.raises(DataError, match=message) as caught:
        make(reader, tmp_path / "cache").verify()
    assert caught.value.where == str(folder / name)
    assert f"rm -r {folder}" in str(caught.value)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = make(write(tmp_path / "in", TEXTS), tmp_path / "cache").folder
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="has format 99, this lmworks reads 1"):
        Shards.open(folder)
    manifest.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        Shards.open(folder)
    manifest.unlink()
    with pytest.raises(DataError, match="no complete token shards here"):
        Shards.open(folder)


# --- fingerprints


def test_changed_files_are_named(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    before = scan(reader, tmp_path / "cache")
    assert changes(before, scan(reader, tmp_path / "cache")) == ""
    (tmp_path / "in" / "001.txt").write_text("new text")
    (tmp_path / "in" / "002.txt").unlink()
    (tmp_path / "in" / "900.txt").write_text("more")
    found = changes(before, scan(reader, tmp_path / "cache"))
    folder = tmp_path / "in"
    assert found == f"added: {folder}/900.txt; removed: {folder}/002.txt; changed: {folder}/001.txt"
    for i in range(30):
        (tmp_path / "in" / f"x{i:02d}.txt").write_text("x")
    assert changes(before, scan(reader, tmp_path / "cache")).count(".txt") == 12
    assert "and 21 more" in changes(before, scan(reader, tmp_path / "cache"))


def test_only_files_with_another_size_or_time_are_hashed_again(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    first = scan(reader, tmp_path / "cache")
    hashed: list[int] = []

    def progress(*, stage: str, done: int, total: int | None, unit: str, seconds_left: float | None = None) -> None:
        hashed.append(done)

    assert scan(reader, tmp_path / "cache", progress) == first
    assert hashed == []
    path = tmp_path / "in" / "003.txt"
    os.utime(path, ns=(1, 1))
    touched = scan(reader, tmp_path / "cache", progress)
    assert hashed == [4]
    assert touched.id == first.id, "only bytes and names count"
    memory = next((tmp_path / "cache" / "sources").glob("*.json"))
    memory.write_text("damaged")
    assert scan(reader, tmp_path / "cache").id == first.id


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    source = scan(reader, tmp_path / "cache")
    (tmp_path / "in" / "004.txt").write_text("too late")
    with pytest.raises(DataError, match="changed while it was read"):
        make_shards(reader, source, BYTES, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))


# --- the tokenizer's sample


@given(st.lists(st.text(max_size=20), max_size=20), st.integers(1, 100), st.randoms())
def test_a_sample_is_fair_and_fits(texts: list[str], limit: int, random: object) -> None:
    records = [Record(id=str(i), content=(Text(text),), source="s") for i, text in enumerate(dict.fromkeys(texts))]
    found = sample_texts(records, limit)
    assert sum(len(text.encode()) for text in found) <= limit
    assert found == sample_texts(records[::-1], limit), "the order of documents does not matter"
    everything = sum(len(text.encode()) for text in dict.fromkeys(texts))
    if everything <= limit:
        assert sorted(found) == sorted(dict.fromkeys(texts))
    else:
        assert sum(len(text.encode()) for text in found) > limit - 4, "at most part of one character is missing"


# --- kills, full disks, two processes at once

PROGRAM = textwrap.dedent(
    """
    import os, resource, sys
    from pathlib import Path
    from lmworks.core.errors import DataError
    from lmworks.data.fingerprint import scan
    from lmworks.data.read import TextFiles
    from lmworks.data.shards import make_shards
    from lmworks.data.tokenizer import Bytes

    cache, how = Path(sys.argv[1]), sys.argv[2]
    reader = TextFiles(paths=(sys.argv[3],))
    source = scan(reader, cache)

    def progress(*, stage, done, total, unit, seconds_left=None):
        if how == "kill" and done > 0:
            os.kill(os.getpid(), 9)
        if how == "wait":
            print("started", flush=True)
            sys.stdin.readline()

    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        print(make_shards(reader, source, Bytes().make(()), cache, progress=progress).contents)
    except DataError as error:
        print(error)
        sys.exit(1)
    """
)


def start(cache: Path, how: str, reader: TextFiles) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", PROGRAM, str(cache), how, reader.paths[0]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    cache = tmp_path / "cache"
    killed = start(cache, "kill", reader)
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    tokens = cache / "tokens"
    assert [path.name for path in tokens.iterdir() if not path.name.startswith(".")] == []
    assert list(tokens.glob(".*.tmp")), "it was killed while it wrote"
    found = make(reader, cache)
    assert not list(tokens.glob(".*.tmp")), "what it left is swept away"
    assert found.contents == make(reader, tmp_path / "unbroken").contents
    found.verify()


def test_two_processes_at_once_make_one_set_of_shards(tmp_path: Path) -> None:
    reader = write(tmp_path / "in", TEXTS)
    cache = tmp_path / "cache"
    first = start(cache, "wait", reader)
    assert first.stdout is not None
    assert first.stdout.readline() == "started\n"
    second = start(cache, "wait", reader)
    assert second.stdout is not None
    assert second.stdout.readline() == "started\n", "it is told that it waits"
    out = [process.communicate("\n" * 9, timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    contents = {text.splitlines()[-1] for text in out}
    assert contents == {make(reader, cache).contents}


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size answers a write as a full disk does: with an error from the operating system."""
    reader = write(tmp_path / "in", ["long text " * 500])
    process = start(tmp_path / "cache", "full", reader)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert "the disk is full" in out
    assert "LMWORKS_HOME" in out
    assert not list((tmp_path / "cache" / "tokens").glob(".*.tmp"))
    assert make(reader, tmp_path / "cache").manifest["bytes"] == 5000


@pytest.mark.parametrize("blocker", ["cache", "cache/tokens"])
def test_a_folder_that_cannot_be_written_is_named(blocker: str, tmp_path: Path) -> None:
    """A file stands where the folder would be: refused for every user, also for root."""
    reader = write(tmp_path / "in", TEXTS)
    source = scan(reader, tmp_path / "elsewhere")
    (tmp_path / blocker).parent.mkdir(exist_ok=True)
    (tmp_path / blocker).write_text("")
    with pytest.raises(DataError, match="cannot be written") as caught:
        make_shards(reader, source, BYTES, tmp_path / "cache")
    assert "data.cache" in str(caught.value)
