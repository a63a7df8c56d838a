"""``mprog export hf --push``: an exported folder to the Hugging Face hub, with a token from where
huggingface_hub has it (``hf auth login``, ``HF_TOKEN``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError


class PushFailed(RuntimeError):
    """The hub did not take the folder; the message says why."""


def check_push(repo: str) -> None:
    """Check, before anything is made, that a repository can be named so, that the hub is reached
    and that it knows the token.

    Raises:
        ConfigError: one of them is not so.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise ConfigError(
            f"--push: got {repo!r} ({_words(error)}); accepted: the name of a repository, as "
            "NAME/MODEL"
        ) from None
    except LocalTokenNotFoundError:
        raise ConfigError(
            f"--push: got {repo}, and there is no token; accepted: after hf auth login, or with "
            "HF_TOKEN"
        ) from None
    except _errors() as error:
        raise ConfigError(
            f"--push: got {repo}, and the hub does not answer as it should ({_words(error)}); "
            "accepted: with the hub in reach and a token that it knows, or without --push"
        ) from None


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a repository of models, which is made where it is not there; returns the
    address of the commit.

    Raises:
        PushFailed: the hub did not take it. The folder stays.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Exported by megatron_progressive"
        )
    except _errors() as error:
        raise PushFailed(
            f"--push: {folder} is whole, but {repo} did not take it ({_words(error)}); `hf upload "
            f"{repo} {folder}` tries again"
        ) from None
    return str(commit.commit_url)


def _errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where something is wrong with the network, the token or the
    repository."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError


def _words(error: Any) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
