"""What of this machine moves the last bits of a result, whatever framework computes it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys

from frostline import _io

__all__ = ["kernel_variables", "processor"]

#: Variables through which numeric libraries choose other kernels.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
_CPU_FACTS = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip


def kernel_variables() -> dict[str, str]:
    """The environment variables that are set and through which libraries choose kernels."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


@functools.cache
def processor() -> str:
    """Name of the processor, and a digest of what it can do: kernels are chosen by that."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 16)
    except OSError:
        text = ""
    first = text.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    kept = {name: facts[name] for name in _CPU_FACTS if name in facts}
    kept |= {"machine": platform.machine(), "processor": platform.processor()}
    kept |= {"byte order": sys.byteorder}
    digest = hashlib.sha256(_io.canonical_json(kept)).hexdigest()[:8]
    return f"{facts.get('model name') or platform.processor() or platform.machine()} [{digest}]"
