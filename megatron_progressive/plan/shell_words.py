"""Fields as ``key=value`` words of a command, and commands over several lines of a shell."""

import shlex

import yaml

_CONTINUED = " \\"


def field_word(key: str, value: object) -> str:
    """The word that gives the field ``key`` the value ``value`` (a scalar, None, or a list of
    scalars), in YAML without a space, so that a shell takes it as it stands wherever it can."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20).split("\n")[0]
    return f"{key}={text.replace(', ', ',')}"


def command_lines(words: list[str], width: int, first: str, following: str) -> list[str]:
    """The command of ``words``, quoted for a shell, in lines of at most ``width`` characters
    where its words are short enough. They break between words alone, and all but the last end
    in a backslash. The first line begins with ``first``, the others with ``following``."""
    lines: list[str] = []
    line = first
    for word in map(shlex.quote, words):
        longer = f"{line} {word}" if line.strip() else line + word
        if len(longer) + len(_CONTINUED) > width and line.strip():
            lines.append(line + _CONTINUED)
            longer = following + word
        line = longer
    return [*lines, line]
