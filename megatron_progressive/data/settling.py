"""Which data a run is trained on: the data that its folder says it began with, or what there is
now.

A run, and all cells of a study, keep the prepared corpus that they began with, whatever happens to
the files that it was made from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import images
from megatron_progressive.data.identity import (
    DataIdentity,
    differ,
    image_identity,
    prepared_identity,
)
from megatron_progressive.data.manifest import (
    FORMAT,
    MANIFEST,
    check_fit,
    fingerprint,
    read_manifest,
)
from megatron_progressive.data.parts import part_configs
from megatron_progressive.data.prepare import check, prepare
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.families.resnet import ResNetShape
from megatron_progressive.runtime.progress import ShowBytes

SHARED_SECONDS = 60.0
"""How many seconds a folder made by another host may take to be seen on a shared file system."""


@dataclass(frozen=True)
class Begun:
    """What has begun already, and so has its data: a run, or a study."""

    what: str
    """Its name in messages, as ``runs/a``."""
    another: str
    """What another one of its kind would need, as ``a new run.name``."""
    data: DataIdentity | None
    """The data that it is trained on; None where a version that did not record this began it."""
    at: float = 0.0
    """When it was last trained, in seconds since the epoch, where ``data`` is None."""


def settle_corpus(
    config: RunConfig, begun: Begun | None = None, progress: ShowBytes | None = None
) -> tuple[DataIdentity, list[str]]:
    """The data that a run on a single corpus, or on images, is trained on, prepared and whole, and
    what the user should be told about it.

    Args:
        config: the configuration of the run.
        begun: what is continued; None for a fresh start.
        progress: told how far a preparation is (default: it is shown on standard error).

    Raises:
        ConfigError: the data is not there, does not fit the model, or is not what ``begun`` was
            trained on.
    """
    shape = model_shape(config)
    if isinstance(shape, ResNetShape):
        images.check(config)
        found = image_identity(config, shape.num_classes)
        if begun is not None and differ(begun.data, found):
            raise ConfigError(
                f"data.corpus: got {config.data.corpus}, whose pictures have changed since "
                f"{begun.what} was trained on them; accepted: those of before, or {begun.another}"
            )
        return found, []
    assert isinstance(shape, TransformerShape)
    known = None if begun is None else begun.data
    if begun is not None and known is not None and config.data.prepared is None:
        kept = kept_folder(config, known)
        if kept is not None:
            manifest = read_manifest(kept)
            check_fit(config, manifest)
            goes_on = replace(known, prepared=os.path.abspath(kept))
            if _listing(config) in (None, manifest.fingerprint):
                return goes_on, []
            return goes_on, [
                f"data.corpus {config.data.corpus} has changed since {begun.what} began: it goes "
                f"on with {kept}, prepared then ({begun.another} takes what is there now)"
            ]
    if begun is not None and known is None and config.data.prepared is None:
        # of a version that did not record it, and that prepares otherwise than this one
        earlier = [
            folder
            for folder in _preparations(config)
            if _made(folder) <= begun.at and read_manifest(folder).format < FORMAT
        ]
        if len(earlier) == 1:
            check_fit(config, read_manifest(earlier[0]))
            return prepared_identity(earlier[0]), [
                f"what {begun.what} was trained on before was not recorded; it goes on with "
                f"{earlier[0]}, the only one that was prepared then"
            ]
    check(config)
    found = prepared_identity(prepare(config, progress))
    if begun is None:
        return found, []
    if differ(known, found):
        raise other_data(config, begun, found)
    return found, [] if known is not None else _unrecorded(config, begun, found)


def as_settled(config: RunConfig, found: DataIdentity) -> RunConfig:
    """The configuration that reads what :func:`.settle` found."""
    data = config.data
    if found.prepared is not None:
        data = replace(data, prepared=found.prepared)
    if data.mix and found.parts:
        pairs = zip(data.mix, found.parts, strict=True)
        data = replace(data, mix=[replace(part, prepared=one.prepared) for part, one in pairs])
    if data.validation and found.validation:
        sets = {
            name: replace(one, prepared=found.validation[name].prepared)
            for name, one in data.validation.items()
        }
        data = replace(data, validation=sets)
    return replace(config, data=data)


def wait_until_seen(found: DataIdentity) -> None:
    """Wait until this host sees what another host has prepared.

    Raises:
        ConfigError: this host does not see it even after :data:`SHARED_SECONDS`.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    for folder in found.all_folders:
        _wait_until_seen(folder / MANIFEST, deadline)


