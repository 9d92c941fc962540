"""From the arrays of an adapter to the updates of a model's weights: every array has a place, or is named.

Arrays of other models, which many files hold beside those of the text encoder, are counted in one warning.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from encoder.checkpoint.files.lora_file import Adapter
from encoder.checkpoint.files.lora_keys import AdapterKey, Modules, owner_of
from encoder.checkpoint.files.lora_scaling import read_scalar
from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.lora import Kind, Update
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError
from encoder.messages import listed

Target = tuple[str, Kind]  # a parameter of the model, and the kind of its update

_MAX_LISTED = 3


@dataclass(frozen=True, slots=True)
class _Part:
    """An array of the adapter, and what its key says of it."""

    key: AdapterKey
    array: StoredArray


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The arrays of an adapter by what they change.

    Attributes:
        parts: by the parameter and the kind of its update.
        alphas: by the path of the module.
        others: arrays of other models, counted by model.
        misfits: what is wrong with the arrays that have no place.
    """

    parts: dict[Target, list[_Part]] = field(default_factory=dict)
    alphas: dict[str, StoredArray] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    misfits: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Updates:
    """What an adapter makes of the weights of a model, and what a user should know of the rest of it."""

    by_target: dict[Target, Update]
    warnings: list[str]


def find_updates(adapter: Adapter, tensors: Mapping[str, StoredTensor], scale: float, model: str) -> Updates:
    """What an adapter makes of the weights of a model. Where it replaces one and adds to it too, it replaces first.

    Args:
        adapter: as opened.
        tensors: the model's, by parameter name.
        scale: factor of the adapter's strength.
        model: its name, for messages.
    Errors: CheckpointError for arrays that do not fit the model, a few of them named, and when there is none for it.
    """
    found = _sort(adapter, Modules(tensors))
    warnings = _check_belonging(adapter, found, scale)
    updates: dict[Target, Update] = {}
    changed = {_path(target) for target in found.parts}
    misfits = found.misfits + [
        f"{alpha.key:.120}: stands alone" for path, alpha in found.alphas.items() if path not in changed
    ]
    for target in sorted(found.parts, key=lambda target: target[1] != "weight"):
        update = _update(found.parts[target], target, adapter, found.alphas.get(_path(target)), scale)
        problem = _problem(update, tensors.get(target[0]))
        if problem:
            misfits.append(f"{next(iter(update.arrays.values())).key:.120}: {problem}")
        updates[target] = update
    if misfits:
        raise CheckpointError(
            f"{adapter.file}: does not fit {model}: {listed(misfits, _MAX_LISTED, '; ')}. Is it made for "
            f"another model, or of a kind other than LoRA, LoHa and LoKr?"
        )
    return Updates(updates, warnings)


def _sort(adapter: Adapter, modules: Modules) -> _Sorted:
    found = _Sorted()
    for array in adapter.arrays:
        owner = owner_of(array.key)
        key = AdapterKey.parse(array.key)
        path = modules.find(key.module) if key is not None else None
        if owner != "this encoder":
            found.others[owner] += 1
        elif key is None or path is None:
            found.misfits.append(f"{array.key:.120} is no part of a LoRA for a weight of it")
        elif key.role == "alpha":
            found.alphas[path] = array
        else:
            found.parts.setdefault((f"{path}.{key.parameter}", key.kind), []).append(_Part(key, array))
    return found


def _check_belonging(adapter: Adapter, found: _Sorted, scale: float) -> list[str]:
    """What belongs to other models, and what is assumed. Errors: CheckpointError when nothing is for this one."""
    others = ", ".join(f"{count} arrays for {owner}" for owner, count in found.others.most_common())
    kinds = {kind for _, kind in found.parts}
    if not kinds and not found.misfits:
        raise CheckpointError(
            f"{adapter.file}: has no LoRA for this text encoder; it holds {others or 'no arrays at all'}. Leave it "
            f"out, and give it to the program that runs that model."
        )
    if kinds == {"weight"}:
        raise CheckpointError(f"{adapter.file}: holds whole weights and no LoRA. Give it as --model.")
    if "weight" in kinds and scale != 1:
        raise CheckpointError(f"{adapter.file}: replaces whole weights, which cannot be scaled. Leave out :{scale:g}.")
    unused = [f"{adapter.file}: {others} are not used here; give it to that model too"] if others else []
    return [*adapter.warnings, *unused]


def _path(target: Target) -> str:
    """The module that an update belongs to."""
    return target[0].rpartition(".")[0]


def _update(parts: list[_Part], target: Target, adapter: Adapter, alpha: StoredArray | None, scale: float) -> Update:
    """The update that these arrays make. Errors: CheckpointError when two of them are the same part of it."""
    arrays: dict[str, StoredArray] = {}
    for part in parts:
        first = arrays.setdefault(part.key.role, part.array)
        if first is not part.array:
            raise CheckpointError(
                f"{adapter.file}: has both {first.key:.120} and {part.array.key:.120} for {target[0]}, expected one "
                f"LoRA. Save each to a file of its own, and name both with --lora."
            )
    transposed = frozenset(part.key.role for part in parts if part.key.transposed)
    update = Update(target[1], arrays, transposed, scale)
    if not update.rank:
        return update
    factor = adapter.scaling.of(parts[0].key.module, update.rank) if alpha is None else read_scalar(alpha) / update.rank
    return replace(update, factor=scale * factor)


def _problem(update: Update, tensor: StoredTensor | None) -> str | None:
    """Why an update does not fit a weight; None where it fits."""
    if tensor is None:
        return "the model has no such parameter"
    found = ", ".join(
        f"{name} {array.dtype} {array.shape}" for name, array in sorted(update.arrays.items(), reverse=True)
    )
    if any(array.dtype not in FLOATS for array in update.arrays.values()):
        return f"has {found:.200}, expected {', '.join(FLOATS)}"
    if update.shape != tensor.shape:
        return f"has {found:.200}, which is no {update.kind} for {tensor.name} of shape {tensor.shape}"
    magnitude = update.arrays.get("magnitude")
    if magnitude is not None and magnitude.shape != tensor.shape[:1]:
        return f"has {found:.200}, expected magnitude of shape {tensor.shape[:1]}"
    return None
