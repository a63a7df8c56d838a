"""NaN and infinities in the weights of a model: such weights are neither imported nor exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_progressive.config import ConfigError
from megatron_progressive.huggingface.folder import listed

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch


class FiniteWeights:
    """A look at weights as they pass by; :meth:`refuse` then names all that are not finite."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def look(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, once its values that are NaN or infinite have been counted."""
        import torch

        if tensor.numel():
            ends = torch.stack(torch.aminmax(tensor))  # takes no memory; NaN if anything is
            if not bool(torch.isfinite(ends).all()):
                count = int((~torch.isfinite(tensor)).sum())
                self._found[name] = f"{name} ({count} of {tensor.numel()})"
        return tensor

    def passed(self, name: str) -> bool:
        """Whether a tensor that has passed by is finite."""
        return name not in self._found

    def refuse(self, what: str) -> None:
        """Raise :class:`ConfigError`, in one line that names the tensors, where any is not finite.

        Args:
            what: the field that names the model, and its folder.
        """
        if self._found:
            names = listed("NaN or infinite values in", [*self._found.values()])
            raise ConfigError(f"{what} has {names}; accepted: finite weights")
