"""The Python sources of the installed packages on which this one depends: text that is there after
installing, without a network."""

from __future__ import annotations

import csv
import os
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_OWN = "megatron_progressive"


def packages_root() -> Path:
    """The folder into which packages are installed."""
    return Path(sysconfig.get_paths()["purelib"])


def package_sources(root: Path) -> list[Path]:
    """The source files below ``root`` of every package that this one needs, directly or through
    another, sorted by path. Other packages that happen to be installed there are left out, so that
    two environments of the same versions have the same corpus."""
    names = {
        name
        for distribution in map(metadata.distribution, _needed())
        for name in _recorded(distribution)
        if ".." not in name.split("/") and os.path.isfile(f"{root}/{name}")
    }
    # as paths are sorted, which takes longer
    return [root / name for name in sorted(names, key=lambda name: name.split("/"))]


def _recorded(distribution: metadata.Distribution) -> list[str]:
    """The names of the source files of a distribution. Those of its RECORD are read here, since
    ``files`` makes slow objects of all of them."""
    text = distribution.read_text("RECORD")
    if text is None:
        names = [str(file) for file in distribution.files or ()]
    else:
        names = [row[0] for row in csv.reader(text.splitlines()) if row]
    return [name for name in names if name.endswith(".py")]


def _needed() -> set[str]:
    """The names of the installed distributions that this package needs here, without extras."""
    waiting = [_OWN]
    seen: set[str] = set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        for line in metadata.distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return seen - {canonicalize_name(_OWN)}
