"""Everything that makes Megatron-core 0.19.2 run without CUDA, over gloo.

Megatron-core names CUDA in some hundred places (``torch.cuda.current_device()``, ``device="cuda"``,
streams, ``"torch.cuda.FloatTensor"``). :func:`install` rebinds the name ``torch`` inside
``megatron.core`` modules to a stand-in whose CUDA parts answer for the CPU; the global ``torch``
module keeps its meaning for everyone else. It does nothing where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import sys
import types
import warnings
from typing import Any

import torch

_CPU = torch.device("cpu")

# Modules that must be imported before the names are rebound: all that the engine reaches,
# also late (Megatron-core imports some of its own inside functions).
_MODULES = (
    "models.gpt.gpt_model",
    "models.gpt.gpt_layer_specs",
    "transformer.multi_latent_attention",
    "transformer.multi_token_prediction",
    "transformer.moe.moe_layer",
)
_PACKAGES = (
    "dist_checkpointing",
    "dist_checkpointing.strategies",
    "distributed",
    "optimizer",
    "pipeline_parallel",
    "tensor_parallel",
)
_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "eye",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


class _Stream:
    """A stream or an event on a device that has none: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _cuda_stand_in() -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda (CPU stand-in)")
    cuda.__dict__.update({k: v for k, v in torch.cuda.__dict__.items() if k[:2] != "__"})
    stream = _Stream()

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    overrides: dict[str, Any] = dict(
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        current_stream=lambda *a, **k: stream,
        default_stream=lambda *a, **k: stream,
        stream=lambda s: contextlib.nullcontext(),
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *a, **k: torch.get_rng_state(),
        set_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
        Stream=_Stream,
        Event=_Stream,
        nvtx=types.SimpleNamespace(
            range_push=nothing,
            range_pop=nothing,
            range=lambda *a, **k: contextlib.nullcontext(),
        ),
    )
    for name in ("synchronize", "empty_cache", "set_device", "set_stream"):
        overrides[name] = nothing
    overrides["random"] = types.SimpleNamespace(
        get_rng_state=overrides["get_rng_state"], set_rng_state=overrides["set_rng_state"]
    )
    for name, value in overrides.items():
        setattr(cuda, name, value)
    return cuda


class _TorchStandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:  # lazily loaded submodules
        return getattr(torch, name)


def _on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _torch_stand_in() -> types.ModuleType:
    stand_in = _TorchStandIn("torch (CPU stand-in)")
    stand_in.__dict__.update({k: v for k, v in torch.__dict__.items() if k[:2] != "__"})
    stand_in.__dict__["cuda"] = _cuda_stand_in()
    for name in _FACTORIES:
        stand_in.__dict__[name] = _on_cpu(getattr(torch, name))
    return stand_in


def _import_all() -> None:
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    for name in _PACKAGES:
        package = importlib.import_module(f"megatron.core.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            with contextlib.suppress(ImportError):  # those that need an absent extra
                importlib.import_module(module.name)


def install() -> None:
    """Make Megatron-core run on the CPU; to be called once, before anything is built with it.

    Where CUDA is available it has no effect but that of :func:`_patch_recomputation_without_fp8`.
    """
    _patch_recomputation_without_fp8()
    if torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which accelerated libraries it does not find
        _import_all()
    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    _patch_token_dispatcher()
    _patch_uneven_collectives()
    _patch_recomputation()
    _patch_tensor_methods()


def _patch_recomputation_without_fp8() -> None:
    """Let parts of a layer be computed anew without Transformer Engine: whoever does not say
    otherwise is taken to compute in fp8, whose state is Transformer Engine's (0.19.2:
    tensor_parallel/random.py, ``CheckpointWithoutOutput``: ``fp8 is not None`` of ``False``)."""
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE or getattr(random.CheckpointWithoutOutput, "_knows_no_fp8", False):
        return
    original = random.CheckpointWithoutOutput.__init__

    def without_fp8(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    random.CheckpointWithoutOutput.__init__ = without_fp8
    random.CheckpointWithoutOutput._knows_no_fp8 = True


def _patch_recomputation() -> None:
    """Give a tensor whose memory was released the values that were computed anew. Megatron-core
    lets it refer to their memory, by a C++ extension that it compiles in the middle of a step."""
    from megatron.core.tensor_parallel import random

    def share_storage(released: torch.Tensor, computed: torch.Tensor) -> None:
        memory, values = released.untyped_storage(), computed.untyped_storage()
        memory.resize_(values.nbytes())
        memory.copy_(values)

    random._get_share_storage = lambda: share_storage


def _patch_token_dispatcher() -> None:
    """Make the all-to-all token dispatcher work: it takes the sizes of what it sends as numpy
    arrays, which it makes of CUDA tensors only (0.19.2: transformer/moe/moe_utils.py)."""
    from megatron.core.transformer.moe import token_dispatcher

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _patch_uneven_collectives() -> None:
    """Make uneven collectives work: experts that are cut over tensor-parallel ranks gather tokens,
    of which each rank has its own number, whereas gloo's all-gather takes equal sizes only and gloo
    has no reduce-scatter of a list (0.19.2: tensor_parallel/mappings.py)."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *args, **kwargs)  # type: ignore[no-any-return]
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.size(0)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, *args, **kwargs)  # type: ignore[no-any-return]
        total = input_.clone()
        dist.all_reduce(total, group=group)
        parts: Any = torch.split(total, [int(size) for size in input_split_sizes])
        return parts[group.rank()]  # type: ignore[no-any-return]

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


def _patch_tensor_methods() -> None:
    """Make ``Tensor.type()`` and ``Tensor.cuda()`` answer for the CPU when Megatron-core asks.

    Its optimizers compare ``param.type()`` with ``"torch.cuda.FloatTensor"`` (0.19.2:
    optimizer/optimizer.py, optimizer/distrib_optimizer.py, optimizer/clip_grads.py).
    """
    if getattr(torch.Tensor.type, "_answers_for_megatron", False):
        return
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def asked_by_megatron() -> bool:
        module = sys._getframe(2).f_globals.get("__name__", "")
        return str(module).startswith("megatron.core")

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if not args and not kwargs and asked_by_megatron():
            return _TYPE_NAMES.get(answer, answer)
        return answer

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if asked_by_megatron() else original_cuda(self, *args, **kwargs)

    type_._answers_for_megatron = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]
