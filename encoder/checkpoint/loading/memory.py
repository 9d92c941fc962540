"""Whether a checkpoint fits into this machine's memory, and if not, what would. Asked before it is read."""

import os
from collections.abc import Collection
from pathlib import Path

import mlx.core as mx

from encoder.checkpoint.loading.residency import Resident, plan_residents
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import StoredTensor
from encoder.errors import CheckpointError

CGROUP = Path("/sys/fs/cgroup")  # version 2, as seen from inside a container
MEMINFO = Path("/proc/meminfo")
_SUGGESTED_BITS = ("8", "4")


def check_memory(residents: Collection[Resident]) -> None:
    """Return when the weights fit.

    Errors: CheckpointError with the memory needed, the memory available, and the options that would fit.
    """
    needed, available = bytes_needed(residents), available_bytes()
    if available is None or needed <= available:
        return
    dtype = str(_main_dtype(residents)).removeprefix("mlx.core.")
    fitting = [f"{flag} ({_gb(size)})" for flag, size in _alternatives(residents) if size <= available]
    advice = f"What fits: {', '.join(fitting)}." if fitting else "No quantization of this checkpoint fits either."
    raise CheckpointError(
        f"The weights need {_gb(needed)} of memory in {dtype}, and {_gb(available)} are available. {advice} "
        f"Serving fewer presets may help too: --only-presets flux2-klein loads 27 layers of 36."
    )


def bytes_needed(residents: Collection[Resident]) -> int:
    """Bytes at the peak of loading: all weights, and the largest stored tensor while it is decoded."""
    return sum(resident.nbytes for resident in residents) + max(resident.bytes_while_read for resident in residents)


def available_bytes() -> int | None:
    """Memory that the weights may take, in bytes; None where the system does not say."""
    if mx.default_device().type != mx.DeviceType.cpu:
        device = mx.device_info()
        limit = device.get("max_recommended_working_set_size") or device.get("free_memory")
        return int(limit) if limit else None
    limits = [limit for limit in (_free_bytes(), _cgroup_bytes()) if limit is not None]
    return min(limits, default=None)


def _alternatives(residents: Collection[Resident]) -> list[tuple[str, int]]:
    """Other options for the same tensors, as flags, and the bytes that each needs."""
    tensors: list[StoredTensor] = [resident.stored for resident in residents]
    dtype = _main_dtype(residents)
    options = []
    if dtype == mx.float32:
        in_bfloat16 = plan_residents(tensors, mx.bfloat16, None, keep=False)
        options.append(("--compute-dtype bfloat16", bytes_needed(in_bfloat16.values())))
    for bits in _SUGGESTED_BITS:
        quantized = plan_residents(tensors, dtype, Quantization.parse(bits), keep=True)
        options.append((f"--quantize {bits}", bytes_needed(quantized.values())))
    return options


def _main_dtype(residents: Collection[Resident]) -> mx.Dtype:
    """The dtype of the largest tensor; norms may have another."""
    return max(residents, key=lambda resident: resident.nbytes).dtype


def _free_bytes() -> int | None:
    """Memory that the kernel can give without swapping; on macOS, which has no such number, all of the memory."""
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _cgroup_bytes() -> int | None:
    """Memory that the container may still take. Page cache counts as free: the kernel drops it first."""
    try:
        limit, used = int((CGROUP / "memory.max").read_text()), int((CGROUP / "memory.current").read_text())
        fields = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(fields["inactive_file"]) + int(fields["active_file"])
    except (OSError, KeyError, ValueError):  # no cgroup v2, or "max": no limit
        return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
