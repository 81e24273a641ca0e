from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.data.mending import text_in
from lmworks.data.read import HuggingFace, Jsonl, Parquet, PythonStdlib, Reader, TextFiles, read_bytes
from lmworks.data.record import Dropped, Ids, Record, Span, Text, content_hash


def texts(reader: Reader) -> list[str]:
    """The texts of the kept documents."""
    kept = [item for item in reader.read() if isinstance(item, Record)]
    return [part.text for record in kept for part in record.content if isinstance(part, Text)]


def dropped(reader: Reader) -> list[tuple[str, str]]:
    return [(item.id, item.reason) for item in reader.read() if isinstance(item, Dropped)]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


# --- python-stdlib


def test_the_standard_library_is_read_in_a_fixed_order() -> None:
    files = PythonStdlib().files()
    names = [file.name for file in files]
    assert names == sorted(names)
    assert len(names) > 300
    assert "json/decoder.py" in names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"__pycache__", "site-packages", "test", "tests", "lib-dynload"}
    assert files[0].path.is_relative_to(sysconfig.get_path("stdlib"))


def test_settings_choose_files() -> None:
    plain = {file.name for file in PythonStdlib().files()}
    with_tests = {file.name for file in PythonStdlib(tests=True).files()}
    assert plain < with_tests
    docs = {file.name for file in PythonStdlib(suffixes=(".txt", ".rst")).files()}
    assert docs == {name for name in plain if not name.endswith(".py")}
    with pytest.raises(DataError, match=r"no \.nothing files"):
        PythonStdlib(suffixes=(".nothing",)).files()


def test_patterns_make_sources_of_different_kinds() -> None:
    whole = {file.name for file in PythonStdlib().files()}
    tables = {file.name for file in PythonStdlib(include=("encodings/*",)).files()}
    rest = {file.name for file in PythonStdlib(exclude=("encodings/*",)).files()}
    assert tables == {name for name in whole if name.startswith("encodings/")}
    assert rest == whole - tables
    with pytest.raises(DataError, match="of nowhere/"):
        PythonStdlib(include=("nowhere/*",)).files()


def test_the_standard_library_is_read_in_blocks() -> None:
    chosen = ("this.py",)
    (whole,) = texts(PythonStdlib(include=chosen))
    blocks = texts(PythonStdlib(include=chosen, split="block"))
    assert len(blocks) > 1
    assert "".join(blocks).split() == whole.split()


def test_max_bytes_ends_the_reading() -> None:
    whole = PythonStdlib()
    kept = texts(PythonStdlib(max_bytes=50_000))
    assert sum(len(text.encode()) for text in kept[:-1]) < 50_000 <= sum(len(text.encode()) for text in kept)
    assert kept == texts(PythonStdlib(max_bytes=50_001))[: len(kept)]
    assert next(iter(whole.read())) == next(iter(PythonStdlib(max_bytes=1).read()))


# --- text


