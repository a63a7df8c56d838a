"""Reading and writing a checkpoint one tensor at a time, in one process and without a job.

The files are those of torch's distributed checkpoint, as Megatron-core's ``torch_dist`` format has
them. torch's own writer keeps every tensor of a file until the file is done; this one holds none.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_progressive.reshard.boxes import Key, whole

_FORMAT_FILE = "metadata.json"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = "common_state/shard_0_1"
"""Megatron-core's entry for what is no tensor, and its content in a checkpoint of tensors alone."""
_DATA_FILE = "__0_0.distcp"
_BOX_ELEMENTS = 1 << 24
"""The most elements of a box: a rank that loads reads whole boxes, even where it needs a part of
one."""


def _no_common() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save([{}], buffer)
    return {_COMMON: buffer.getvalue()}


class TensorReader:
    """Reads whole global tensors of a checkpoint, saved by any layout."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._reader = FileSystemReader(checkpoint)
        self._index = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)

    def read(self, key: Key) -> torch.Tensor:
        """One slot of one tensor, with its global shape."""
        entry = "/".join(key)
        stored = self._index.state_dict_metadata[entry]
        if not isinstance(stored, TensorStorageMetadata):
            raise KeyError(entry)
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({entry: tensor}, self._index, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def common(self) -> dict[str, bytes]:
        """The entries that are no tensors; Megatron-core keeps one, for which it asks."""
        found = {}
        for entry, stored in self._index.state_dict_metadata.items():
            if isinstance(stored, BytesStorageMetadata):
                place = self._index.storage_data[MetadataIndex(entry)]
                with open(self.checkpoint / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    found[entry] = file.read(place.length)
        return found


class TensorWriter:
    """Writes a checkpoint's tensors into an empty folder; the index follows at the end.

    This is a context manager; after an error there is no index.
    """

    def __init__(self, folder: Path, like: TensorReader | None = None) -> None:
        """Begin a checkpoint in ``folder``. ``like`` is a checkpoint whose entries that are no
        tensors are taken over, if there is one."""
        self._folder = folder
        self._index = Metadata(state_dict_metadata={})
        self._results: list[WriteResult] = []
        if like is None:
            (folder / _FORMAT_FILE).write_text(json.dumps(_FORMAT))
        else:
            shutil.copyfile(like.checkpoint / _FORMAT_FILE, folder / _FORMAT_FILE)
        self._file = open(folder / _DATA_FILE, "wb")  # noqa: SIM115 (closed in __exit__)
        for entry, data in (_no_common() if like is None else like.common()).items():
            self._index.state_dict_metadata[entry] = BytesStorageMetadata()
            self._file.write(data)
            self._wrote(MetadataIndex(entry), self._file.tell() - len(data))

    def write(self, key: Key, tensor: torch.Tensor) -> None:
        """Append one slot of one whole tensor."""
        entry = "/".join(key)
        chunks: list[ChunkStorageMetadata] = []
        for box in whole(tensor.shape).split(_BOX_ELEMENTS):
            part = tensor[box.slices_within(whole(tensor.shape))]
            # a view would be saved with all that it is a view of
            part = part if part.shape == tensor.shape else part.clone()
            start = self._file.tell()
            torch.save(part, self._file)
            self._wrote(MetadataIndex(entry, box.offset, len(chunks)), start)
            chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
        self._index.state_dict_metadata[entry] = TensorStorageMetadata(
            TensorProperties.create_from_tensor(tensor), tensor.size(), chunks
        )

    def _wrote(self, index: MetadataIndex, start: int) -> None:
        length = self._file.tell() - start
        place = _StorageInfo(_DATA_FILE, start, length)
        self._results.append(WriteResult(index, length, place))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            FileSystemWriter(self._folder).finish(self._index, [self._results])
