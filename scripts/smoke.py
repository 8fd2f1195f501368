"""Imports longgrpo, which must lie below FOLDER, and computes one loss with its gradient: python smoke.py FOLDER"""

import sys
from pathlib import Path

import torch

import longgrpo

package = Path(longgrpo.__file__).resolve()
assert Path(sys.argv[1]).resolve() in package.parents, f"imported from {package}"

hidden = torch.randn(6, 8, requires_grad=True)
result = longgrpo.linear_grpo_loss(hidden, torch.randn(50, 8), torch.arange(6), torch.ones(6))
result.loss.backward()
assert hidden.grad is not None
assert hidden.grad.abs().sum().isfinite()
assert hidden.grad.abs().sum() > 0
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {package.parent}")
