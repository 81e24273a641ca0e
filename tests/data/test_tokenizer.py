from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lmworks.core.errors import DataError
from lmworks.data.tokenizer import END_OF_TEXT, Bpe, Bytes, Tokenizer, TokenizerFile, load_tokenizer

SAMPLE = ["def add(a, b):\n    return a + b\n", "naïve café, Zürich 2024: 日本語 🙂\n", "the cat and the hat " * 20]
TRAINED = Bpe(vocab_size=300).make(SAMPLE)
BYTES = Bytes().make(())
BOTH = pytest.mark.parametrize("tokenizer", [TRAINED, BYTES], ids=["bpe", "bytes"])


@BOTH
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int64
    assert all(0 < i < tokenizer.vocab_size for i in ids), "0 is the special token, which no text makes"


@BOTH
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=12))
def test_a_stream_of_any_ids_is_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*(stream.push(i) for i in ids), stream.end()]) == tokenizer.decode(ids)


@BOTH
def test_a_stream_holds_back_half_characters(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    smile = [BYTES.encode("🙂"), tokenizer.encode("🙂")][tokenizer is TRAINED]
    pieces = [stream.push(int(i)) for i in smile]
    assert pieces[-1] == "🙂"
    assert set(pieces[:-1]) <= {""}
    assert len(pieces) > 1


def test_bytes_are_bytes_and_have_257_ids() -> None:
    assert BYTES.vocab_size == 257
    assert BYTES.encode("aé").tolist() == [ord("a") + 1, 0xC3 + 1, 0xA9 + 1]
    assert (BYTES.bos, BYTES.eos) == (0, 0)


def test_the_fast_path_of_bytes_gives_what_the_library_gives(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in [*SAMPLE, f"a{END_OF_TEXT}b", ""]:
        assert BYTES.encode(text).tolist() == library.encode(text).ids


@BOTH
def test_a_special_token_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    """A document that spells the separator must not end itself."""
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert 0 not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.decode([0, *ids, 0], special=True) == f"{END_OF_TEXT}a{END_OF_TEXT}b{END_OF_TEXT}"


@BOTH
def test_pieces_are_the_bytes_of_every_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces is not None
    for text in SAMPLE:
        assert b"".join(tokenizer.pieces[i] for i in tokenizer.encode(text)) == text.encode()
    assert tokenizer.pieces[0] == b""


@BOTH
def test_half_a_surrogate_pair_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no UTF-8 form"):
        tokenizer.encode_batch(["fine", "\ud800"])


def test_training_is_the_same_in_another_process_with_other_threads() -> None:
    program = "from tests.data.test_tokenizer import Bpe, SAMPLE\nprint(Bpe(vocab_size=300).make(SAMPLE).id)"
    root = Path(__file__).parents[2]
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'src'}", "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == TRAINED.id


def test_settings_of_bpe_do_what_they_say() -> None:
    digits = ["1234 1234 1234 1234 abab abab"] * 5
    joined = Bpe(vocab_size=300).make(digits)
    split = Bpe(vocab_size=300, split_digits=True).make(digits)
    assert len(joined.encode("1234")) < 4 == len(split.encode("1234"))
    assert split.decode(split.encode("x 1234 ")) == "x 1234 "
    assert Bpe(vocab_size=257).make(digits).vocab_size == 257
    assert Bpe(vocab_size=300, min_frequency=1000).make(digits).vocab_size == 257


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.id, again.bos, again.eos, again.vocab_size) == (TRAINED.id, 0, 0, TRAINED.vocab_size)
    assert TokenizerFile(path=str(tmp_path / "tokenizer.json")).make().id == TRAINED.id


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES], ids=["bpe", "bytes"])
def test_transformers_loads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLE:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
    assert theirs(f"a{END_OF_TEXT}")["input_ids"][-1] == 0, "a prompt may hold special tokens"
    assert len(theirs) == tokenizer.vocab_size


def test_a_folders_template_is_kept(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"


def llama_like(folder: Path, **configs: dict[str, object]) -> Path:
    """A small tokenizer that is not byte-level: words with a mark for the space, as SentencePiece makes them."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁the": 3, "▁cat": 4, "s": 5, "é": 6} | {
        f"<0x{byte:02X}>": 7 + byte for byte in range(256)
    }
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "configs",
    [
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}},
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}},
        {"config": {"bos_token_id": 0, "eos_token_id": [1, 2]}},
        {"tokenizer_config": {"bos_token": None, "eos_token": "</s>"}, "config": {"bos_token_id": 0}},
    ],
)
def test_special_tokens_are_found_beside_the_file(tmp_path: Path, configs: dict[str, dict[str, object]]) -> None:
    found = load_tokenizer(llama_like(tmp_path, **configs))
    assert (found.bos, found.eos) == (0, 1)


def test_without_a_bos_the_eos_stands_on_both_sides(tmp_path: Path) -> None:
    found = load_tokenizer(llama_like(tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert (found.bos, found.eos) == (1, 1)


def test_settings_name_the_special_tokens(tmp_path: Path) -> None:
    folder = str(llama_like(tmp_path))
    with pytest.raises(DataError, match="which token ends a document is not said") as caught:
        TokenizerFile(path=folder).make()
    assert "set `eos`" in str(caught.value)
    found = TokenizerFile(path=folder, eos="</s>", bos="<s>").make()
    assert (found.bos, found.eos) == (0, 1)
    with pytest.raises(DataError, match=r"eos token '<end>' is not in the vocabulary"):
        TokenizerFile(path=folder, eos="<end>").make()


EURO = tuple(7 + byte for byte in "€".encode())


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.sampled_from([(1,), (3,), (4,), (5,), (6,), (7 + ord("a"),), EURO]), max_size=8))
def test_a_stream_without_byte_pieces_never_shows_half_a_character(
    chunks: list[tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "marks"
    tokenizer = load_tokenizer(llama_like(folder, tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.pieces is None
    stream = tokenizer.stream()
    ids = [i for chunk in chunks for i in chunk]
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no tokenizer.json here"), ("{", "not a tokenizer that can be read")]
)
def test_bad_files_are_data_errors(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        TokenizerFile(path=str(tmp_path)).make()


def test_a_tokenizer_extends_another_when_all_its_tokens_are_there_with_their_ids() -> None:
    ours, theirs = Bytes().make([]), Bpe(vocab_size=300).make(["one two three four " * 50])
    with pytest.raises(DataError, match=r"'!' is 1 there, 34 here") as caught:
        ours.must_extend(theirs, where="models/first")
    assert 'path = "models/first"' in str(caught.value)
    theirs.must_extend(theirs, where="models/first")
    fewer = Bpe(vocab_size=257).make([""])
    theirs.must_extend(fewer, where="models/first")
    with pytest.raises(DataError, match="here"):
        fewer.must_extend(theirs, where="models/first")
