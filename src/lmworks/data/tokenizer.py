"""Tokenizers: how text becomes token ids.

Three parts make one (`bpe`, `file`, `bytes`); all of them give a Tokenizer, which wraps the `tokenizers` library.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import tokenizers
from annotated_types import Interval
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmworks.core import files
from lmworks.core.errors import DataError
from lmworks.core.recipe import PositiveInt

END_OF_TEXT = "<|endoftext|>"
"""The one special token of our own tokenizers: id 0, both before and after every document."""

Id = np.int64
_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@final
class Tokenizer:
    """Text to token ids and back. Encoding never makes special tokens: `<|endoftext|>` in a text is plain text.

    bos, eos: the ids put before and after a document. texts: files to be saved beside tokenizer.json.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, bos: int, eos: int, texts: Mapping[str, str]) -> None:
        self._inner = inner
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True
        self.bos = bos
        self.eos = eos
        self._texts = dict(texts)
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self.id = self._identity()
        self._is_bytes = _is_bytes(inner)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text, on all cores. Raises DataError for half of a surrogate pair."""
        try:
            if self._is_bytes:
                return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(Id) + 1 for text in texts]
            found = self._inner.encode_batch_fast([_utf8(text) for text in texts], add_special_tokens=False)
        except UnicodeEncodeError as error:
            raise DataError(f"this text has no UTF-8 form: {error}") from error
        return [np.array(one.ids, dtype=Id) for one in found]

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`. Broken UTF-8 becomes U+FFFD."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=not special))

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and its config, as transformers' AutoTokenizer loads them."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "tokenizer.json", self._inner.to_str(pretty=True))
        for name, text in self._texts.items():
            files.write_text(folder / name, text)

    def must_extend(self, other: Tokenizer, *, where: str) -> None:
        """Raise DataError unless every token of `other` is here too, with the same id. There may be more tokens."""
        ours = self._inner.get_vocab(with_added_tokens=True)
        theirs = other._inner.get_vocab(with_added_tokens=True)
        differing = [token for token, index in theirs.items() if ours.get(token) != index]
        if differing:
            token = min(differing, key=lambda one: theirs[one])
            here = ours.get(token, "no token")
            raise DataError(
                f"{len(differing)} of its {len(theirs)} tokens are others in the recipe's tokenizer: {token!r} is "
                f"{theirs[token]} there, {here} here",
                where=where,
                next_step=f'use the model\'s own: data.tokenizer = {{ use = "file", path = "{where}" }}',
            )

    @cached_property
    def pieces(self) -> list[bytes] | None:
        """The bytes that each id stands for (none for special ones); None where ids do not stand for fixed bytes."""
        return _pieces(self._inner, self.vocab_size) if isinstance(self._inner.decoder, decoders.ByteLevel) else None

    def _identity(self) -> str:
        canonical = json.dumps(json.loads(self._inner.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{canonical}|{self.bos}|{self.eos}".encode()).hexdigest()


@final
class TextStream:
    """Turns ids that come one by one into text, and never gives half a character.

    The pieces, and what `end` gives, add up to `tokenizer.decode` of all ids. Only where ids spell broken UTF-8 in a
    vocabulary that is not byte-level may the number of U+FFFD differ.
    """

    _PATIENCE = 16  # ids without a whole character, after which text is shown as it is

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that this id completes; '' while a character is unfinished."""
        pieces = self._tokenizer.pieces
        if pieces is not None:
            return self._utf8.decode(pieces[id])
        self._held.append(id)
        text = self._new()
        unfinished = not text or (text.endswith("\ufffd") and len(self._held) < self._PATIENCE)
        return "" if unfinished else self._hand_out(text)

    def end(self) -> str:
        """The rest: an unfinished character becomes U+FFFD."""
        return self._hand_out(self._new()) if self._held else self._utf8.decode(b"", final=True)

    def _new(self) -> str:
        """What the held ids add. Decoding begins some ids earlier: a piece that comes first may lose its space."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._held])[len(before) :]

    def _hand_out(self, text: str) -> str:
        self._context = self._held[-4:]
        self._held = []
        return text


@dataclass(frozen=True, kw_only=True)
class TokenizerPart(ABC):
    """What fills the slot 'tokenizer': settings that make a Tokenizer."""

    @property
    def sample_limit(self) -> int:
        """UTF-8 bytes of the readers' text that `make` wants to see; 0: none."""
        return 0

    @abstractmethod
    def make(self, sample: Sequence[str]) -> Tokenizer:
        """The tokenizer. `sample`: documents of the readers, at most `sample_limit` bytes of them."""


@final
@dataclass(frozen=True, kw_only=True)
class Bpe(TokenizerPart):
    """Byte-level BPE, trained on a sample of the run's own text. Same text and settings give the same tokenizer."""

    vocab_size: Annotated[int, Interval(ge=257, le=1_000_000)] = 8192
    """Tokens, with 256 bytes and `<|endoftext|>` among them. Little text may give fewer."""
    sample_bytes: PositiveInt = 8_000_000
    """How much text it is trained on, shared among the readers by weight. Documents are chosen by hash."""
    split_digits: bool = False
    """Every digit a token of its own."""
    min_frequency: PositiveInt = 2
    """A pair is merged only when it occurs this often."""

    @property
    def sample_limit(self) -> int:
        """The setting `sample_bytes`."""
        return self.sample_bytes

    def make(self, sample: Sequence[str]) -> Tokenizer:
        """Train on the sample."""
        inner = _byte_level(models.BPE(), split_digits=self.split_digits)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(sample, trainer)
        return _ours(inner)