def test_a_text_file_is_a_document_or_its_blocks_are(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\ntwo\n\n \n\nthree\n")
    (tmp_path / "a.txt").write_text("zero")
    glob = str(tmp_path / "*.txt")
    assert texts(TextFiles(paths=(glob,))) == ["zero", "one\ntwo\n\n \n\nthree\n"]
    assert texts(TextFiles(paths=(glob,), split="block")) == ["zero", "one\ntwo\n", "three\n"]
    ids = [item.id for item in TextFiles(paths=(glob,), split="block").read()]
    assert ids == [f"{tmp_path}/a.txt#0", f"{tmp_path}/b.txt#0", f"{tmp_path}/b.txt#1"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets are a name where such a file is")
    paths = (str(tmp_path / "a[1].txt"), str(tmp_path / "*.txt"))
    assert len(TextFiles(paths=paths).files()) == 1


def test_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    (item,) = TextFiles(paths=("**/*.txt",), licence="CC0-1.0", name="mine").read()
    assert item == Record(id="deep/a.txt", content=(Text("hello"),), source="mine", licence="CC0-1.0")


def test_files_that_are_not_utf8_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("\ufeffgrün".encode())
    (tmp_path / "c.txt").write_text(" \n")
    reader = TextFiles(paths=(str(tmp_path / "*"),))
    assert texts(reader) == ["grün"], "the byte order mark is not text"
    assert dropped(reader) == [(f"{tmp_path}/a.txt", "not utf-8"), (f"{tmp_path}/c.txt", "empty")]


BROKEN = [
    ("caf\u00e9 ol\u00e9".encode("latin-1"), "caf\u00e9 ol\u00e9", "windows-1252"),
    ("\u201chi\u201d".encode("cp1252"), "\u201chi\u201d", "windows-1252"),
    ("h\u00e9llo".encode("utf-16"), "h\u00e9llo", "utf-16"),
    (b"caf\xc3\xa9 and \xe9t\xe9 \x81", "caf\u00e9 and \u00e9t\u00e9 \x81", "windows-1252"),
    ("plain caf\u00e9".encode(), "plain caf\u00e9", None),
]


@pytest.mark.parametrize(("data", "text", "mended"), BROKEN)
def test_bytes_that_are_not_utf8_are_mended_where_asked_and_say_so(
    data: bytes, text: str, mended: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (item,) = TextFiles(paths=(str(tmp_path / "a.txt"),), broken="mend").read()
    assert isinstance(item, Record)
    assert item.content == (Text(text),)
    assert dict(item.facts) == ({} if mended is None else {"mended": mended})


@given(st.binary(max_size=40))
def test_mending_keeps_every_utf8_text_and_always_gives_one(data: bytes) -> None:
    text, mended = text_in(data)
    text.encode("utf-8")
    if mended is None:
        assert data.removeprefix(b"\xef\xbb\xbf").decode() == text


def test_lines_are_mended_one_by_one_and_halves_of_pairs_replaced(tmp_path: Path) -> None:
    lines = [
        b'{"text": "caf\xe9"}',
        b'{"text": "odd \\ud800 half"}',
        b'{"text": "fine"}',
        b'{"text": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    reader = Jsonl(paths=(str(tmp_path / "a.jsonl"),), broken="mend")
    assert texts(reader) == ["caf\u00e9", "odd \ufffd half", "fine", "\U0001f600"]
    facts = [dict(item.facts) for item in reader.read() if isinstance(item, Record)]
    assert facts == [{"mended": "windows-1252"}, {"mended": "surrogate half"}, {}, {}]
    assert len(dropped(Jsonl(paths=reader.paths))) == 2


@pytest.mark.parametrize(
    ("path", "message", "step"),
    [
        ("nothing.txt", "no such file", "start at the current folder"),
        ("*.nothing", "matches no file", "start at the current folder"),
        (".", "is a folder", r"\./\*\*/\*"),
    ],
)
def test_a_path_without_files_is_named(
    path: str, message: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        TextFiles(paths=(path,)).files()
    assert caught.value.where == path
    assert caught.match(step)


def test_no_paths_at_all() -> None:
    with pytest.raises(DataError, match="no paths are given"):
        Jsonl(paths=()).files()


# --- jsonl

ROWS = [
    {"text": "first", "id": "x", "licence": "MIT"},
    {"text": ""},
    {"body": "elsewhere"},
    {"text": 5},
    {"text": [3, 4, 5]},
    {"text": [3, "4"]},
    {"text": "\ud800"},
]
LINES = (
    "\n".join([*(json.dumps(row) for row in ROWS), "", "{", "[1]"]).encode() + b'\n{"text": "\xff"}\n{"text": "last"}'
)


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_every_line_is_a_document_or_is_dropped_with_a_reason(
    ending: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(LINES))
    reader = Jsonl(paths=(str(path),), id_field="id", licence_field="licence", licence="unknown")
    items = list(reader.read())
    assert len(items) == 11
    assert texts(reader) == ["first", "last"]
    assert items[0] == Record(id="x", content=(Text("first"),), source="jsonl", licence="MIT")
    assert items[4] == Record(id=f"{path}#5", content=(Ids((3, 4, 5)),), source="jsonl", licence="unknown")
    assert dropped(reader) == [
        (f"{path}#2", "empty"),
        (f"{path}#3", "no text"),
        (f"{path}#4", "text is of type int"),
        (f"{path}#6", "text is of type list"),
        (f"{path}#7", "not utf-8"),
        (f"{path}#9", "not json"),
        (f"{path}#10", "not a json object"),
        (f"{path}#11", "not utf-8"),
    ]
    assert texts(Jsonl(paths=(str(path),), field="body")) == ["elsewhere"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_packed_file_is_named(ending: str, tmp_path: Path) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}[ending]
    path = tmp_path / f"a.jsonl{ending}"
    whole = pack(b"\n".join(b'{"text": "%d"}' % (i * i) for i in range(3000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        texts(Jsonl(paths=(str(path),)))
    assert caught.value.where == str(path)
    path.write_bytes(b"this is not packed at all, whatever its name says")
    with pytest.raises(DataError):
        texts(Jsonl(paths=(str(path),)))


# --- parquet and hugging face


def test_parquet_reads_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"body": ["one", None, "two"], "licence": ["MIT", "MIT", None]})
    pq.write_table(table, path, row_group_size=2)
    reader = Parquet(paths=(str(path),), column="body", licence_column="licence", licence="CC0-1.0")
    kept = [item for item in reader.read() if isinstance(item, Record)]
    assert [(record.id, record.licence) for record in kept] == [(f"{path}#0", "MIT"), (f"{path}#2", "CC0-1.0")]
    assert dropped(reader) == [(f"{path}#1", "no text")]
    with pytest.raises(DataError, match="no column 'text'") as caught:
        texts(Parquet(paths=(str(path),)))
    assert caught.value.legal == "body, licence"


def test_parquet_takes_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [[5, 6], [7]]}), path)
    kept = [item for item in Parquet(paths=(str(path),)).read() if isinstance(item, Record)]
    assert [record.content for record in kept] == [(Ids((5, 6)),), (Ids((7,)),)]


def test_max_bytes_is_refused_for_token_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [[1, 2, 3], [4]]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match=r"token ids\n.*leave max_bytes out of the reader 'parquet'"):
        list(Parquet(paths=(str(tmp_path / "ids.parquet"),), max_bytes=2).read())


@pytest.mark.parametrize("split", ["train[:1%]", "train+test"])
def test_a_split_that_is_no_plain_name_is_refused(split: str) -> None:
    (problem,) = HuggingFace(path="owner/name", split=split).check(None)
    assert problem.path == "split"
    assert "max_bytes" in problem.text
    assert list(HuggingFace(path="owner/name", split="train").check(None)) == []


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match="is not a Parquet file"):
        texts(Parquet(paths=(str(tmp_path / "a.parquet"),)))


def test_a_local_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    reader = HuggingFace(path=str(folder), name="set")
    assert texts(reader) == ["one", "two"]
    with pytest.raises(DataError, match="no column 'body'"):
        HuggingFace(path=str(folder), column="body").files()
    with pytest.raises(DataError, match="cannot be loaded"):
        HuggingFace(path=str(folder), split="test").files()


# --- records and settings


def test_weight_and_name_do_not_decide_which_documents_come_out() -> None:
    a, b = PythonStdlib(weight=2.0, name="mine"), PythonStdlib()
    assert a.settings() == b.settings() != PythonStdlib(tests=True).settings()
    assert (a.label, b.label) == ("mine", "python-stdlib")


@given(st.text(), st.text())
def test_equal_contents_have_equal_hashes_and_only_they(a: str, b: str) -> None:
    def record(*texts: str) -> Record:
        return Record(id=a[:3], content=tuple(Text(text) for text in texts), source=b[:3])

    a, b = (text.encode("utf-8", "ignore").decode() for text in (a, b))
    assert content_hash(record(a)) == content_hash(Record(id="other", content=(Text(a),), source="other"))
    assert (content_hash(record(a)) == content_hash(record(b))) == (a == b)
    assert content_hash(record(a, b)) != content_hash(record(a + b))


def test_ids_and_their_text_are_different_contents() -> None:
    ids = Record(id="a", content=(Ids((1, 2)),), source="s")
    text = Record(id="a", content=(Text("1,2"),), source="s")
    assert content_hash(ids) != content_hash(text)


@pytest.mark.parametrize("span", [Span("name", 1, 0, 1), Span("name", 0, 2, 1), Span("name", 0, 0, 4)])
def test_a_span_lies_within_its_part(span: Span) -> None:
    Record(id="a", content=(Text("abc"),), spans=(Span("name", 0, 0, 3),), source="s")
    with pytest.raises(ValueError, match="span 'name'"):
        Record(id="a", content=(Text("abc"),), spans=(span,), source="s")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(tmp_path)
