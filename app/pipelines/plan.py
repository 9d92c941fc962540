"""What to encode for one call of a pipeline, and the arguments that come of it. Who encodes is the client's affair."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.embeds import Array, Embeds

class Plan:
    """What has to be encoded for one call of a pipeline, and the arguments that come of it.

    Args:
        presets: as the client's `presets()` gives them.
        preset: instead of the adapter's.
        more: the other arguments of the call; those that concern text are minded, all are handed on.
    Errors: TypeError for a pipeline without an adapter, ValueError for images that its encoder would have to see.
    """

    def __init__(
        self,
        pipe: Any,
        presets: Mapping[str, Mapping[str, Any]],
        prompt: Prompts,
        negative_prompt: Prompts | None,
        preset: str | None,
        more: Arguments,
    ) -> None:
        self.pipe, self.more = pipe, more
        self.adapter = adapter_for(pipe)
        self.preset = presets[preset or self.adapter.preset]
        if self.adapter.sees_images and more.get("image") is not None:
            raise ValueError(f"image: the text encoder of {type(pipe).__name__} looks at it, and the service cannot.")
        self.prompts = {"": [prompt] if isinstance(prompt, str) else list(prompt)}
        negatives = self._negatives(negative_prompt)
        if negatives is not None:
            self.prompts["negative_"] = negatives

    def _negatives(self, given: Prompts | None) -> list[str] | None:
        """The negative prompts, one for each prompt; None where the call does not use any."""
        default = self.preset["negative_prompt"]
        if given is None and self.adapter.default_negative:
            given = default
        if default is None or given is None or not self.adapter.guided(self.pipe, self.more):
            return None
        return [given] * len(self.prompts[""]) if isinstance(given, str) else list(given)

    @property
    def requests(self) -> list[Arguments]:
        """The arguments of the client's `encode`, one set for the prompts and one for the negatives, if there are any."""
        window = self.adapter.window(self.pipe, self.preset, self.more)
        fields: Arguments = {} if window is None else {"max_sequence_length": window}
        return [
            fields
            | {
                "prompt": self.adapter.prepare(self.pipe, prompts, self.more),
                "preset": self.preset[preset] or self.preset["name"],
                "dtype": self._wire_dtype(),
            }
            for preset, prompts in zip(("name", "negative_preset"), self.prompts.values(), strict=False)
        ]

    def arguments(self, replies: Sequence[Embeds]) -> Arguments:
        """What the pipeline's call takes, from the replies to `requests`."""
        arguments: Arguments = dict(self.adapter.constant)
        for (prefix, prompts), embeds in zip(self.prompts.items(), replies, strict=True):
            for name, value in self._given(prompts, embeds).items():
                arguments[prefix + name] = value
        return arguments | self.more

    def _given(self, prompts: list[str], embeds: Embeds) -> Arguments:
        adapter = self.adapter
        given = {adapter.embeds: adapter.form(embeds, len(prompts), self._to_tensor)}
        if adapter.mask is not None:
            given[adapter.mask] = self._mask(embeds)
        return given | adapter.beside(self.pipe, prompts, embeds, self.more)

    def _to_tensor(self, array: Array) -> Any:
        return array.torch(self.pipe._execution_device, self._dtype())

    def _mask(self, embeds: Embeds) -> Any:
        mask = embeds.attention_mask.torch(self.pipe._execution_device)
        return mask.long() if self.adapter.mask_dtype == "int64" else mask

    def _dtype(self) -> Any:
        import torch

        return torch.float32 if self.adapter.dtype == "float32" else self.pipe.transformer.dtype

    def _wire_dtype(self) -> str:
        """The dtype to ask for: the one that is needed, where the wire has it."""
        name = str(self._dtype()).removeprefix("torch.")
        return name if name in WIRE_DTYPES else "bfloat16"
