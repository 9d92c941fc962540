"""The quantizations that MLX computes with. Data only."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from encoder.errors import CheckpointError
from encoder.messages import shown

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

_FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Numbers of `bits` bits, in groups along the last axis. A group shares a scale, and in mode affine a bias.

    Source: mlx, ops.cpp, validate_quantized_input and quantization_params_from_mode.
    """

    mode: Mode
    bits: int
    group_size: int

    @classmethod
    def parse(cls, name: str) -> "Quantization":
        """From what a user types: a mode, or a number of bits, which means affine in groups of 64.

        Errors: CheckpointError naming the values that are allowed.
        """
        if name in _FIXED:
            return cls.from_fields({"mode": name}, name)
        if name in map(str, _AFFINE_BITS):
            return cls("affine", int(name), 64)
        allowed = ", ".join([*map(str, _AFFINE_BITS), *_FIXED])
        raise CheckpointError(f"quantize {name!r}: expected one of {allowed}.")

    @classmethod
    def from_fields(cls, fields: dict[str, Any], where: str) -> "Quantization":
        """From `mode`, `bits` and `group_size` as in config.json. A missing field has MLX's default.

        Args:
            fields: the fields.
            where: file and field, for messages.
        Errors: CheckpointError when MLX has no such quantization.
        """
        mode = str(fields.get("mode") or "affine")
        bits, group_size = _FIXED.get(mode, (4, 64))
        bits, group_size = fields.get("bits") or bits, fields.get("group_size") or group_size
        if mode in _FIXED:
            known = (bits, group_size) == _FIXED[mode]
        else:
            known = mode == "affine" and bits in _AFFINE_BITS and group_size in _AFFINE_GROUPS
        if not known:
            raise CheckpointError(
                f"{where}: mode {shown(mode)} with {shown(bits)} bits in groups of {shown(group_size)} is no "
                f"quantization of MLX, expected affine with 2 to 8 bits in groups of 32, 64 or 128, or one of "
                f"{', '.join(_FIXED)}."
            )
        return cls(cast(Mode, mode), int(bits), int(group_size))

    @property
    def label(self) -> str:
        """Name for people: `affine 4-bit in groups of 64`, `mxfp4`."""
        return f"affine {self.bits}-bit in groups of {self.group_size}" if self.mode == "affine" else self.mode

    @property
    def has_biases(self) -> bool:
        """Whether each group has a bias beside its scale."""
        return self.mode == "affine"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can have this quantization: a matrix whose rows are whole groups."""
        return len(shape) == 2 and shape[1] % self.group_size == 0

    def nbytes(self, numbers: int, scale_bytes: int) -> int:
        """Bytes that this many numbers take, with their scales and biases.

        Args:
            numbers: a multiple of `group_size`.
            scale_bytes: size of a scale and of a bias in mode affine. In the other modes a scale has one byte.
        """
        per_group = 2 * scale_bytes if self.has_biases else 1
        return numbers * self.bits // 8 + numbers // self.group_size * per_group
