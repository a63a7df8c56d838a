"""What YAML files may hold, and what of them is refused in one line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megatron_progressive.config import ConfigError, load, to_yaml
from megatron_progressive.config.yaml_text import read_yaml

SOUND = "model: {family: gpt2}\ntrain: {steps: 7}\n"


def said_of(tmp_path: Path, text: str | bytes) -> str:
    """What is said of a configuration."""
    file = tmp_path / "in.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(file)
    said = str(caught.value)
    assert said.isprintable(), said
    return said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SOUND + "train: {steps: 5}\n", "in.yaml: train: twice (lines 2 and 3); accepted: each"),
        ("model: {family: gpt2}\ntrain: {steps: 2, steps: 7}", "n.steps: twice (lines 2 and 2)"),
        ("expansion:\n- at: 1\n  at: 2\n", "expansion[0].at: twice (lines 2 and 3)"),
        (SOUND + '"train": {}\n', "train: twice (lines 2 and 3)"),
        ("run: &r {<<: *r}", "run.<<: got an anchor that holds itself (line 1)"),
        ("a: &x [*x]", "a[0]: got an anchor that holds itself (line 1)"),
        ("a: &x {b: {c: *x}}", "a.b.c: got an anchor that holds itself"),
        ("a: *nowhere", "undefined alias 'nowhere' (line 1, column 4)"),
        ("model:\n\tfamily: gpt2", "found character '\\t' that cannot start any token (line 2"),
        ("- model\n- train", "holds a list; accepted: a mapping"),
        ("gpt2", "holds text; accepted: a mapping"),
        (SOUND + "---\n" + SOUND, "a second document begins (line 3"),
        ("model: {family: gpt2", "is not YAML: expected ',' or '}'"),
        ("? [a]\n: b", "got a key that is no text (line 1)"),
        ("run: {name: !!python/name:os.system x}", "run.name: got the tag !!python/name:os.system"),
        ("run: !!set {a}", "run: got the tag !!set (line 1)"),
        ("run: {name: !var USER}", "run.name: got the tag !var"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("{}", "model.family: missing; accepted: text"),
        ("", "model.family: missing"),
        ("# nothing\n", "model.family: missing"),
        (b"model: \xff", "is not YAML: unacceptable character #x00ff"),
        (b"PK\x03\x04\x00\x00", "is not YAML: unacceptable character"),
        ("model:\n", "model: got nothing; accepted: a mapping of keys"),
        ("model.family: gpt2", "model.family: unknown key; accepted: the key family in model"),
        ("1: 2\nmodel: {}", "1: unknown key; accepted: model, run, data, train, optim, schedule"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in pairwise("abcdefg")),
         "more than 100,000 values"),
    ],
)  # fmt: skip
def test_refused_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in said_of(tmp_path, text)


@pytest.mark.parametrize(
    "data",
    [
        SOUND.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + SOUND.encode(),
        SOUND.encode("utf-16"),
        f"%YAML 1.1\n---\n{SOUND}...\n".encode(),
        f"# τ → ∞\n{SOUND}".encode(),
        b"base: &b {steps: 7}\n".replace(b"base", b"train") + b"model: {family: gpt2}\n",
        b"model: {family: !!str gpt2}\ntrain: {steps: !!int '7'}\n",
    ],
    ids=["CRLF", "BOM", "UTF-16", "directives", "comment", "anchor", "tags"],
)
def test_files_of_all_editors(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "in.yaml"
    file.write_bytes(data)
    config = load(file)
    assert (config.model.family, config.train.steps) == ("gpt2", 7)


def test_merged_mappings(tmp_path: Path) -> None:
    """A key beside a merge is not there twice; an alias is a copy."""
    file = tmp_path / "in.yaml"
    file.write_text(
        "model: {family: gpt2}\n"
        "expansion:\n- &e {at: 10, to_layers: 2, parallel: {tensor: 2}}\n- {<<: *e, at: 20}\n"
    )
    config = load(file, ["expansion.1.parallel.tensor=4"])
    assert [(e.at, e.to_layers, e.parallel.tensor) for e in config.expansion] == [
        (10, 2, 2), (20, 2, 4),
    ]  # fmt: skip


def test_quotes_make_text_of_what_looks_like_null_or_true(tmp_path: Path) -> None:
    file = tmp_path / "in.yaml"
    file.write_text("run: {name: 'null'}\nmodel: {family: gpt2, mup: 'true'}\n")
    with pytest.raises(ConfigError, match=r"model\.mup: got 'true'; accepted: true or false"):
        load(file)
    assert load(file, ["model.mup=on"]).run.name == "null"


@pytest.mark.parametrize("name", ["null", "yes", "1e3", "2026-11-28", "'", "a: b", "#", "é", "007"])
def test_the_resolved_file_is_read_back_to_an_equal_one(tmp_path: Path, name: str) -> None:
    first = load(_file(tmp_path, SOUND), [f'run.name="{name}"', "optim.eps=1e-12"])
    assert load(_file(tmp_path, to_yaml(first)), resolved=True) == first


def test_what_a_run_wrote_is_taken_as_it_is(tmp_path: Path) -> None:
    """Names and paths of earlier versions, and a bound that they had not."""
    text = "run: {name: -x$y}\ndata: {corpus: /a$b/c}\noptim: {clip_grad: .inf}\n" + SOUND
    config = load(_file(tmp_path, text), resolved=True)
    assert (config.run.name, config.data.corpus) == ("-x$y", "/a$b/c")
    with pytest.raises(ConfigError):
        load(_file(tmp_path, text))


def _file(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name, why in (
        ("none", "no file"), (".", "Is a directory"), ("file/x", "Not a directory"),
        ("loop", "symbolic links"), ("x" * 300, "File name too long"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^CONFIG: .*{why}"):
            read_yaml(tmp_path / name, "CONFIG")
