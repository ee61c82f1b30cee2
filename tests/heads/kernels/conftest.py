"""Kernels run on a GPU, or anywhere under TRITON_INTERPRET=1; ``tests/heads/test_kernels.py`` starts them that way."""

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
