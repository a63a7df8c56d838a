"""Documents of every kind of corpus, the split, and the lines for what is wrong."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import DataSection
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.reading import PIECE_BYTES
from tests.data.small_corpora import (
    config_error,
    listing,
    make_config,
    make_documents,
    write_json_lines,
)


def read(corpus: object, **more: object) -> list[str]:
    return list(open_corpus(DataSection(corpus=str(corpus), **more)).documents())  # type: ignore[arg-type]


def test_folder_is_one_document_a_file_in_sorted_order(tmp_path: Path) -> None:
    texts = {"b.md": "# b", "a/z.txt": "é", "a/y.py": "y = 1\r\n", "c": "no suffix"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 50)
    (tmp_path / "picture.png").write_bytes(b"PNG\0\1\2")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("hidden")
    (tmp_path / "d.jsonl").write_text('{"text": "from json"}\n\n{"text": null}\n')
    assert read(tmp_path) == ["y = 1\r\n", "é", "# b", "no suffix", "from json"]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n", ""])
def test_single_file_is_cut_and_nothing_is_lost(tmp_path: Path, separator: str) -> None:
    paragraphs = [f"{n} " + "ÿ世🙂x" * 40 for n in range(5000)]
    text = separator.join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = read(path)
    assert "".join(pieces) == text
    sizes = [len(piece.encode()) for piece in pieces]
    assert max(sizes) <= 2 * PIECE_BYTES
    assert min(sizes[:-1]) >= PIECE_BYTES
    if separator:
        assert all(piece.endswith(separator) for piece in pieces[:-1])


def test_small_single_file_still_has_documents_to_hold_out(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("\n\n".join(f"note {n} " + "word " * 20 for n in range(100)))
    assert len(read(path)) >= 5


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet"])
def test_rows(tmp_path: Path, ending: str) -> None:
    texts = [*make_documents(20), "two\nlines \u2028 here"]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"id": range(21), "body": texts}), path)
    else:
        content = write_json_lines(tmp_path / "plain", texts, "body").read_bytes()
        compress = {"gz": gzip.compress, "xz": lzma.compress}.get(ending.rpartition(".")[2], bytes)
        path.write_bytes(compress(content))
    assert read(path, text_field="body") == texts


def test_half_a_surrogate_pair_does_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "bad \\ud83d end"}\n')
    assert read(tmp_path / "c.jsonl") == ["bad \ufffd end"]


def test_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = make_documents(7)
    write_json_lines(tmp_path / "set/train.jsonl", texts)
    write_json_lines(tmp_path / "set/test.jsonl", ["not this one"])
    assert read(f"hf:{tmp_path}/set") == texts
    with config_error("data.text_field", "body", "id, text"):
        read(f"hf:{tmp_path}/set", text_field="body")


def test_max_bytes_counts_utf8(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "c.jsonl", ["aé", "bcd", "世界", "never"])
    path = tmp_path / "c.jsonl"
    assert read(path, max_bytes=6) == ["aé", "bcd"]
    assert read(path, max_bytes=11) == ["aé", "bcd", "世"]  # 界 does not fit whole
    assert read(path, max_bytes=0) == ["aé", "bcd", "世界", "never"]


def test_stdlib_is_there_and_stays_within_max_bytes() -> None:
    documents = read("stdlib", max_bytes=300_000)
    assert sum(len(text.encode()) for text in documents) == 300_000
    assert documents[0].startswith('"""Record of phased-in')  # __future__.py is the first
    corpus = open_corpus(DataSection())
    names = [path.relative_to(corpus.root or "").as_posix() for path in corpus.files()]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not {"test", "tests", "site-packages"} & {part for n in names for part in n.split("/")}
    assert corpus.identity()[0] == "stdlib"


def test_packages_are_the_sources_of_what_is_needed_here() -> None:
    corpus = open_corpus(DataSection(corpus="packages", max_bytes=300_000))
    names = [path.relative_to(corpus.root or "").as_posix() for path in corpus.files()]
    assert names == sorted(names)
    # direct, through others, and not what only tests or documentation need, nor this package
    assert {"torch/nn/modules/linear.py", "megatron/core/parallel_state.py"} <= set(names)
    assert "markupsafe/__init__.py" in names
    assert not {"pytest", "mkdocs", "ruff", "megatron_progressive"} & {
        n.split("/")[0] for n in names
    }
    assert sum(path.stat().st_size for path in corpus.files()) > 200e6
    assert corpus.name == "packages"
    read_some = list(corpus.documents())
    assert sum(len(text.encode()) for text in read_some) == 300_000
    assert corpus.identity() == open_corpus(DataSection(corpus="packages")).identity()


BROKEN: dict[str, tuple[dict[str, bytes], dict[str, object], str, tuple[str, ...]]] = {
    "missing": ({}, {"corpus": "no/such"}, "data.corpus", ("no/such", "not exist", "stdlib")),
    "no name": ({}, {"corpus": "hf:"}, "data.corpus", ("hf:NAME",)),
    "no data set": ({}, {"corpus": "hf:/no/such/set"}, "data.corpus", ("hf:/no/such/set",)),
    "blank": ({"a.txt": b" \n\n"}, {}, "data.corpus", ("no text",)),
    "binary": ({"a.bin": b"\0\1\2"}, {}, "data.corpus", ("no text",)),
    "line": ({"a.jsonl": b'{"text": "x"}\n{"te'}, {}, "data.corpus", ("line 2", "not JSON")),
    "list": ({"a.jsonl": b"[1]\n"}, {}, "data.corpus", ("no JSON object",)),
    "field": (
        {"a.jsonl": b'{"body": "x", "n": 1}\n'},
        {},
        "data.text_field",
        ("'text'", "body, n"),
    ),
    "kind": ({"a.jsonl": b'{"text": [1]}\n'}, {}, "data.text_field", ("holds list",)),
    "cut": (
        {"a.jsonl.gz": gzip.compress(json.dumps({"text": "x" * 999}).encode())[:-12]},
        {},
        "data.corpus",
        ("damaged", "EOFError"),
    ),
    "cut xz": (
        {"a.jsonl.xz": lzma.compress(json.dumps({"text": "x" * 999}).encode())[:-12]},
        {},
        "data.corpus",
        ("damaged",),
    ),
    "no xz": ({"a.jsonl.xz": b"plain"}, {}, "data.corpus", ("damaged", "LZMAError")),
    "parquet": ({"a.parquet": b"PAR1 not really"}, {}, "data.corpus", ("a Parquet file",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_error_lines(tmp_path: Path, case: str) -> None:
    files, more, field, parts = BROKEN[case]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = make_config(tmp_path, more.get("corpus", folder))
    before = listing(tmp_path)
    with config_error(field, *parts):
        data_room.check(config)
    assert listing(tmp_path) == before
    with config_error(field, *parts):
        data_room.prepare(config, lambda *_: None)
    assert not [name for name in listing(tmp_path) if ".tmp" in name]


def test_empty_folder_and_missing_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "empty").mkdir()
    with config_error("data.corpus", "no text"):
        read(tmp_path / "empty")
    pa.parquet.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "c.parquet")
    with config_error("data.text_field", "id, body"):
        read(tmp_path / "c.parquet")


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/set'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with config_error("data.corpus", "hf:owner/set", "Couldn't reach 'owner/set' on the Hub"):
        data_room.check(make_config(tmp_path, "hf:owner/set:plain"))
