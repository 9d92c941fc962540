"""What a client gets back: hidden states, as NumPy, PyTorch or MLX arrays; the last two are optional."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.wire import NUMPY_DTYPES, Tensor

if TYPE_CHECKING:
    import mlx.core as mx
    import torch


def wire_dtype(dtype: "torch.dtype") -> str:
    """The dtype to ask for where PyTorch needs this one: the same if the wire has it, else bfloat16."""
    name = str(dtype).removeprefix("torch.")
    return name if name in NUMPY_DTYPES else "bfloat16"


@dataclass(frozen=True, slots=True)
class Array(Tensor):
    """A tensor from the wire that other libraries can take over; bfloat16 keeps its bits on the way."""

    def numpy(self) -> NDArray[Any]:
        """The numbers as float32, which holds every dtype of the wire exactly; `array` has the bits as they came."""
        return self.float32()

    def torch(self, device: Any = None, dtype: Any = None) -> "torch.Tensor":
        """A tensor of the same dtype, or of another if one is given."""
        import torch

        array = np.array(self.array)  # a copy: what came from the wire is read-only, PyTorch wants to write
        same = torch.from_numpy(array.view(np.int16) if self.dtype == "bfloat16" else array)
        return (same.view(torch.bfloat16) if self.dtype == "bfloat16" else same).to(device=device, dtype=dtype)

    def mlx(self) -> "mx.array":
        """An array of the same dtype."""
        import mlx.core as mx

        same = mx.array(self.array)
        return same.view(mx.bfloat16) if self.dtype == "bfloat16" else same


@dataclass(frozen=True, slots=True)
class Embeds:
    """The reply to one request; B prompts, padded on the right with zeros to the longest.

    Attributes:
        hidden_states: (B, L, D); (B, n, L, D) or (B, L, n, D) where n hidden states are stacked.
        attention_mask: (B, L) bool, True where a row belongs to a real token.
        num_tokens: of each prompt, the rows included that a preset drops.
        truncated: whether a prompt was longer than the window.
        model, preset: what computed it.
        rows_axis: of the hidden states, where the rows stand.
    """

    hidden_states: Array
    attention_mask: Array
    num_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    model: str
    preset: str
    rows_axis: int = 1

    def __len__(self) -> int:
        return len(self.num_tokens)

    def numpy(self) -> NDArray[Any]:
        """The hidden states as float32."""
        return self.hidden_states.numpy()

    def torch(self, device: Any = None, dtype: Any = None) -> "torch.Tensor":
        """The hidden states as a PyTorch tensor."""
        return self.hidden_states.torch(device, dtype)

    def mlx(self) -> "mx.array":
        """The hidden states as an MLX array."""
        return self.hidden_states.mlx()

    def rows(self, index: int) -> Array:
        """The rows of real tokens of one prompt: (n, D), without the batch and without padding."""
        array, mask = self.hidden_states.array[index], self.attention_mask.array[index]
        return Array(np.compress(mask, array, self.rows_axis - 1), self.hidden_states.dtype)


def read_embeds(document: dict[str, Any]) -> Embeds:
    """The embeds in an unpacked reply of /encode; of stacked hidden states the rows are found by their number."""
    hidden_states, attention_mask = document["hidden_states"], document["attention_mask"]
    return Embeds(
        hidden_states=Array(hidden_states.array, hidden_states.dtype),
        attention_mask=Array(attention_mask.array, attention_mask.dtype),
        num_tokens=tuple(document["num_tokens"]),
        truncated=tuple(document["truncated"]),
        model=document["model"],
        preset=document["preset"],
        rows_axis=hidden_states.array.shape.index(attention_mask.array.shape[1], 1),
    )


def read_layers(document: dict[str, Any]) -> Embeds:
    """The embeds in an unpacked reply of /encode_layers, which stacks hidden states in front of the rows."""
    embeds = read_embeds(document)
    return replace(embeds, rows_axis=embeds.hidden_states.array.ndim - 2)
