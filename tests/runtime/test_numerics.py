"""Products are of the type that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys

JOB = """
import torch
from megatron_progressive.runtime.distributed import Place, world_group
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
with world_group(Place(0, 0, 1)):
    print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
          torch.get_float32_matmul_precision(),
          torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
"""


def test_no_tf32_in_a_job_whatever_the_image_says() -> None:
    """NVIDIA's images set the variable; torch has TF32 on for convolutions."""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOB], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "False", "highest", "False"], done.stderr
