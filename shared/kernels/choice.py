"""Whether our kernels compute, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.errors import StartError
from shared.kernels.build import find_compiler, find_prebuilt, load_kernels
from shared.kernels.experts import DTYPES


@dataclass(frozen=True)
class Decision:
    """Yes or no, and why, for the log."""

    yes: bool
    reason: str


def compile_kernels(setting: bool | None, weights: torch.dtype, device: torch.device, *, native: bool) -> Decision:
    """Decide, as `choose_compilation` does, and compile if so.

    Raises:
        StartError: ENABLE_COMPILATION is true and cannot be.

    """
    decision = choose_compilation(
        setting,
        weights=weights,
        device=device,
        native=native,
        avx512=bool(torch.cpu.get_capabilities().get("avx512_f")),
        compiler=prebuilt.name if (prebuilt := find_prebuilt()) else find_compiler(),
    )
    if decision.yes:
        try:
            load_kernels()
        except StartError as error:
            if setting:
                raise
            return Decision(False, str(error))
    return decision


def choose_compilation(
    setting: bool | None,
    *,
    weights: torch.dtype,
    device: torch.device,
    native: bool,
    avx512: bool,
    compiler: str | None,
) -> Decision:
    """Decide, for the setting ENABLE_COMPILATION.

    Args:
        setting: as the user chose; None: where it pays.
        weights: what they are kept in.
        device: where they compute.
        native: this CPU multiplies bfloat16 itself, and torch is to have what is bfloat16 then.
        avx512: this CPU has AVX-512, which the kernel is written for; elsewhere it is right and slow.
        compiler: the C++ compiler, or what it made beforehand, if there is either.

    Raises:
        StartError: it is asked for, and these weights have no compiled kernel.

    """
    if setting is False:
        return Decision(False, "ENABLE_COMPILATION=false")
    if device.type != "cpu" or weights not in DTYPES:
        reason = f"our kernels are not for {dtype_name(weights)} on {device.type}"
        if setting:
            raise StartError(f"ENABLE_COMPILATION=true: {reason}; use DTYPE=bfloat16 or float32, or QUANTIZATION=8bit")
        return Decision(False, reason)
    if setting:
        return Decision(True, "ENABLE_COMPILATION=true")
    if weights is torch.bfloat16 and native:
        return Decision(False, "this CPU multiplies bfloat16 itself")
    if not avx512:
        return Decision(False, "the compiled kernel is slow without AVX-512")
    if compiler is None:
        return Decision(False, "no C++ compiler (g++ or clang++) is installed")
    return Decision(True, f"{compiler} is there")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
