"""What torch computes in, where a device would let it be less than was asked for.

These are settings of the process, made once, before anything is computed.
"""

from __future__ import annotations

import os


def exact_products() -> None:
    """Let fp32 products be fp32, and sums of fp16 products, too.

    TF32 has 10 bits of mantissa: NVIDIA's images turn it on for products by an environment
    variable, torch itself for convolutions. cuBLAS may also add up partial sums of fp16 products in
    fp16, which Newton-Schulz runs in.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def deterministic_kernels() -> None:
    """Allow only kernels of torch, cuBLAS, Transformer Engine and NCCL that give the same bits each
    time they are given the same, which is what Megatron-core's script sets in its deterministic
    mode.

    To be called before a CUDA device or a process group is used. torch raises an error where an
    operation has no such kernel.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")  # switches add up in any order
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