@final
@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerPart):
    """UTF-8 bytes: id 0 is `<|endoftext|>`, byte b is id b + 1. 257 tokens, nothing to train."""

    def make(self, sample: Sequence[str]) -> Tokenizer:
        """The tokenizer; the sample is not needed."""
        vocab = {END_OF_TEXT: 0} | {letter: byte + 1 for byte, letter in _letters().items()}
        inner = _byte_level(models.BPE(vocab=vocab, merges=[]), split_digits=False)
        inner.add_special_tokens([END_OF_TEXT])
        return _ours(inner)


@final
@dataclass(frozen=True, kw_only=True)
class TokenizerFile(TokenizerPart):
    """An existing tokenizer.json, as Hugging Face folders carry it."""

    path: str
    """The file, or the folder that holds it."""
    bos: str | None = None
    """Token put before a document; none: as the folder's config says, and the eos token where it names none."""
    eos: str | None = None
    """Token put after a document; none: as the folder's config says."""

    def make(self, sample: Sequence[str] = ()) -> Tokenizer:
        """Load it; the sample is not needed. Raises DataError when it cannot be read or the eos token is not known."""
        file = Path(self.path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                "no tokenizer.json here", where=str(file), next_step="give a file or a folder that holds one"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise DataError(f"is not a tokenizer that can be read: {error}", where=str(file)) from error
        beside = [file.with_name(name) for name in _KEPT]
        texts = {path.name: path.read_text(encoding="utf-8") for path in beside if path.is_file()}
        eos = _special(inner, file, self.eos, "eos")
        if eos is None:
            raise DataError(
                "which token ends a document is not said beside this file",
                where=str(file),
                next_step="set `eos` of the tokenizer, as in eos = '</s>'",
            )
        bos = _special(inner, file, self.bos, "bos")
        bos = eos if bos is None else bos
        texts.setdefault("tokenizer_config.json", _config(_name(inner, file, eos), _name(inner, file, bos)))
        return Tokenizer(inner, bos=bos, eos=eos, texts=texts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote, or that of any Hugging Face folder."""
    return TokenizerFile(path=str(folder)).make()


def _byte_level(model: models.Model, *, split_digits: bool) -> tokenizers.Tokenizer:
    """GPT-2's way of cutting text into words, bytes as letters."""
    inner = tokenizers.Tokenizer(model)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if split_digits else words
    inner.decoder = decoders.ByteLevel()
    return inner


def _ours(inner: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(inner, bos=0, eos=0, texts={"tokenizer_config.json": _config(END_OF_TEXT, END_OF_TEXT)})


def _config(eos: str, bos: str) -> str:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2) + "\n"


def _letters() -> dict[int, str]:
    """GPT-2's table: byte -> the printable letter that stands for it in a byte-level vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _utf8(text: str) -> str:
    """The text itself. The library answers half of a surrogate pair with a TypeError that names no cause."""
    if not text.isascii():
        text.encode("utf-8")
    return text


def _pieces(inner: tokenizers.Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of each id of a byte-level vocabulary, as the library's decoder has it."""
    byte_of = {letter: byte for byte, letter in _letters().items()}
    pieces = [b""] * vocab_size
    for token, index in inner.get_vocab(with_added_tokens=True).items():
        known = all(letter in byte_of for letter in token)
        pieces[index] = bytes(byte_of[letter] for letter in token) if known else token.encode("utf-8")
    for index, added in inner.get_added_tokens_decoder().items():
        if added.special:
            pieces[index] = b""
    return pieces


def _is_bytes(inner: tokenizers.Tokenizer) -> bool:
    """Whether this is the tokenizer of the part `bytes`, for which no library call is needed."""
    vocab = inner.get_vocab(with_added_tokens=True)
    return len(vocab) == 257 and all(vocab.get(letter) == byte + 1 for byte, letter in _letters().items())


def _special(inner: tokenizers.Tokenizer, file: Path, setting: str | None, kind: str) -> int | None:
    """The id of the bos or eos token: from the setting, or from the configs beside the file."""
    token = setting if setting is not None else _configured(file, kind)
    if token is None or isinstance(token, int):
        return token
    index = inner.token_to_id(token)
    if index is None:
        raise DataError(f"the {kind} token {token!r} is not in the vocabulary", where=str(file))
    return int(index)


def _name(inner: tokenizers.Tokenizer, file: Path, index: int) -> str:
    token = inner.id_to_token(index)
    if token is None:
        raise DataError(f"the configs beside it name token {index}, which it does not have", where=str(file))
    return str(token)


def _configured(file: Path, kind: str) -> str | int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        path = file.with_name(name)
        if not path.is_file():
            continue
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        token = config.get(f"{kind}_token", config.get(f"{kind}_token_id"))
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, list):
            token = token[0]
        if isinstance(token, str | int):
            return token
    return None
