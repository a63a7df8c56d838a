"""The split: by content, and copies of a document on one side."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import DataSection
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.reading import LARGE_FILE_BYTES
from megatron_progressive.data.split import (
    SHINGLE_BYTES,
    content_hash,
    near_hash,
    normalised,
    split_documents,
)
from tests.data.small_corpora import make_config, make_documents, quiet, write_json_lines


def test_split_is_by_content() -> None:
    texts = make_documents(2000)
    sides = dict(split_documents(texts, 0.1))
    assert 140 < sum(sides.values()) < 260
    # where a document stands, how often, and what else is there change nothing
    again = list(split_documents([*texts[1500:], *texts[::-1], *texts[:10]], 0.1))
    assert all(sides[text] == held_out for text, held_out in again)
    assert len(again) == 2510
    larger = dict(split_documents(texts, 0.2))
    assert all(larger[text] for text in texts if sides[text])


@pytest.mark.parametrize("seed", range(5))
def test_split_of_a_few_documents_holds_one_out(seed: int) -> None:
    texts = make_documents(6, seed) * 2
    pairs = list(split_documents(texts, 0.0001))
    assert sorted(text for text, _ in pairs) == sorted(texts)
    held_out = [text for text, held_out in pairs if held_out]
    assert len(held_out) == 2
    assert len(set(held_out)) == 1
    assert held_out[0] not in [text for text, held_out in pairs if not held_out]


COPIES: dict[str, Callable[[str], str]] = {
    "newline at the end": lambda text: text + "\n",
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "indented": lambda text: "  " + text.replace("\n", "\n  "),
    "wrapped otherwise": lambda text: text.replace(" ", "\n", 3),
    "non-breaking spaces": lambda text: text.replace(" ", "\u00a0"),
    "wide spaces": lambda text: text.replace(" ", "\u3000"),
    "zero-width space": lambda text: text.replace(" ", " \u200b", 1),
    "byte order mark": lambda text: "\ufeff" + text,
    "decomposed accents": lambda text: unicodedata.normalize("NFD", text),
    "capitals": str.upper,
}


@pytest.mark.parametrize("what", COPIES)
def test_copies_stand_on_one_side(what: str) -> None:
    texts = [f"café ﬁne {text} straße" for text in make_documents(300)] + ["plain words", "x = 1"]
    copies = [COPIES[what](text) for text in texts]
    assert any(copy != text for copy, text in zip(copies, texts, strict=True))
    assert [content_hash(copy) for copy in copies] == [content_hash(text) for text in texts]
    assert len({content_hash(text) for text in texts}) == len(texts)
    sides = dict(split_documents([*texts, *copies], 0.2))
    assert all(sides[copy] == sides[text] for copy, text in zip(copies, texts, strict=True))


def test_no_held_out_document_has_a_copy_in_training(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    texts = make_documents(400)
    corpus = write_json_lines(tmp_path / "c.jsonl", [*texts, *(text + "\n" for text in texts)])
    folder = data_room.prepare(make_config(tmp_path, corpus, validation_fraction=0.1), quiet)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    found = {}
    for split in ("train", "validation"):
        rows = indexed_dataset().IndexedDataset(str(folder / split))
        found[split] = [tokenizer.decode(rows.get(n)[:-1].tolist()) for n in range(len(rows))]
    trained_on = {text.strip() for text in found["train"]}
    leaks = [text for text in found["validation"] if text.strip() in trained_on]
    assert len(found["validation"]) > 40
    assert leaks == []


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_pieces_of_a_copy_are_those_of_the_other_file(tmp_path: Path, separator: str) -> None:
    rng = random.Random(1)
    lines = [f"{n} " + "word " * rng.randrange(1, 60) for n in range(32_000)]
    text = separator.join(lines)
    assert len(text) > LARGE_FILE_BYTES
    copies = {"a.txt": text, "b.txt": "a header\n\n" + text, "c.txt": text.replace("\n", "\r\n")}
    pieces = {}
    for name, copy in copies.items():
        (tmp_path / name).write_bytes(copy.encode())
        data = DataSection(corpus=str(tmp_path / name))
        pieces[name] = {content_hash(piece) for piece in open_corpus(data).documents()}
    for name in ("b.txt", "c.txt"):
        assert len(pieces["a.txt"] & pieces[name]) > 0.9 * len(pieces["a.txt"]), name


def jaccard(one: str, other: str) -> float:
    """The share of pieces that both have, of those that either has."""
    first, second = (
        {content[at : at + SHINGLE_BYTES] for at in range(len(content) - SHINGLE_BYTES + 1)}
        for content in map(normalised, (one, other))
    )
    return len(first & second) / len(first | second)


def prose(rng: random.Random, words: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(words)]


@pytest.mark.parametrize("changed", [0, 1, 10, 60])
def test_near_copies_share_their_hash_as_often_as_their_pieces(changed: int) -> None:
    """The property of MinHash, against the Jaccard similarity counted with sets."""
    rng = random.Random(changed)
    same, similarities = 0, []
    for _ in range(400):
        words = prose(rng, 200)
        other = list(words)
        for place in rng.sample(range(200), changed):
            other[place] = "changed"
        one, two = " ".join(words), "\n".join(other)
        same += near_hash(one) == near_hash(two)
        similarities.append(jaccard(one, two))
    expected = sum(similarities) / 400
    assert abs(same / 400 - expected) < 3.5 * (expected * (1 - expected) / 400) ** 0.5 + 1e-9


def test_near_hash_is_uniform_and_that_of_copies() -> None:
    rng = random.Random(1)
    texts = [" ".join(prose(rng, 60)) for _ in range(2000)] + ["short", "x = 1"]
    sides = dict(split_documents(texts, 0.1, near=True))
    assert 140 < sum(sides.values()) < 260
    for name, copy in COPIES.items():
        for text in texts[-20:]:
            assert near_hash(copy(text)) == near_hash(text), name
