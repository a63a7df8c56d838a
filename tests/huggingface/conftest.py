"""Fixtures of the models' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.huggingface import random_models


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of transformers for each family."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = {}
    for family in random_models.FAMILIES:
        config = random_models.random_hugging_face_config(family, 3)
        folders[family] = tmp_path_factory.mktemp(family) / "theirs"
        random_models.hugging_face_class(family)(config).save_pretrained(folders[family])
    return folders
