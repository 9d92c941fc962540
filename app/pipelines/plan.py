"""What to encode for one call of a pipeline, and the arguments that come of it. Who encodes is the client's affair."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.embeds import Array, Embeds, wire_dtype
from app.pipelines.adapters import adapter_for
from app.pipelines.forms import Arguments

Prompts = str | Sequence[str]


class Plan:
    """One call of a pipeline.

    Args:
        presets: by name, as GET /presets has them.
        preset: instead of the adapter's.
        more: the other arguments of the call. Those that concern text are minded, and all are handed on.
    Errors: TypeError for a pipeline without an adapter; ValueError for a preset that the service does not have, and for
    images that the pipeline's encoder would have to see.
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
        self.pipe = pipe
        self.more = more
        self.adapter = adapter_for(pipe)
        self.preset = _find(presets, preset or self.adapter.preset)
        for name in self.adapter.sees:
            if more.get(name) is not None:
                raise ValueError(f"{name}: the text encoder of {type(pipe).__name__} looks at it; the service cannot.")
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.negatives = self._negatives(negative_prompt)

    def _negatives(self, given: Prompts | None) -> list[str] | None:
        """A negative for each prompt; None where the call does not use any."""
        default = self.preset["negative_prompt"]
        if given is None and self.adapter.default_negative:
            given = default
        if default is None or given is None or not self.adapter.guided(self.pipe, self.more):
            return None
        return [given] * len(self.prompts) if isinstance(given, str) else list(given)

    @property
    def requests(self) -> list[Arguments]:
        """The arguments of the client's `encode`: a set for the prompts, and one for the negatives if there are any."""
        name = self.preset["name"]
        requests = [self._request(self._prepared(self.prompts), name)]
        if self.negatives is not None:
            negatives = self._prepared(self.negatives) if self.adapter.prepares_negatives else self.negatives
            requests.append(self._request(negatives, self.preset["negative_preset"] or name))
        return requests

    def _prepared(self, prompts: list[str]) -> list[str]:
        return self.adapter.prepare(self.pipe, prompts, self.more)

    def _request(self, prompts: list[str], preset: str) -> Arguments:
        window = self.adapter.window(self.pipe, self.preset, self.more)
        request: Arguments = {"prompt": prompts, "preset": preset, "dtype": wire_dtype(self._dtype())}
        return request if window is None else request | {"max_sequence_length": window}

    def arguments(self, replies: Sequence[Embeds]) -> Arguments:
        """What the pipeline's call takes, from the replies to `requests`."""
        arguments = {**self.adapter.constant, **self._given(self.prompts, replies[0])}
        if self.negatives is not None:
            negatives = self._given(self.negatives, replies[1])
            arguments |= {f"negative_{name}": value for name, value in negatives.items()}
        return arguments | {name: value for name, value in self.more.items() if name not in self.adapter.kept}

    def _given(self, prompts: list[str], embeds: Embeds) -> Arguments:
        adapter = self.adapter
        given = {adapter.embeds: adapter.form(embeds, len(prompts), self._to_tensor)}
        if adapter.mask is not None:
            mask = embeds.attention_mask.torch(self.pipe._execution_device)
            given[adapter.mask] = mask.long() if adapter.mask_dtype == "int64" else mask
        return given | adapter.beside(self.pipe, prompts, embeds, self.more)

    def _to_tensor(self, array: Array) -> Any:
        return array.torch(self.pipe._execution_device, self._dtype())

    def _dtype(self) -> Any:
        import torch

        return torch.float32 if self.adapter.dtype == "float32" else self.pipe.transformer.dtype


def _find(presets: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The preset of that name or alias."""
    for preset in presets.values():
        if name in (preset["name"], *preset["aliases"]):
            return preset
    raise ValueError(f"preset: the service has no {name!r}; it has {', '.join(presets)}.")
