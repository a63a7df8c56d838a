"""Paths: what stands for what, and what cannot be read or written is refused before work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import newest_checkpoint
from megatron_progressive.config import ConfigError, from_dict
from megatron_progressive.config.places import check_readable, check_writable, expanded, place
from tests.unprivileged import unprivileged


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with unprivileged():
            yield
    finally:
        path.chmod(before)


def values(folder: Path) -> dict[str, Any]:
    """A small run on a corpus of its own."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "{"a word or two " * 20}{n}"}}\n' for n in range(300)))
    return {
        "run": {"dir": str(folder / "runs")},
        "model": {"family": "gpt2", "num_layers": 1},
        "data": {"corpus": str(corpus), "vocab_size": 300, "sequence_length": 16},
        "train": {"steps": 1000, "global_batch": 4, "micro_batch": 4},
        "expansion": [{"at": 0.5, "to_layers": 2}],
    }


def config_file(folder: Path) -> Path:
    path = folder / "in.yaml"
    path.write_text(yaml.safe_dump(values(folder)))
    return path


def refused(words: list[str], capfd: Any, *said: str) -> None:
    """Assert exit code 2 and one line that says all of it."""
    assert cli.main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for part in said:
        assert part in lines[0], lines[0]


def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOTHING", raising=False)
    for given, meant in (
        ("~", "/home/me"), ("~/a", "/home/me/a"), ("$DATA/a", "/data/a"), ("${DATA}a", "/dataa"),
        ("a/~", "a/~"), ("./~", "./~"), ("$HOME/$DATA", "/home/me//data"), ("a$", "a$"),
        ("a$5", "a$5"), ("a b", "a b"), ("τ", "τ"),
    ):  # fmt: skip
        assert expanded("--out", given) == meant
    for given, said in (
        ("$NOTHING/a", "variable NOTHING is not set"), ("a${NOTHING}", "NOTHING is not set"),
        ("$EMPTY/a", "variable EMPTY is empty"), ("${DATA", "$NAME or ${NAME}"),
        ("${DATA:-x}", "$NAME or ${NAME}"), ("${}", "$NAME or ${NAME}"),
        ("~no_such_user_here/a", "~USER of a user"), ("", "a path"), ("a\0b", "control"),
        ("a\nb", "control"), ("${oc.env:HOME}", "$NAME or ${NAME}"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            expanded("--out", given)
        assert str(caught.value).startswith("--out: got ")
        assert said in str(caught.value)
        assert str(caught.value).isprintable()


def test_fields_that_are_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file, in a word, and behind hf:; no other field has variables, none is read twice."""
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("DATA", "/d$HOME")
    base = {"model": {"family": "gpt2"}, "run": {"dir": "~/r"}, "data": {"text_field": "$DATA"}}
    words = [
        "data.corpus=$DATA/c",
        "data.tokenizer=~/t",
        "data.prepared=${DATA}",
        "run.init_from=~/i",
    ]
    config = from_dict(base, words)
    assert (config.run.dir, config.run.init_from) == ("/h/r", "/h/i")
    data = config.data
    assert (data.corpus, data.tokenizer, data.prepared) == ("/d$HOME/c", "/h/t", "/d$HOME")
    assert data.text_field == "$DATA"
    assert from_dict(base, ["data.corpus=hf:~/c:en"]).data.corpus == "hf:/h/c:en"
    assert from_dict(base, ["run.dir=~"]).run.dir == "/h"


def test_paths_of_the_command_line(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    config_file(tmp_path)
    assert cli.main(["plan", "$HERE/in.yaml"]) == 0
    capfd.readouterr()
    for words, option in (
        (["plan", "$NOT_SET_/in.yaml"], "CONFIG"),
        (["grid", "plan", "$NOT_SET_/in.yaml"], "GRID"),
        (["report", "$NOT_SET_/a"], "RUN"),
        (["report", "$HERE", "--out", "$NOT_SET_/a"], "--out"),
        (["coordcheck", "$HERE/in.yaml", "--out", "$NOT_SET_"], "--out"),
        (["checkpoint", "inspect", "$NOT_SET_/a"], "CHECKPOINT"),
        (["export", "hf", "$HERE", "$NOT_SET_/a"], "OUT"),
        (["export", "hf", "$HERE", "out", "--tokenizer", "$NOT_SET_/a"], "--tokenizer"),
        (["import", "hf", "$NOT_SET_/a", "out"], "FOLDER"),
    ):
        refused(words, capfd, f"mprog: {option}: got ", "NOT_SET_ is not set")


Hinder = Callable[[Path], Path]


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file" / "x"


def _a_file(folder: Path) -> Path:
    return _below_a_file(folder).parent


def _a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def _a_link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def _a_long_name(folder: Path) -> Path:
    return folder / "no" / ("x" * 256)


HINDRANCES = [_below_a_file, _a_file, _a_loop, _a_link_to_nothing, _a_long_name]


@pytest.mark.parametrize("hinder", HINDRANCES)
def test_what_cannot_be_written_is_refused_first(
    hinder: Hinder, tmp_path: Path, capfd: Any
) -> None:
    file = config_file(tmp_path)
    place = hinder(tmp_path)
    grid = tmp_path / "grid.yaml"
    run = values(tmp_path)
    sizes = [{"name": "s", "to_layers": 2}]
    del run["run"], run["expansion"]
    grid.write_text(
        yaml.safe_dump(
            {"study": {"dir": str(place)}, "run": run, "sizes": sizes, "arms": ["fixed"]}
        )
    )
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for command in (["train"], ["data", "prepare"], ["pilot"]):
        refused(
            [*command, str(file), f"run.dir={place}"], capfd, "mprog: run.dir: got ", "accepted"
        )
    for command in ("run", "pilot", "report", "collect"):
        refused(["grid", command, str(grid)], capfd, "mprog: study.dir: got ", "accepted")
    refused(["report", str(tmp_path), "--out", str(place)], capfd, "mprog: --out: got ")
    refused(["coordcheck", str(file), "--out", str(place)], capfd, "mprog: --out: got ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_folder_without_the_right_to_write(tmp_path: Path, capfd: Any) -> None:
    file, folder = config_file(tmp_path), tmp_path / "ro"
    folder.mkdir()
    with mode(folder, 0o555):
        for command in (["train"], ["data", "prepare"], ["pilot"]):
            refused([*command, str(file), f"run.dir={folder}"], capfd, "run.dir: got", "denied")
        for words in (["report", str(tmp_path)], ["coordcheck", str(file)]):
            refused([*words, "--out", str(folder / "a" / "b")], capfd, "--out: got", "denied")
        with pytest.raises(ConfigError, match="Permission denied"):
            check_writable("x", folder)
        check_writable("x", tmp_path / "not" / "yet")
    assert not list(folder.iterdir())


def test_files_without_the_right_to_read(tmp_path: Path, capfd: Any) -> None:
    file = config_file(tmp_path)
    with mode(file, 0):
        refused(["train", str(file)], capfd, "CONFIG: ", "cannot be read (Permission denied)")
        refused(["grid", "plan", str(file)], capfd, "GRID: ", "cannot be read (Permission denied)")
    with mode(tmp_path / "corpus.jsonl", 0):
        refused(["train", str(file)], capfd, "data.corpus: got ", "Permission denied")
    locked = tmp_path / "locked"
    (locked / "in").mkdir(parents=True)
    with mode(locked, 0):
        for field in ("run.dir", "run.init_from", "data.corpus", "data.tokenizer", "data.prepared"):
            for path in (locked / "in", locked):
                refused(["train", str(file), f"{field}={path}"], capfd, f"{field}: got ", "denied")
        refused(["report", str(locked / "in")], capfd, "RUN: got ", "Permission denied")
        refused(["checkpoint", "inspect", str(locked / "in")], capfd, "CHECKPOINT: got ", "denied")
    assert not (tmp_path / "runs").exists()
    check_readable("x", tmp_path / "nothing" / "there")


def test_an_error_that_no_check_foresaw_is_one_line(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("megatron_progressive.compare.report.make_report", fail)
    refused(
        ["report", str(tmp_path), "--out", str(tmp_path / "out")], capfd, "/some/file: Permission"
    )


def run_folder(folder: Path, *steps: int) -> Path:
    """As far as finding its checkpoints goes."""
    for step in steps:
        (folder / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:07d}" / "progress.json").write_text("{}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {family: gpt2}\n")
    return folder


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path, capfd: Any) -> None:
    run = run_folder(tmp_path / "runs" / "a", 5, 20, 10)
    newest = run / "checkpoints" / "step_0000020"
    for path in (run, run / "checkpoints"):
        assert newest_checkpoint(path) == newest
        said = f"{path} is a run folder; its newest checkpoint is {newest}\n"
        assert capfd.readouterr().err == said
    for path in (
        newest,
        newest.with_name("step_0000005"),
        tmp_path / "nothing",
        run / "config.yaml",
    ):
        assert newest_checkpoint(path) == path
    assert capfd.readouterr().err == ""


def test_folders_that_stand_for_no_checkpoint(tmp_path: Path, capfd: Any) -> None:
    run_folder(tmp_path / "empty")
    run_folder(tmp_path / "study" / "cells" / "x", 5)
    (tmp_path / "thesis").mkdir()
    for name, said in (
        ("empty", "is a run folder without a checkpoint"), ("study", "is a folder of runs"),
        ("study/cells", "is a folder of runs"), ("", "is a folder of runs"),
        ("thesis", "progress.json is missing or not readable"), ("nothing", "no folder"),
    ):  # fmt: skip
        for words in (["inspect", str(tmp_path / name)],
                      ["expand", str(tmp_path / name), "out", "--to-layers", "3"]):  # fmt: skip
            refused(["checkpoint", *words], capfd, "checkpoint: ", said)
    file = config_file(tmp_path)
    refused(["train", str(file), f"run.init_from={tmp_path / 'thesis'}"], capfd, "run.init_from: ")
    with pytest.raises(ConfigError) as caught:
        place("--out", str(tmp_path / ("x" * 300)))
    assert "remove" not in str(caught.value)
    assert os.path.isdir(tmp_path / "thesis")
