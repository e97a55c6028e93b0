"""Where the tests of Triton kernels run: in the interpreter on the CPU, or on a card."""

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
DTYPES = (
    (torch.float32, torch.float16)
    if IS_INTERPRETED
    else (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )
)
"""The interpreter is silently wrong in bf16."""
