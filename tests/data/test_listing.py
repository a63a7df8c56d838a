"""Files of a folder: links, hidden files, what may not be read."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import DataSection
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.manifest import read_manifest
from megatron_progressive.data.tally import Tally
from tests.data.small_corpora import config_error, listing, make_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder ``corpus`` with one file, beside a folder ``other`` with two."""
    for name in ("corpus/a.txt", "other/b.txt", "other/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {Path(name).stem}")
    return tmp_path / "corpus"


def read(folder: Path) -> tuple[list[str], dict[str, tuple[int, str]]]:
    tally = Tally()
    texts = list(open_corpus(DataSection(corpus=str(folder))).documents(tally))
    return texts, {why: (entry.files, entry.example) for why, entry in tally.left_out.items()}


def test_links_to_folders_and_files_are_followed(folder: Path) -> None:
    (folder / "link").symlink_to("../other")
    (folder / "z.txt").symlink_to("../other/b.txt")
    assert read(folder) == (["text of a", "text of b", "text of c", "text of b"], {})


def test_corpus_of_links_alone_and_a_link_for_a_corpus(folder: Path) -> None:
    links = folder.parent / "links"
    links.mkdir()
    (links / "one").symlink_to(folder)
    (links / "two").symlink_to(folder.parent / "other")
    assert read(links)[0] == ["text of a", "text of b", "text of c"]
    (folder.parent / "root").symlink_to(links)
    assert read(folder.parent / "root")[0] == ["text of a", "text of b", "text of c"]


def test_circles_end(folder: Path) -> None:
    (folder / "self").symlink_to(".")
    (folder / "above").symlink_to("../..")
    (folder / "there").symlink_to("../other")
    (folder.parent / "other/back").symlink_to("../corpus")
    (folder.parent / "other/deep/again").symlink_to("../../other")
    (folder / "loop").symlink_to("loop")
    texts, left_out = read(folder)
    assert texts == ["text of a", "text of b", "text of c"]
    assert left_out == {
        "linked to a folder that is read anyway": (3, "self"),
        "linked to a folder that holds the corpus": (1, "above"),
        "linked to nothing": (1, "loop"),
    }


def test_folder_that_is_linked_twice_is_read_once(folder: Path) -> None:
    (folder / "1").symlink_to("../other")
    (folder / "2").symlink_to("../other")
    (folder / "3").symlink_to("../other/deep")
    texts, left_out = read(folder)
    assert texts == ["text of b", "text of c", "text of a"]
    assert left_out == {"linked to a folder that is read anyway": (2, "2")}


def test_what_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nowhere").symlink_to("no/such")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # a socket's path is short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind("socket")
        texts, left_out = read(folder)
    assert texts == ["text of a"]
    assert left_out == {"linked to nothing": (1, "nowhere"), "not regular": (2, "pipe")}


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling", "long", "circle"])
def test_corpus_that_is_no_file_and_no_folder(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("no/such")
    (tmp_path / "circle").symlink_to("circle")
    path = {"device": Path("/dev/null"), "long": tmp_path / ("x" * 300)}.get(kind, tmp_path / kind)
    with config_error("data.corpus", path.name, "stdlib, packages, a file or folder"):
        data_room.check(make_config(tmp_path / "out", path))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    name = os.fsdecode(b"\xff")
    pa.parquet.write_table(pa.table({"text": ["from Parquet"]}), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / f"a{name}.parquet")
    (tmp_path / f"b{name}.txt").write_bytes(b"words\xff")
    packed = pa.compress(b"packed words", "zstd", asbytes=True)
    (tmp_path / f"c{name}.txt.zst").write_bytes(packed)
    (tmp_path / f"d{name}").write_bytes(bytes(range(256)))
    config = make_config(tmp_path.parent / f"{tmp_path.name}-out", tmp_path)
    manifest = read_manifest(data_room.prepare(config))  # type: ignore[arg-type]
    assert manifest.reading is not None
    assert manifest.reading.files_read == {"Parquet": 1, "plain text": 2}
    assert manifest.reading.left_out["binary"].example == f"d{name}"


def test_run_folder_in_a_linked_folder(folder: Path) -> None:
    (folder / "link").symlink_to("../other")
    before = listing(folder.parent)
    with config_error("run.dir", "inside corpus"):
        data_room.check(make_config(folder.parent / "other", folder))
    assert listing(folder.parent) == before


@pytest.fixture
def for_anyone() -> Iterator[Path]:
    """A folder that any user may go through, and a user that is not root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        (Path(name) / "corpus/sub").mkdir(parents=True)
        (Path(name) / "corpus/a.txt").write_text("text")
        (Path(name) / "corpus/sub/b.txt").write_text("text")
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield Path(name) / "corpus"
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize(
    ("closed", "mode"), [("sub", 0), ("sub", 0o444), ("sub/b.txt", 0), ("a.txt", 0)]
)
def test_what_may_not_be_read_is_an_error(for_anyone: Path, closed: str, mode: int) -> None:
    path = for_anyone / closed
    before, mine = path.stat().st_mode, os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(mode)
    os.seteuid(mine)
    with config_error("data.corpus", str(path), "may not read"):
        data_room.check(make_config(for_anyone.parent, for_anyone))
    with config_error("data.corpus", str(path), "may not read"):  # hours before it is its turn
        open_corpus(DataSection(corpus=str(for_anyone))).files()
    os.seteuid(os.getuid())
    path.chmod(before)
    (for_anyone / f".{Path(closed).name}").mkdir(mode=0)  # hidden: nobody looks
    os.seteuid(mine)
    assert len(read(for_anyone)[0]) == 2


def test_single_file_that_may_not_be_read(for_anyone: Path) -> None:
    mine = os.geteuid()
    os.seteuid(os.getuid())
    (for_anyone / "a.txt").chmod(0)
    os.seteuid(mine)
    with config_error("data.corpus", "a.txt", "may not read"):
        read(for_anyone / "a.txt")


def test_corpus_behind_a_folder_that_may_not_be_read(for_anyone: Path) -> None:
    mine = os.geteuid()
    os.seteuid(os.getuid())
    for_anyone.chmod(0)
    os.seteuid(mine)
    for corpus in (for_anyone, for_anyone / "a.txt"):
        with config_error("data.corpus", str(corpus), "may not read"):
            read(corpus)
    os.seteuid(os.getuid())
    for_anyone.chmod(0o755)
    os.seteuid(mine)
