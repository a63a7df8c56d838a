"""Formats, compressions and encodings of files, and the lines for those that cannot be read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_progressive.config import DataSection
from megatron_progressive.data import records, tally
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.tally import Tally
from tests.data.small_corpora import config_error, make_documents

TEXTS = [*make_documents(20), 'two\nlines \u2028 "here"; \t, end']


def read(corpus: Path, **more: object) -> tuple[list[str], Tally]:
    found = Tally()
    data = DataSection(corpus=str(corpus), **more)  # type: ignore[arg-type]
    return list(open_corpus(data).documents(found)), found


def zstandard(content: bytes) -> bytes:
    import pyarrow

    half = len(content) // 2  # two frames, as of files that were appended
    parts = (content[:half], content[half:])
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in parts)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard,
    ".GZ": gzip.compress, ".zstd": zstandard,
}  # fmt: skip


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts)).encode()


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"id": 1, "text": text} for text in texts], indent=1).encode()


def json_one_after_the_other(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"text": text, "a": [{}]}, indent=2) for text in texts).encode()


def table(delimiter: str) -> Callable[[list[str]], bytes]:
    def write(texts: list[str]) -> bytes:
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
        return file.getvalue().encode()

    return write


def parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    file = io.BytesIO()
    pa.parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), file)
    return file.getvalue()


def parquet_of_bytes(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    file = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": [text.encode() for text in texts]}), file)
    return file.getvalue()


def arrow(kind: str) -> Callable[[list[str]], bytes]:
    def write(texts: list[str]) -> bytes:
        import pyarrow as pa
        import pyarrow.ipc

        rows = pa.table({"text": texts, "id": list(range(len(texts)))})
        file = io.BytesIO()
        open_writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with open_writer(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
        return file.getvalue()

    return write


NAMES: dict[str, tuple[Callable[[list[str]], bytes], str]] = {
    "a.jsonl": (json_lines, "JSON"), "a.JSONL": (json_lines, "JSON"),
    "a.ndjson": (json_lines, "JSON"), "a.json": (json_lines, "JSON"),
    "lines.txt": (json_lines, "JSON"), "part-00000": (json_lines, "JSON"),
    "b.json": (json_array, "JSON"), "b.jsonl": (json_array, "JSON"), "b.txt": (json_array, "JSON"),
    "c.Json": (json_one_after_the_other, "JSON"), "d.csv": (table(","), "CSV"),
    "d.TSV": (table("\t"), "TSV"), "semicolons.csv": (table(";"), "CSV"),
    "e.parquet": (parquet, "Parquet"), "e.PQ": (parquet, "Parquet"), "blob": (parquet, "Parquet"),
    "f.parquet": (parquet_of_bytes, "Parquet"), "g.arrow": (arrow("stream"), "Arrow"),
    "g.feather": (arrow("file"), "Arrow"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_records(tmp_path: Path, name: str, compression: str) -> None:
    write, kind = NAMES[name]
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSIONS[compression](write(TEXTS)))
    texts, found = read(path)
    assert texts == TEXTS
    assert found == Tally(files_read={kind: 1})


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
def test_plain_text_is_decompressed_whatever_its_name(tmp_path: Path, compression: str) -> None:
    content = "\n\n".join(TEXTS * 200).encode()
    (tmp_path / "plain.txt").write_bytes(content)
    expected, _ = read(tmp_path / "plain.txt")
    for name in [f"a.txt{compression}", *(["no_suffix"] if compression != ".zst" else [])]:
        (tmp_path / name).write_bytes(COMPRESSIONS[compression](content))
        texts, found = read(tmp_path / name)
        assert texts == expected  # the same pieces
        assert found.files_read == {"plain text": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "d.csv"])
def test_byte_order_marks_of_records(tmp_path: Path, encoding: str, name: str) -> None:
    text = NAMES[name][0](TEXTS).decode()
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_bytes((mark + text).encode(encoding))
    texts, found = read(tmp_path / name)
    assert texts == TEXTS
    assert found.replaced_documents == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_of_plain_text(tmp_path: Path, encoding: str) -> None:
    long = "\n\n".join(make_documents(20_000))
    for name, text in (("a.txt", TEXTS[0]), ("b.txt", long)):
        (tmp_path / name).write_bytes(text.encode(encoding))
    texts, found = read(tmp_path)
    assert texts[0] == TEXTS[0]
    assert "".join(texts[1:]) == long
    assert len(texts) > 20  # the long one is cut
    assert found == Tally(files_read={"plain text": 2})


def test_mark_of_a_file_that_was_appended_and_one_in_a_field(tmp_path: Path) -> None:
    with_mark = b"\xef\xbb\xbf" + json_lines(["one"])
    (tmp_path / "a.jsonl").write_bytes(with_mark + with_mark + json_lines(["\ufefftwo"]))
    assert read(tmp_path / "a.jsonl")[0] == ["one", "one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_one_bad_byte_is_replaced_and_counted(tmp_path: Path, name: str) -> None:
    texts = ["plain words " * 60 + str(n) for n in range(200)]
    texts[150] = "pl@in" + texts[150]
    if name == "a.parquet":
        import pyarrow as pa
        import pyarrow.parquet

        raw = [text.encode().replace(b"@", b"\xff") for text in texts]
        column = pa.array(raw, pa.binary())
        strings = pa.Array.from_buffers(pa.string(), len(raw), column.buffers())
        pa.parquet.write_table(pa.table({"text": strings}), tmp_path / name)
    else:
        write = {"a.txt": lambda rows: "\n\n".join(rows).encode(), "a.csv": table(",")}.get(name)
        content = (write or NAMES[name][0])(texts)
        (tmp_path / name).write_bytes(content.replace(b"@", b"\xff"))
    (tmp_path / "good.jsonl").write_bytes(json_lines(["good"]))
    texts_found, found = read(tmp_path)
    assert "good" in texts_found
    expected = [text.replace("@", "\ufffd") for text in texts]
    rest = [text for text in texts_found if text != "good"]
    assert rest == (["\n\n".join(expected)] if name == "a.txt" else expected)
    assert (found.replaced_documents, found.replaced_example) == (1, name)
    assert not found.left_out
    assert f"in 1 document ({name})" in found.lines()[-1]


LATIN = "Ça a déjà été dit à l'été. ".encode("latin-1") * 300
NOISE = bytes(range(256)) * 40
TAR = b"a.txt" + b"\0" * 252 + b"ustar" + b"\0" * 999
PDF = b"%PDF-1.7\n%\xb5\xed\xae\xfb\n" + b"obj " * 99
BIG_OBJECT = json.dumps({"data": [{"text": "x"}]}, indent=2).encode()
LOG = b'{"level": "info", "n": 1}\n' * 3

# name, content, reason, and the line where the file is all there is: its field and a part of it
LEFT_OUT: list[tuple[str, bytes, str, str, str]] = [
    ("latin.txt", LATIN, tally.NOT_UTF8, "corpus", "iconv"),
    ("russian.txt", "Привет, мир. ".encode("cp1251") * 300, tally.NOT_UTF8, "corpus", "iconv"),
    ("gbk.jsonl", '{"text": "世界和平世界和平"}'.encode("gbk"), tally.NOT_UTF8, "corpus", "iconv"),
    ("no_mark.txt", ("words " * 300).encode("utf-16-le"), tally.BINARY, "corpus", "binary"),
    ("picture.png", b"\x89PNG\r\n\x1a\n" + NOISE, tally.BINARY, "corpus", "JSON lines"),
    ("a.zip", b"PK\x03\x04" + NOISE, tally.ARCHIVE, "corpus", "unpack it"),
    ("a.tar.gz", gzip.compress(TAR), tally.ARCHIVE, "corpus", "unpack it"),
    ("a.tgz", gzip.compress(TAR), tally.ARCHIVE, "corpus", "unpack it"),
    ("paper.pdf", PDF, tally.OFFICE, "corpus", "convert it to plain text"),
    ("letter.docx", b"PK\x03\x04" + NOISE, tally.OFFICE, "corpus", "convert it"),
    ("empty.txt", b"", tally.EMPTY, "corpus", "no text"),
    ("empty.parquet", b"", tally.EMPTY, "corpus", "no text"),
    ("empty.jsonl.gz", gzip.compress(b""), tally.EMPTY, "corpus", "no text"),
    ("mark.txt", b"\xef\xbb\xbf", tally.EMPTY, "corpus", "no text"),
    ("blank.txt", b" \n\n", tally.WITHOUT_TEXT, "corpus", "no text"),
    ("blank.csv", b"\n", tally.WITHOUT_TEXT, "text_field", "(none)"),
    ("null.jsonl", b'{"text": null}\n', tally.WITHOUT_TEXT, "corpus", "no text"),
    ("nothing.json", b"[]", tally.WITHOUT_TEXT, "corpus", "no text"),
    ("settings.json", b'{"a": {"b": 1}}', tally.NO_RECORDS, "text_field", "(a.b)"),
    ("object.json", BIG_OBJECT, tally.NO_RECORDS, "text_field", "(data)"),
    ("comments.json", b'{\n // no JSON\n "a": 1}', tally.NO_RECORDS, "corpus", "an array"),
    ("numbers.json", b"[1, 2]", tally.NO_RECORDS, "corpus", "JSON lines or an array"),
    ("log", LOG, tally.NO_RECORDS, "text_field", "(level, n)"),
    ("other.csv", b"a,b\n1,2\n", tally.NO_COLUMN, "text_field", "(a, b)"),
]


@pytest.mark.parametrize("case", LEFT_OUT, ids=[case[0] for case in LEFT_OUT])
def test_left_out_of_a_folder_with_a_word_and_refused_alone(
    tmp_path: Path, case: tuple[str, bytes, str, str, str]
) -> None:
    name, content, reason, field, part = case
    (tmp_path / "z.jsonl").write_bytes(json_lines(["good"]))
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / name
    path.write_bytes(content)
    texts, found = read(tmp_path)
    assert texts == ["good"]
    assert found.files_read == {"JSON": 1}
    assert found.left_out == {reason: tally.LeftOut(1, len(content), f"sub/{name}")}
    line = found.left_out_line()
    assert line.startswith("left out 1 of 2 files ("), line
    assert f"1 {reason} (sub/{name}" in line
    with config_error(f"data.{field}", part, name):
        read(path)


def test_hidden_files_and_a_stray_zero_byte(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("hidden")
    (tmp_path / ".DS_Store").write_bytes(b"\0" * 10)
    (tmp_path / "a.txt").write_bytes(b"some words " * 50 + b"\0" + b" and more " * 50)
    texts, found = read(tmp_path)
    assert len(texts) == 1
    assert texts[0].count("\0") == 1
    assert {why: entry.files for why, entry in found.left_out.items()} == {"hidden": 2}
    assert found.left_out["hidden"].example == ".DS_Store"


def test_all_left_out_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG" + bytes(range(256)))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 50)
    with config_error("data.corpus", "no text", "2 of 2 files", "1 binary (a.png)", "(latin.txt;"):
        read(tmp_path)


def test_files_behind_max_bytes_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("words " * 10)
    _, found = read(tmp_path, max_bytes=70)
    assert found.files_read == {"plain text": 2}
    assert found.files_not_reached == 3
    assert found.lines() == ["read 2 files (2 plain text), 3 after data.max_bytes were not"]


DAMAGED = {
    "cut.json": (json_array(TEXTS)[:-30], "record 21 is not JSON or cut short"),
    "no comma.json": (b'[{"text": "a"} {"text": "b"}]', "record 2"),
    "middle.jsonl": (b'{"text": "a"}\n\n{"text": b}\n{"text": "c"}\n', "line 3"),
    "cut.csv": (b'text\n"a"\n"b', "not CSV at line 3"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", "3 columns at line 3"),
    "cut.txt.zst": (zstandard(b"words " * 9999)[:-9], "damaged"),
    "cut.txt.bz2": (bz2.compress(b"words " * 9999)[:-9], "damaged"),
    "plain.txt.gz": (b"words", "damaged (BadGzipFile"),
    "cut.parquet": (parquet(TEXTS)[:-9], "a Parquet file"),
    "cut.arrow": (arrow("stream")(TEXTS)[:-300], "an Arrow file"),
    "half.txt": ("words".encode("utf-16")[:-1], "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_a_folder_as_well(tmp_path: Path, name: str) -> None:
    content, needed = DAMAGED[name]
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with config_error("data.corpus", needed, name):
        read(tmp_path)


def test_long_documents_are_told_by_their_beginning(tmp_path: Path) -> None:
    texts = ["long " * 30_000, "short"]
    for name in ("a.json", "b.txt", "c.jsonl"):
        (tmp_path / name).write_bytes(json_lines(texts))
    (tmp_path / "d.json").write_bytes(json_array(texts))
    (tmp_path / "e.csv").write_bytes(table(",")(texts))
    assert read(tmp_path)[0] == texts * 5


def test_a_value_without_an_end_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LARGEST_VALUE", 1 << 17)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'[{"text": "a"}, {"text": "' + b"b" * (1 << 20))
    with config_error("data.corpus", "record 2"):
        read(path)


def test_code_that_looks_like_json_stays_plain_text(tmp_path: Path) -> None:
    codes = {
        "a.py": '{"text": "a"}["text"]\n',
        "b.js": "[1, 2].map(f)\n",
        "c.tex": "{\\bf bold}\n",
        "d.md": '[{"a": 1}](link)\n',
        "e": '{"name": "one object"}\n',
    }
    for name, text in codes.items():
        (tmp_path / name).write_text(text)
    texts, found = read(tmp_path)
    assert texts == list(codes.values())
    assert found.files_read == {"plain text": 5}
