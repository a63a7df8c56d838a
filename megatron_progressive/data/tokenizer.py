"""The tokenizer of a corpus: byte-level BPE trained on it, a local one, or a Hugging Face one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.config import ConfigError, DataSection
from megatron_progressive.data.corpus import Corpus
from megatron_progressive.data.decoding import one_line
from megatron_progressive.data.split import split_documents
from megatron_progressive.data.tokenizer_folder import (
    SETTINGS,
    declared,
    read_object,
    token_settings,
    tokenizer_files,
    usage_files,
)

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""Number of entries of byte-level BPE before any merge: the bytes and the end-of-document token."""

SAMPLE_BYTES = 8_000_000
"""The most bytes of training text that BPE is trained on."""

FIELD = "data.tokenizer"
ACCEPTED = (
    "bpe, a tokenizer.json, a folder with tokenizer.json or with vocab.json and merges.txt, "
    "or a Hugging Face name"
)

# Files of a tokenizer in a folder, the first that are there: vocabulary and merges, or all in one.
_LAYOUTS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("gpt2_vocab.json", "gpt2_merges.txt"),
)


# Of tokenizer.json: what does not decide the tokens of a document.
_NOT_TOKENS = ("decoder", "padding", "post_processor", "truncation", "version")


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer that turns documents into tokens which end with the end-of-document token."""

    name: str
    """The name that ``data.tokenizer`` gives."""
    backend: tokenizers.Tokenizer
    end_of_document: int
    settings: dict[str, Any] = field(default_factory=dict)
    """The content of ``tokenizer_config.json``, for those who load the stored tokenizer."""
    files: dict[str, bytes] = field(default_factory=dict)
    """All files of the tokenizer in its folder, by relative name, to be stored as they are."""
    revision: str | None = None
    """Commit of a Hugging Face tokenizer; None for other tokenizers, or where it is not known."""

    @property
    def entries(self) -> int:
        """The size that a vocabulary needs: one more than the greatest token, since numbers can
        have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def tokens_as(self, other: DocumentTokenizer) -> bool:
        """Whether both tokenizers give the same tokens for every text, apart from the end of a
        document."""
        mine, theirs = (
            json.loads(one.backend.to_str()) | dict.fromkeys(_NOT_TOKENS) for one in (self, other)
        )
        return bool(mine == theirs)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each document, uint32 [length + 1]; the last one ends the document.

        No other special token occurs: text that spells one is read as plain text.
        """
        import numpy as np

        # `ids`, the only way that the library gives tokens, makes a list; array takes it over in a
        # third of the time that numpy needs

        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [array("I", encoding.ids) for encoding in encodings]
        for row in rows:
            row.append(self.end_of_document)
        return [np.frombuffer(row, np.uint32) for row in rows]

    def save(self, folder: Path) -> None:
        """Write a folder that ``PreTrainedTokenizerFast.from_pretrained`` loads."""
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        end = self.backend.id_to_token(self.end_of_document)
        if "tokenizer.json" in self.files and declared(token_settings(folder), "eos_token") == end:
            return  # transformers loads it from here as from its own folder
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {k: v for k, v in self.settings.items() if k not in ("auto_map", "backend")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["eos_token"] = end
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def identity(data: DataSection, vocab_size: int) -> list[Any]:
    """What decides the tokens of a text, as JSON can hold it."""
    if data.tokenizer == "bpe":
        return ["bpe", vocab_size]
    if local := _local_files(data.tokenizer):
        folder = local[0].parent
        files = [*local, folder / SETTINGS]
        hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
        end = declared(token_settings(folder, FIELD), "eos_token")
        own = declared(read_object(folder / SETTINGS, FIELD) or {}, "eos_token")
        return hashes if end == own else [*hashes, end]  # of another file
    return ["hf", data.tokenizer]


def load_tokenizer(data: DataSection, vocab_size: int) -> DocumentTokenizer | None:
    """The tokenizer that ``data.tokenizer`` names; None for ``bpe``, which has yet to be trained.

    Args:
        data: the section that says where the tokenizer is.
        vocab_size: the number of entries that the model has.

    Raises:
        ConfigError: there is no such tokenizer, it has no end-of-document token, or the model's
            vocabulary is too small.
    """
    if data.tokenizer == "bpe":
        if vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"data.vocab_size: got {vocab_size}; accepted: at least {SMALLEST_BPE}, the "
                "bytes and the end-of-document token of tokenizer bpe"
            )
        return None
    if files := _local_files(data.tokenizer):
        tokenizer = _load_local(data.tokenizer, files)
    else:
        tokenizer = _load_hub(data.tokenizer)
    check_vocabulary(vocab_size, tokenizer.entries, tokenizer.name)
    return tokenizer


def check_vocabulary(vocab_size: int, entries: int, name: str) -> None:
    """Raise :class:`ConfigError` where a model of ``vocab_size`` cannot hold the ``entries`` of a
    tokenizer."""
    if entries > vocab_size:
        raise ConfigError(
            f"data.vocab_size: got {vocab_size}; accepted: at least {entries}, the entries of "
            f"tokenizer {name}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> DocumentTokenizer:
    """Train byte-level BPE with at most ``vocab_size`` entries; the same texts give the same
    tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    end_of_document = backend.token_to_id(END_OF_TEXT)
    assert end_of_document is not None, "the trainer adds its special tokens"
    return DocumentTokenizer("bpe", backend, end_of_document)


