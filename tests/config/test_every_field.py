"""Every field of the configuration, and every kind of value that it cannot have: one line that
names the field and what it accepts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.config import ConfigError, RunConfig, from_dict, load
from megatron_progressive.config.accepted import BOUNDS, CHOICES, PATHS, WORDING
from megatron_progressive.config.loading import _kinds
from megatron_progressive.plan.preflight import check_run

FAMILIES = ("gpt2", "deepseek_v3", "resnet")
LONG = "x" * 5000


def base(family: str = "gpt2", key: str = "") -> dict[str, Any]:
    """A sound run of one layer that grows to six, with the entry whose field ``key`` is."""
    model = {"family": family} | ({"num_layers": 1} if family != "resnet" else {})
    values: dict[str, Any] = {"model": model, "expansion": [{"at": 0.5, "to_layers": 6}]}
    if key.startswith("data.mix."):
        values["data"] = {"mix": [{"corpus": "a", "weight": 1}]}
    elif key.startswith("data.validation.x"):
        values["data"] = {"validation": {"x": {"corpus": "a"}}}
    return values


def fields_of(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """The key of each field as a word spells it, its type and whether null is a value."""
    for name, kind in _kinds(cls).items():
        inside = f"{prefix}{name}" + ".0" * (kind.is_list and is_dataclass(kind.type))
        inside += ".x" * kind.is_map
        if is_dataclass(kind.type):
            yield from fields_of(kind.type, f"{inside}.")  # type: ignore[arg-type]
        elif not kind.is_list:
            yield inside, kind.type, kind.optional


FIELDS = list(fields_of())


def general(key: str) -> str:
    return key.replace(".0", "").replace(".x", "")


def shown(key: str) -> str:
    return key.replace(".0", "[0]")


def said_of(key: str, value: str, family: str = "gpt2") -> str:
    """What the checks of a run with that word say; nothing where it can run."""
    try:
        check_run(from_dict(base(family, key), [f"{key}={value}"]), 1)
    except ConfigError as error:
        said = str(error)
    else:
        return ""
    assert said.isprintable(), said
    assert "accepted: " in said, said
    assert len(said) < 400, said
    return said


def refused(key: str, value: str) -> None:
    """Assert that a word is refused in one line about its field."""
    said = said_of(key, value)
    assert said.startswith(shown(key)), (key, value, said)
    assert ": got " in said, said


def test_the_base_is_sound() -> None:
    for family in FAMILIES:
        check_run(from_dict(base(family)), 1)


def test_every_number_has_limits() -> None:
    numbers = {general(key) for key, kind, _ in FIELDS if kind in (int, float)}
    assert numbers <= BOUNDS.keys() | CHOICES.keys() | WORDING.keys()
    assert {general(key) for key in PATHS} <= {
        general(key) for key, kind, _ in FIELDS if kind is str
    }


@pytest.mark.parametrize(("key", "kind", "optional"), FIELDS, ids=[key for key, _, _ in FIELDS])
def test_no_field_takes_what_it_cannot_have(key: str, kind: type, optional: bool) -> None:
    bad = ["[]", "[1]", "{}", "{a: 1}"]
    if not optional:
        bad += ["null", "Null", ""]
    if kind is not str:
        bad += ["''", "None", "many", LONG, "2026-11-28", "1:30", "9" * 5000, "٣", "[.nan]"]
    if kind in (int, float):
        bad += [".inf", "-.inf", ".nan", "inf", "nan", "1e400", "-1", "true", "9" * 40]
    if kind is int:
        bad += ["1.5", "1e3", "010", "0.0"]
    if kind is bool:
        bad += ["0", "1", "'true'", "maybe"]
    if general(key) in PATHS:
        bad += ["''", "${NO_SUCH_VARIABLE}/x", "${", "a${b", "~no_such_user/x", LONG, '"a\\nb"']
    if general(key) in CHOICES:
        bad += ["-7", "other"]
    if general(key) in BOUNDS:
        low, high = BOUNDS[general(key)]
        bad += [repr(low - 1), repr(high + 1) if kind is int else repr(high * 2)]
    for value in bad:
        refused(key, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_at_their_limits_are_planned_or_refused(family: str) -> None:
    """Nothing but ConfigError comes of what each field for itself accepts."""
    for key, kind, _ in FIELDS:
        for value in (*BOUNDS.get(general(key), ()), *CHOICES.get(general(key), ())):
            said_of(key, "null" if value is None else str(value), family)
        if kind is str:
            assert said_of(key, LONG, family)


@pytest.mark.parametrize(
    "word",
    ["run.name=" + LONG, "run.name='${USER}'", "optim.lr=.inf", "train.steps=[1]",
     "run.dir=$NOWHERE_", "expansion.0.at=.nan", "run.name=a/b", "data.corpus=a${b", "train=null"],
)  # fmt: skip
def test_nothing_is_created(word: str, tmp_path: Path, capfd: Any) -> None:
    file = tmp_path / "in.yaml"
    file.write_text(yaml.safe_dump({**base(), "run": {"dir": str(tmp_path / "runs")}}))
    for command in (["train"], ["data", "prepare"], ["plan"], ["pilot"]):
        assert cli.main([*command, str(file), word]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"mprog: {shown(word.split('=')[0])}: got ")
    assert os.listdir(tmp_path) == ["in.yaml"]


@pytest.mark.parametrize(
    "name", ["2026-11-28", "123", "1e3", "1_000", "yes", "no", "on", "007", "0x1F", "12:30:00",
             "1.0", ".5", "true", "=", "<<", "a #b", "#5", "τλ", "a b", "None", "nan"],
)  # fmt: skip
def test_a_name_is_the_text_that_was_written(name: str, tmp_path: Path) -> None:
    """In a word and in a file, and once a run has written it."""
    assert from_dict(base(), [f"run.name={name}"]).run.name == name
    if name[0] == "#" or " #" in name:  # a comment, in a file
        return
    file = tmp_path / "in.yaml"
    file.write_text(f"run: {{name: {name}}}\nmodel: {{family: gpt2}}\n", encoding="utf-8")
    assert load(file).run.name == name


@pytest.mark.parametrize(
    "name", [".", "..", "a/b", "/a", "-x", "a$b", "'a\u200b'", '"a\\nb"', '"\\0"', '" "', "''",
             "' a'", "x" * 246, "é" * 123, "data"],
)  # fmt: skip
def test_no_folder_has_such_a_name(name: str) -> None:
    refused("run.name", name)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.E-3", 1e-3), (".5", 0.5), ("0x10", 16.0), ("'2'", 2.0),
                        ("1_0.5", 10.5), ("+1e-3", 1e-3)],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert from_dict(base(), [f"optim.lr={text}"]).optim.lr == value


def test_what_null_would_mean_is_said() -> None:
    for word, said in (
        ("model.num_layers=None", "got 'None'; accepted: an integer, or null"),
        ("optim.ns_dtype=None", "got 'None'; accepted: fp32, bf16, fp16, or null"),
        ("train.steps=null", "got null; accepted: an integer"),
        ("run.name=null", 'got null; accepted: text ("null" in quotes is one)'),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict(base(), [word])
        assert said in str(caught.value)


def test_words_reach_into_lists_and_sections() -> None:
    values = base()
    config = from_dict(values, ["expansion.0.at=0.25", "expansion[0].init=zero",
                                "train={steps: 50}", "train.log_every=5"])  # fmt: skip
    assert (config.expansion[0].at, config.expansion[0].init) == (0.25, "zero")
    assert (config.train.steps, config.train.log_every) == (50, 5)
    assert values == base()
    for word in ("expansion.1.at=0.5", "expansion.x.at=1", "expansion.-1.at=1", ".train=1",
                 "a..b=1", "train.=1"):  # fmt: skip
        with pytest.raises(ConfigError, match="unknown key"):
            from_dict(values, [word])
