"""How many bytes of text each token of a tokenizer stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_progressive.data.manifest import TOKENIZER, read_manifest

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # what SentencePiece writes for a space


def bytes_of_tokens(folder: Path) -> list[int] | None:
    """The number of bytes of text that each token of a prepared corpus stands for
    (:func:`token_bytes`).

    Raises:
        ConfigError: the folder is no prepared corpus.
    """
    manifest = read_manifest(folder)
    try:
        return token_bytes(folder / TOKENIZER, manifest.end_of_document, manifest.vocab_size)
    except (OSError, ValueError):
        return None


def token_bytes(folder: Path, end_of_document: int, entries: int) -> list[int] | None:
    """The number of bytes of UTF-8 text that each token stands for.

    In byte-level vocabularies each character of a token is one byte; in those of SentencePiece
    ``<0xNN>`` is one byte and ``▁`` is a space. The end of a document is no text: it has 0. The sum
    over the tokens of a document is the size of its text, after the normalisation that the
    tokenizer may do, and with the space that some tokenizers put before it.

    Args:
        folder: the folder of the tokenizer, with ``tokenizer.json``.
        end_of_document: the token that ends a document.
        entries: the number of entries of the result, at least that of the vocabulary.

    Returns: the numbers by token, 0 for numbers that are no token; None for vocabularies that do
        not tell, such as WordPiece's.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    kinds = _kinds(content.get("decoder")) | _kinds(content.get("pre_tokenizer"))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not ({"Metaspace", "ByteFallback"} & kinds or _replaces_space(content)):
        return None
    added = {entry["id"] for entry in content.get("added_tokens", ())}
    found = [0] * entries
    for token, number in Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).items():
        if number == end_of_document or number >= entries:
            continue
        if not byte_level and _BYTE.fullmatch(token):
            found[number] = 1
        elif number in added:
            found[number] = len(token.encode())
        else:
            found[number] = len(token if byte_level else token.replace(_SPACE, " ").encode())
    return found


def _kinds(part: Any) -> set[str]:
    """The types of a part of ``tokenizer.json``, and of those that a sequence consists of."""
    if not isinstance(part, dict):
        return set()
    inner = [*part.get("decoders", ()), *part.get("pretokenizers", ())]
    return {str(part.get("type"))}.union(*(_kinds(one) for one in inner))


def _replaces_space(content: dict[str, Any]) -> bool:
    """Whether the decoder turns ``▁`` into a space."""
    return _SPACE in json.dumps(content.get("decoder"), ensure_ascii=False)