def training_sample(
    corpus: Corpus, fraction: float, near: bool = False, most: int = SAMPLE_BYTES
) -> list[str]:
    """Documents of the training split to train a tokenizer on, ``most`` bytes at most.

    In a local corpus they are spread over at most its first 32 x ``most``, so that a sample does
    not cost a reading of terabytes. In a corpus of the hub they are the first ones.
    """
    size = corpus.size()
    keep = 1.0 if size is None else min(1.0, max(most / max(size, 1), 1 / 32))
    chosen: list[str] = []
    total, due = 0, 0.0
    for text, held_out in split_documents(corpus.documents(patient=True), fraction, near):
        if held_out:
            continue
        due += keep
        if due < 1:
            continue
        due -= 1
        left = most - total
        encoded = text.encode()[:left]
        chosen.append(encoded.decode(errors="ignore"))
        total += len(encoded)
        if total >= most:
            break
    return chosen


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer in a layout that can be read here."""
    return any(all((folder / part).is_file() for part in layout) for layout in _LAYOUTS)


def _local_files(name: str) -> list[Path]:
    """The files of a local tokenizer; none where ``name`` is not a path that exists.

    Raises:
        ConfigError: the folder has no tokenizer, or what is written as a path does not exist.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        for layout in _LAYOUTS:
            files = [path / part for part in layout]
            if all(file.is_file() for file in files):
                return files
        raise ConfigError(
            f"data.tokenizer: got {name!r}, a folder without a tokenizer; accepted: {ACCEPTED}"
        )
    # what cannot be a Hugging Face name (OWNER/NAME at most) must not wait for the network
    if not name or name[0] in "./~" or name.endswith((".json", "/")) or name.count("/") > 1:
        raise ConfigError(
            f"data.tokenizer: got {name!r}, which does not exist; accepted: {ACCEPTED}"
        )
    return []


def _load_local(name: str, files: list[Path]) -> DocumentTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    settings = token_settings(files[0].parent, FIELD)
    try:
        if len(files) == 1:
            backend = Tokenizer.from_file(str(files[0]))
        else:
            backend = Tokenizer(models.BPE.from_file(str(files[0]), str(files[1])))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            if backend.token_to_id(END_OF_TEXT) is not None:
                backend.add_special_tokens([END_OF_TEXT])
    except Exception as error:  # the library raises bare Exception for a bad file
        raise ConfigError(
            f"data.tokenizer: got {name!r}, which cannot be read ({one_line(error)}); "
            f"accepted: {ACCEPTED}"
        ) from None
    named = files[0].name != "tokenizer.json" and len(files) == 1
    return _with_end(name, backend, settings, {} if named else _read_all(files[0].parent))


def _read_all(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer, and those that say how its model is used, by relative name."""
    files = (*tokenizer_files(folder), *usage_files(folder))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _load_hub(name: str) -> DocumentTokenizer:
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # network, missing files, wrong names: all the same to the user
        raise ConfigError(
            f"data.tokenizer: got {name!r}, which is no path and cannot be had from Hugging Face "
            f"({one_line(error)}); accepted: {ACCEPTED}"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"data.tokenizer: got {name!r}, which has no tokenizer.json; accepted: {ACCEPTED}"
        )
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        settings, files = token_settings(Path(folder)), _read_all(Path(folder))
    return replace(_with_end(name, backend, settings, files), revision=_revision(name))


def _revision(name: str) -> str | None:
    """The commit of a Hugging Face tokenizer that was just loaded, by which the cache is sorted."""
    import huggingface_hub

    file = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    return Path(file).parent.name if isinstance(file, str) else None


def _with_end(
    name: str, backend: Any, settings: dict[str, Any], files: dict[str, bytes]
) -> DocumentTokenizer:
    """The tokenizer with its end-of-document token: ``eos_token``, or ``<|endoftext|>``."""
    for token in (declared(settings, "eos_token"), END_OF_TEXT):
        number = None if token is None else backend.token_to_id(token)
        if number is not None:
            return DocumentTokenizer(name, backend, number, settings, files)
    raise ConfigError(
        f"data.tokenizer: got {name!r}, which has no end-of-document token; accepted: one with an "
        f"eos_token in its tokenizer_config.json or a token {END_OF_TEXT}"
    )
