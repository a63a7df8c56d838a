"""Tokenizers from every source, and the lines for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import DataSection
from megatron_progressive.data import tokenizer as room
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from tests.data.small_corpora import (
    config_error,
    listing,
    make_config,
    make_documents,
    write_json_lines,
)

TEXTS = make_documents(60)


def save(folder: Path, eos: str | None = None, end: str = END_OF_TEXT, entries: int = 300) -> Path:
    """A small tokenizer.json, with truncation, padding and a start token, as models have them."""
    from tokenizers import AddedToken, processors

    folder.mkdir(parents=True)
    backend = train_bpe(TEXTS, entries).backend
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    text = backend.to_str().replace(END_OF_TEXT, end)
    (folder / "tokenizer.json").write_text(text)
    if eos:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def test_bpe_is_deterministic_and_bounded() -> None:
    one, two = (train_bpe(TEXTS, 290) for _ in range(2))
    assert one.backend.to_str() == two.backend.to_str()
    assert one.entries == 290
    assert train_bpe(["aaa"], 2000).entries <= 2000
    assert train_bpe(["aaa"], room.SMALLEST_BPE).entries == room.SMALLEST_BPE


def test_encoding_is_lossless_and_ends_each_document() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    texts = [*TEXTS, "\x00\x7f never seen 漢字 \u200b", f"says {END_OF_TEXT} itself"]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokens[-1] == tokenizer.end_of_document
        assert tokenizer.end_of_document not in tokens[:-1]
        assert tokenizer.backend.decode(tokens[:-1].tolist()) == text


def test_folder_ignores_truncation_padding_and_start_token(tmp_path: Path) -> None:
    data = DataSection(tokenizer=str(save(tmp_path / "t")))
    tokenizer = load_tokenizer(data, 400)
    assert tokenizer is not None
    plain = train_bpe(TEXTS, 300)
    for got, expected in zip(tokenizer.encode(TEXTS), plain.encode(TEXTS), strict=True):
        assert got.tolist() == expected.tolist()
    by_file = load_tokenizer(DataSection(tokenizer=str(tmp_path / "t/tokenizer.json")), 400)
    assert by_file is not None
    assert by_file.entries == tokenizer.entries == 301


@pytest.mark.parametrize("prefix", ["", "gpt2_"])
def test_vocabulary_and_merges(tmp_path: Path, prefix: str) -> None:
    trained = train_bpe(TEXTS, 300)
    trained.backend.model.save(str(tmp_path))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / f"{prefix}{name}")
    tokenizer = load_tokenizer(DataSection(tokenizer=str(tmp_path)), 300)
    assert tokenizer is not None
    assert tokenizer.entries == 300
    texts = [*TEXTS, f"says {END_OF_TEXT} itself"]
    for got, expected in zip(tokenizer.encode(texts), trained.encode(texts), strict=True):
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}])
def test_declared_end_token(tmp_path: Path, eos: object) -> None:
    save(tmp_path / "t", end="</s>")
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = load_tokenizer(DataSection(tokenizer=str(tmp_path / "t")), 400)
    assert tokenizer is not None
    assert tokenizer.backend.id_to_token(tokenizer.end_of_document) == "</s>"


def test_stored_tokenizer_is_one_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = load_tokenizer(DataSection(tokenizer=str(save(tmp_path / "t"))), 400)
    assert tokenizer is not None
    tokenizer.save(tmp_path / "stored")
    for loaded in (
        PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "stored")),
        AutoTokenizer.from_pretrained(str(tmp_path / "stored")),
    ):
        assert loaded.eos_token_id == tokenizer.end_of_document
        ids = loaded(TEXTS[0], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(TEXTS[:1])[0][:-1].tolist()


def test_hugging_face_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    real, folder = transformers.AutoTokenizer.from_pretrained, save(tmp_path / "t", eos="<s>")

    def stub(name: str) -> object:
        if name == "owner/model":
            return real(str(folder))
        raise OSError(f"We couldn't connect\nto load {name}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stub)
    tokenizer = load_tokenizer(DataSection(tokenizer="owner/model"), 400)
    assert tokenizer is not None
    assert tokenizer.backend.id_to_token(tokenizer.end_of_document) == "<s>"
    assert len(tokenizer.encode(TEXTS[:1])[0]) == len(train_bpe(TEXTS, 300).encode(TEXTS[:1])[0])
    with config_error("data.tokenizer", "owner/none", "We couldn't connect to load"):
        load_tokenizer(DataSection(tokenizer="owner/none"), 400)


def test_sample_is_of_training_text_and_spread(tmp_path: Path) -> None:
    texts = make_documents(1000)
    corpus = open_corpus(DataSection(corpus=str(write_json_lines(tmp_path / "c.jsonl", texts))))
    everything = room.training_sample(corpus, 0.1)
    assert len(everything) + sum(held for _, held in room.split_documents(texts, 0.1)) == 1000
    sample = room.training_sample(corpus, 0.1, most=20_000)
    assert 8_000 < sum(len(text.encode()) for text in sample) <= 20_000
    assert set(sample[:-1]) <= set(everything)
    assert texts.index(sample[-2]) > 700


def test_error_lines(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "c.jsonl", TEXTS)
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    large, endless = save(tmp_path / "large", entries=310), save(tmp_path / "endless", end="<e>")
    cases = [
        ("data.tokenizer", str(tmp_path / "missing"), ("does not exist", "bpe")),
        ("data.tokenizer", "missing.json", ("does not exist",)),
        ("data.tokenizer", str(tmp_path / "none"), ("without a tokenizer", "merges.txt")),
        ("data.tokenizer", str(tmp_path / "bad.json"), ("cannot be read",)),
        ("data.tokenizer", str(endless), ("no end-of-document token", "eos_token")),
        ("data.vocab_size", str(large), ("got 302;", "at least 311", str(large))),
    ]
    for field, tokenizer, parts in cases:
        config = make_config(tmp_path, corpus, tokenizer=tokenizer, vocab_size=302)
        before = listing(tmp_path)
        for act in (data_room.check, data_room.prepare):
            with config_error(field, *parts):
                act(config)
        assert listing(tmp_path) == before
    with config_error("data.vocab_size", "got 256", "at least 257"):
        data_room.check(make_config(tmp_path, corpus, vocab_size=256))


def test_end_token_of_the_special_tokens_map(tmp_path: Path) -> None:
    """As transformers has it: the map goes first, unless the settings list the added tokens."""
    folder = save(tmp_path / "t", eos="<s>", end="</s>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    data = DataSection(tokenizer=str(folder))

    def end() -> str | None:
        tokenizer = load_tokenizer(data, 400)
        assert tokenizer is not None
        return tokenizer.backend.id_to_token(tokenizer.end_of_document)

    before = room.identity(data, 400)
    assert end() == "</s>"
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert end() == "</s>"
    (folder / "tokenizer_config.json").unlink()
    assert end() == "</s>"
    settings = {"eos_token": "<s>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert end() == "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert room.identity(data, 400) == before
    (folder / "special_tokens_map.json").write_text("{}")
    assert room.identity(data, 400) != before
    (folder / "special_tokens_map.json").write_text("{")
    with config_error("data.tokenizer", "special_tokens_map.json, which is not JSON"):
        load_tokenizer(data, 400)


def test_all_of_a_folder_is_stored(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", eos=END_OF_TEXT)
    others = {"special_tokens_map.json": '{"pad_token": "<s>"}', "chat_template.jinja": "{{ 1 }}",
              "additional_chat_templates/tools.jinja": "{{ 2 }}", "added_tokens.json": "{}",
              "generation_config.json": '{"eos_token_id": [0, 1]}'}  # fmt: skip
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text("not of the tokenizer")
    for name in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(DataSection(tokenizer=str(name)), 400)
        assert tokenizer is not None
        tokenizer.encode(TEXTS)
        stored = tmp_path / f"stored_{name.name}"
        tokenizer.save(stored)
        for file in (*others, "tokenizer.json", "tokenizer_config.json"):
            assert (stored / file).read_bytes() == (folder / file).read_bytes(), file
        assert not (stored / "README.md").exists()


def test_all_of_a_hugging_face_name_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    real, folder = transformers.AutoTokenizer.from_pretrained, save(tmp_path / "t", eos="<s>")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: real(str(folder))
    )
    tokenizer = load_tokenizer(DataSection(tokenizer="owner/model"), 400)
    assert tokenizer is not None
    tokenizer.save(tmp_path / "stored")
    loaded = real(str(tmp_path / "stored"))
    chat = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "hello!"
    assert (loaded.eos_token, loaded.pad_token) == ("<s>", END_OF_TEXT)
