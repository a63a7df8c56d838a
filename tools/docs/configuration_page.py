"""Write ``docs/configuration.md`` from the schema: each key, its default, its range and meaning.

python tools/docs/configuration_page.py          writes the page
python tools/docs/configuration_page.py --check  fails where the page is stale
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from megatron_progressive.config import schema
from megatron_progressive.config.accepted import BOUNDS, CHOICES
from megatron_progressive.config.model_schema import MISSING

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

HEAD = """\
# Configuration

*Made from `megatron_progressive/config/` by `tools/docs/configuration_page.py`.*

A configuration is a YAML file of sections. `key=value` words after it on the command line replace
single keys (`train.steps=200`, `expansion.0.at=0.6`). Every key has a default but `model.family`
and, of an expansion, `at` and `to_layers`. "preset" as a default means the value of
`model.preset`, or of the checkpoint in `run.init_from`. What is refused is refused before anything
is written, in one line that names the key, the value and what is accepted, with exit code 2.
Paths may hold `~`, `$NAME` and `${NAME}`. Names are taken as they are written (`007`, `2026-11-28`,
`no`).

A finished run is extended with `run.extend=true train.steps=MORE`: it goes on from its newest
checkpoint before the decay, to the bits of a run that was longer from the start; what came after
that stays in `until_STEPS`.
"""


def _field_texts(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, as one line of Markdown."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    texts = {}
    for node, following in itertools.pairwise(body):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
            value = typing.cast(ast.Constant, typing.cast(ast.Expr, following).value).value
            texts[node.target.id] = _markdown(str(value))
    return texts


def _markdown(text: str) -> str:
    """Docstring markup as one line of Markdown that a table can hold."""
    line = re.sub(r":\w+:`\.?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return line.replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is MISSING:
        return "*required*"
    if field.default is dataclasses.MISSING:
        return "`[]`"
    if field.default is None:
        return ""
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _accepted(name: str, kind: Any) -> str:
    if name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[name] if choice is not None)
    if name in BOUNDS:
        low, high = BOUNDS[name]
        words = [f"from {low:g}" if low is not None else "", f"to {high:g}" if high else ""]
        return " ".join(word for word in words if word)
    return "`true`, `false`" if kind is bool else ""


def _plain(kind: Any) -> Any:
    """The type inside ``Optional`` and ``list``."""
    inner = [a for a in typing.get_args(kind) if a is not type(None)]
    return inner[0] if inner else kind


def _section(cls: type, name: str, title: str) -> list[str]:
    """A table of a section's keys, followed by those of the sections inside of it."""
    texts, hints = _field_texts(cls), typing.get_type_hints(cls)
    lines = ["", f"## {title}", ""]
    own = inspect.getdoc(cls) or ""
    if own and not own.startswith(f"{cls.__name__}("):
        lines += [_markdown(own), ""]
    lines += ["| key | default | accepted | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    for field in dataclasses.fields(cls):
        kind, key = _plain(hints[field.name]), f"{name}.{field.name}"
        if dataclasses.is_dataclass(kind):
            lines.append(f"| `{field.name}` | | a section, below | {texts.get(field.name, '')} |")
            inner += _section(typing.cast(type, kind), key, f"{title}.{field.name}")
            continue
        cells = (
            f"`{field.name}`",
            _default(field),
            _accepted(key, kind),
            texts.get(field.name, ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *inner]


def page() -> str:
    """The whole page."""
    hints = typing.get_type_hints(schema.RunConfig)
    lines = [HEAD.rstrip()]
    for field in dataclasses.fields(schema.RunConfig):
        title = "expansion[]" if field.name == "expansion" else field.name
        lines += _section(_plain(hints[field.name]), field.name, title)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or tell whether it is up to date with the schema."""
    text = page()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text
        if stale:
            print(f"{PAGE} is stale: run python tools/docs/configuration_page.py", file=sys.stderr)
        return int(stale)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
