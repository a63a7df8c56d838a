"""Which tasks the installed lm-evaluation-harness has, without loading a model or torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_progressive.config import ConfigError
from megatron_progressive.config.places import check_readable

HARNESS = "lm_eval"
_PACKAGES = (HARNESS, "accelerate")
is_installed = importlib.util.find_spec

_NAME = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([^\s"'#\[]+)["']?[ \t]*(?:#.*)?$""", re.M)


def check_tasks(field: str, names: Sequence[str]) -> None:
    """Check that the harness is installed and that it knows tasks.

    Args:
        field: what names the tasks.
        names: tasks, groups or tags of the harness, or YAML files of tasks.

    Raises:
        ConfigError: the harness is missing, there are no names, a file is not there, or a name is
            not known; the error has those that are near to it.
    """
    if not names or not all(names):
        raise ConfigError(f"{field}: got {','.join(names)!r}; accepted: names of tasks, or files")
    missing = [name for name in _PACKAGES if is_installed(name) is None]
    if missing:
        raise ConfigError(
            f"{field}: got {','.join(names)}, and {' and '.join(missing)} is not installed; "
            "accepted: with lm-evaluation-harness (pip install 'megatron_progressive[eval]')"
        )
    if again := [name for at, name in enumerate(names) if name in names[:at]]:
        raise ConfigError(f"{field}: got {again[0]} twice; accepted: each task once")
    unknown = []
    for name in names:
        if is_file(name):
            check_readable(field, Path(name))
            if not Path(name).is_file():
                raise ConfigError(f"{field}: no file {name}; accepted: a task's YAML file")
        else:
            unknown.append(name)
    if unknown:
        unknown = sorted(set(unknown) - set(_written_names()), key=unknown.index)
    if unknown:  # some names are put together by the harness, which reads all of its files for that
        known = _all_names()
        for name in unknown:
            if name not in known:
                near = difflib.get_close_matches(name, known, 4, 0.5)
                mean = f" (did you mean {', '.join(near)}?)" if near else ""
                raise ConfigError(
                    f"{field}: got {name}, which lm-evaluation-harness does not have{mean}; "
                    "accepted: a task, group or tag (lm_eval ls tasks lists them), or a YAML file"
                )


def is_file(name: str) -> bool:
    """Whether a task is meant as a file of its own and not as a name of the harness."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def _written_names() -> Iterator[str]:
    """The names that stand in the harness's files of tasks. Reading them takes seconds, which is a
    sixth of what the harness itself needs for its index."""
    spec = is_installed(HARNESS)
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for file in (Path(folder) / "tasks").rglob("*.yaml"):
            yield from _NAME.findall(file.read_text(encoding="utf-8"))


def _all_names() -> list[str]:
    from lm_eval.tasks import TaskManager

    return list(TaskManager().all_tasks)
