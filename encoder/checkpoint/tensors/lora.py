"""What an adapter makes of a weight: LoRA and its kin, merged when the weight is read.

With W the weight and f the factor of the update, W becomes

lora      W + f · up @ down; where there are magnitudes (DoRA), V = W + f · up @ down with its rows rescaled to them
loha      W + f · (w1_a @ w1_b) ∘ (w2_a @ w2_b)
lokr      W + f · w1 ⊗ w2, each of the two stored whole or as a product of a and b
diff      W + f · diff
weight    what the adapter stores in its place

Source: peft 0.21, tuners/lora/layer.py and variants.py; ComfyUI, comfy/weight_adapter/; LyCORIS, modules/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from encoder.checkpoint.tensors.encodings import OnlyDecoded, product
from encoder.checkpoint.tensors.weights import Arrays, Encoding, StoredArray, StoredTensor

Kind = Literal["weight", "lora", "loha", "lokr", "diff"]
Shape = tuple[int, ...]

_PREFIX = "update"  # of the roles of an adapter's arrays, beside those of the weight that it changes


@dataclass(frozen=True, slots=True)
class Update:
    """What one adapter makes of one weight.

    Attributes:
        kind: of the formula above.
        arrays: by their names in the formula; `magnitude`, one for each row, where there are magnitudes.
        transposed: names of the arrays that are stored transposed.
        factor: alpha by rank, times the user's scale.
    """

    kind: Kind
    arrays: Mapping[str, StoredArray]
    transposed: frozenset[str] = frozenset()
    factor: float = 1.0

    @property
    def label(self) -> str:
        """All that the arrays do not say, for the fingerprint."""
        transposed = "".join(f" {name}ᵀ" for name in sorted(self.transposed))
        return f"{self.kind} × {self.factor:.9g}{transposed}"

    @property
    def rank(self) -> int | None:
        """The inner dimension, by which alpha is divided; None where nothing is a product."""
        inner = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w2_b", "w1_b")}.get(self.kind, ())
        return next((self._shape_of(name)[0] for name in inner if name in self.arrays), None)

    @property
    def shape(self) -> Shape | None:
        """The shape of the weights that it fits; None where its own arrays do not fit each other."""
        match self.kind:
            case "lora":
                return self._product("up", "down")
            case "loha":
                first, second = self._product("w1_a", "w1_b"), self._product("w2_a", "w2_b")
                return first if first == second else None
            case "lokr":
                first, second = (self._whole_or_product(name) for name in ("w1", "w2"))
                if first is None or second is None or len(first) != 2 or len(second) != 2:
                    return None
                return first[0] * second[0], first[1] * second[1]
        return self._shape_of(self.kind)

    def apply(self, weight: mx.array, base: mx.array, arrays: Arrays) -> mx.array:
        """The changed weight.

        Args:
            weight: float32, perhaps changed by other adapters before.
            base: float32, the weight before all of them. Magnitudes are those of its rows.
            arrays: of this update, by name.
        """
        upright = {name: self._upright(name, array.astype(mx.float32)) for name, array in arrays.items()}
        if self.kind == "weight":
            return upright["weight"]
        delta = self._delta(upright)
        if "magnitude" not in arrays:
            return weight + delta
        norms = mx.linalg.norm(base + delta, axis=1, keepdims=True)
        return (weight + delta) * (upright["magnitude"].reshape(-1, 1) / norms)

    def _delta(self, arrays: Arrays) -> mx.array:
        """What is added to the weight. The factor multiplies the smallest array: a pass over the weight takes time."""
        match self.kind:
            case "lora":
                return product(self.factor * arrays["up"], arrays["down"])
            case "loha":
                return product(self.factor * arrays["w1_a"], arrays["w1_b"]) * product(arrays["w2_a"], arrays["w2_b"])
            case "lokr":
                first, second = (
                    arrays[name] if name in arrays else product(arrays[f"{name}_a"], arrays[f"{name}_b"])
                    for name in ("w1", "w2")
                )
                return mx.kron(self.factor * first, second)
        return self.factor * arrays["diff"]

    def _upright(self, name: str, array: mx.array) -> mx.array:
        return array.T if name in self.transposed else array

    def _shape_of(self, name: str) -> Shape:
        shape = self.arrays[name].shape
        return shape[::-1] if name in self.transposed else shape

    def _product(self, left: str, right: str) -> Shape | None:
        if left not in self.arrays or right not in self.arrays:
            return None
        rows, columns = self._shape_of(left), self._shape_of(right)
        fits = len(rows) == len(columns) == 2 and rows[1] == columns[0] > 0
        return (rows[0], columns[1]) if fits else None

    def _whole_or_product(self, name: str) -> Shape | None:
        return self._shape_of(name) if name in self.arrays else self._product(f"{name}_a", f"{name}_b")


@dataclass(frozen=True, slots=True)
class Merged(OnlyDecoded):
    """A stored weight of any encoding and the updates of adapters, in the order in which they were named."""

    base: Encoding
    updates: tuple[Update, ...]

    @property
    def label(self) -> str:
        return " + ".join([self.base.label, *(update.label for update in self.updates)])

    @property
    def quantized(self) -> bool:
        return self.base.quantized

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        own = {role: array for role, array in arrays.items() if not role.startswith(_PREFIX)}
        base = weight = self.base.decode(own, mx.float32)
        for index, update in enumerate(self.updates):
            weight = update.apply(weight, base, {name: arrays[_role(index, name)] for name in update.arrays})
        return weight.astype(dtype)


def merge(tensor: StoredTensor, updates: Sequence[Update]) -> StoredTensor:
    """The tensor with updates after those that it has. Their shapes must be its own."""
    base = tensor.encoding
    merged = (
        replace(base, updates=(*base.updates, *updates)) if isinstance(base, Merged) else Merged(base, tuple(updates))
    )
    added = {
        _role(index, name): array
        for index, update in enumerate(merged.updates)
        for name, array in update.arrays.items()
    }
    return replace(tensor, encoding=merged, arrays={**tensor.arrays, **added})


def _role(index: int, name: str) -> str:
    return f"{_PREFIX} {index} {name}"
