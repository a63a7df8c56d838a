"""What workers need, imported once by the process that they are forked from."""

from megatron_progressive.data import prepared_parts
from megatron_progressive.data.megatron import indexed_dataset

__all__ = ["prepared_parts"]

indexed_dataset()