def _wait_until_seen(manifest: Path, deadline: float) -> None:
    while not manifest.is_file():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.dir: {manifest.parent}, which rank 0 has prepared, cannot be seen here; "
                "accepted: a folder that all hosts of the job share"
            )
        for folder in manifest.parents[1:]:  # network file systems look again when one is listed
            if folder.is_dir():
                os.listdir(folder)
                break
        time.sleep(0.5)


def changed_since(config: RunConfig, known: DataIdentity | None) -> bool:
    """Whether the files of a run's corpus are known to differ from those that it was prepared from.
    Their content is not looked at, so that this is quick."""
    if known is None or config.data.prepared is not None:
        return False
    if config.data.mix and len(known.parts) == len(config.data.mix):
        tokenizer = None if (folder := known.tokenizer_folder) is None else str(folder)
        parts = zip(part_configs(config, tokenizer), known.parts, strict=True)
        return any(changed_since(one, part) for one, part in parts)
    kept, now = kept_folder(config, known), _listing(config)
    return kept is not None and now is not None and read_manifest(kept).fingerprint != now


def _listing(config: RunConfig) -> str | None:
    """The identity with which the corpus would be prepared now; None where the corpus is not there
    any more."""
    try:
        return fingerprint(config)
    except ConfigError:
        return None


def kept_folder(config: RunConfig, known: DataIdentity) -> Path | None:
    """The folder that has the data ``known``: where it was, or, for runs that were moved, beside
    them."""
    if known.prepared is None:
        return None
    for folder in (Path(known.prepared), Path(config.run.dir) / "data" / Path(known.prepared).name):
        if _has(folder, known):
            return folder
    return None


def _has(folder: Path, known: DataIdentity) -> bool:
    try:
        return not differ(prepared_identity(folder), known)
    except ConfigError:
        return False


def other_data(config: RunConfig, begun: Begun, found: DataIdentity) -> ConfigError:
    """The error that says that a run cannot go on with ``found``."""
    assert begun.data is not None
    kept = kept_folder(config, begun.data)
    before = f"data.prepared={kept or begun.data.prepared}"
    if kept is None:
        before += " (which is gone or changed) as it was"
    if config.data.prepared is not None:
        got = f"data.prepared: got {config.data.prepared}, whose content is"
    else:
        got = f"data.corpus: got {config.data.corpus}, prepared as {found.prepared}:"
    return ConfigError(
        f"{got} not what {begun.what} was trained on; accepted: {before}, or {begun.another}"
    )


def _unrecorded(config: RunConfig, begun: Begun, found: DataIdentity) -> list[str]:
    """The note that nobody knows what ``begun`` was trained on.

    Raises:
        ConfigError: it was probably trained on something else, since nothing but that was prepared
            at the time.
    """
    mine = Path(found.prepared or "")
    if config.data.prepared is None and _made(mine) > begun.at:
        others = [folder for folder in _preparations(config, mine) if _made(folder) <= begun.at]
        if others and not any(_has(folder, found) for folder in others):
            raise ConfigError(
                f"data.corpus: got {config.data.corpus}, which is not prepared as it was when "
                f"{begun.what} was trained; accepted: data.prepared={max(others, key=_made)}, or "
                f"{begun.another}"
            )
    return [
        f"what {begun.what} was trained on before was not recorded; it goes on with "
        f"{found.prepared}"
    ]


def _made(folder: Path) -> float:
    return (folder / MANIFEST).stat().st_mtime


def _preparations(config: RunConfig, but: Path | None = None) -> Iterator[Path]:
    """The preparations of this corpus and tokenizer beside the run, except ``but``."""
    for folder in (Path(config.run.dir) / "data").glob("*/"):
        if not (folder / MANIFEST).is_file():
            continue
        if but is not None and folder.resolve() == but.resolve():
            continue
        try:
            manifest = read_manifest(folder)
        except ConfigError:
            continue
        if (manifest.corpus, manifest.tokenizer) == (config.data.corpus, config.data.tokenizer):
            yield folder
