"""How many bytes of text tokens stand for: those of the text that they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_progressive.data.token_bytes import token_bytes
from megatron_progressive.data.tokenizer import train_bpe
from megatron_progressive.data.validation import bits_per_byte
from tests.data.small_corpora import make_documents

TEXTS = [*make_documents(30), "naïve\r\n\tcafé 🙂🙂", "  two  spaces", "日本語"]


def test_byte_level_tokens_have_the_bytes_of_their_text(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 400)
    tokenizer.save(tmp_path / "t")
    lengths = token_bytes(tmp_path / "t", tokenizer.end_of_document, 400)
    assert lengths is not None
    assert lengths[tokenizer.end_of_document] == 0
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert sum(lengths[token] for token in row) == len(text.encode())


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 has it: spaces are ▁, and what is not in the vocabulary becomes bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )  # fmt: skip
    tokenizer.train_from_iterator(["the river a tree the tree"] * 3, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def test_pieces_and_bytes_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lengths = token_bytes(tmp_path, tokenizer.token_to_id("</s>"), 330)
    assert lengths is not None
    for text in ("the tree", "a 🙂 river", "naïve"):
        found = sum(lengths[token] for token in tokenizer.encode(text).ids)
        assert found == len(f" {text}".encode())  # with the space before it


def test_word_pieces_do_not_tell(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(tmp_path, 0, 3) is None


def test_bits_per_byte() -> None:
    # 8 tokens of 2 bytes each, half a bit a byte: one bit, ln 2 nats, a token
    assert bits_per_byte(0.6931471805599453, 8, 16) == pytest.approx(0.5)
