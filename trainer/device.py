"""Chooses the device and the floating-point type to compute in."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple

import torch

from trainer.config import ConfigError

# Values of ONEDNN_MAX_CPU_ISA (DNNL_MAX_CPU_ISA in older versions) that hide instructions which the CPU has.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AMX = _WITHOUT_BF16 | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}
_EMULATED = {"bf16": "2 to 10", "fp16": "5 to 50"}
"""Slowdown of a training step against fp32 on a CPU; measured on 64 px models with AVX2 and AVX-512."""


class Precision(NamedTuple):
    """A type to compute in."""

    name: str
    """`fp32`, `bf16` or `fp16`."""
    reason: str = ""
    """Why `auto` chose it; empty if the user chose it."""
    warning: str = ""
    """Why it is slow on this device; empty if it is fast."""

    def __str__(self) -> str:
        return f"{self.name} (auto: {self.reason})" if self.reason else self.name


def find_device(name: str) -> torch.device:
    """The named device; `auto` is a GPU if there is one. Raises ConfigError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    try:
        torch.zeros(1, device=device).item()  # the meta device creates tensors, but they have no values
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", [f"{name!r} cannot be used here: {str(error).splitlines()[0]}"]) from error
    return device


def parse_device(name: str) -> torch.device:
    """The named device, even if this machine lacks it. Raises ConfigError if the name is invalid."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", [f"found {name[:80]!r}, expected auto, cpu, cuda or cuda:1"]) from error


def choose_precision(asked: str, device: torch.device, training: bool) -> Precision:
    """Resolves a requested precision on a device; `auto` is the fastest safe one.

    Inference converts the weights to this type. Training keeps fp32 weights and uses autocast, which gains less: on a
    CPU, bf16 trains faster than fp32 only with AMX.
    """
    instructions = _bf16_instructions() if device.type == "cpu" else ""
    if asked == "auto":
        return _fastest(device, training, instructions)
    if device.type == "cpu":
        emulated, what = asked == "fp16" or (asked == "bf16" and not instructions), "CPU"
    else:
        without = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        emulated, what = asked == "bf16" and without, "GPU"
    if not emulated:
        return Precision(asked)
    fastest = _fastest(device, training, instructions).name
    factor = f"about {_EMULATED[asked]} times" if device.type == "cpu" else "many times"
    return Precision(
        asked, warning=f"this {what} emulates {asked}, which takes {factor} as long as {fastest} does here"
    )


def _fastest(device: torch.device, training: bool, instructions: str) -> Precision:
    if device.type == "cuda":
        if not training:
            return Precision("fp16", "a GPU, where its error is an eighth of bf16's")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU has it, and it needs no loss scaling")
        return Precision("fp16", "this GPU has no bf16")
    if not instructions:
        what = (
            "this CPU has no instructions for bf16" if device.type == "cpu" else f"bf16 is not tried on {device.type}"
        )
        return Precision("fp32", what)
    if training and instructions != "amx_bf16":
        return Precision("fp32", f"{instructions} does not train faster")
    return Precision("bf16", f"this CPU has {instructions}")


def _bf16_instructions() -> str:
    """The best bf16 multiplication instructions that PyTorch may use on this CPU; empty if there are none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return ""
    most = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if torch.cpu._is_amx_tile_supported() and most not in _WITHOUT_AMX:
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() and most not in _WITHOUT_BF16 else ""
