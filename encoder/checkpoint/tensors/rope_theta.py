"""Which rope_theta a checkpoint has, and how that is known. Pure: what there is to see is handed in.

Qwen3 and Qwen3-VL have the same tensors and another theta, so a wrong one gives plausible nonsense. Facts come first:
what the user says, a config, the frequencies themselves, a vision tower. A name is an assumption, which is allowed with
a warning. Where nothing says it, or two names contradict each other, the user is asked.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from encoder.checkpoint.tensors.families import (
    MODELS,
    ONLY_QWEN3,
    QWEN3_SYSTEMS,
    QWEN3_THETA,
    QWEN3_VL_SYSTEMS,
    QWEN3_VL_THETA,
    SYSTEMS,
    VOCABULARIES,
)
from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.fields import MAX_DIM, Fields
from encoder.qwen3.rope import read_rope, states_theta

_ASK = "Give --rope-theta 1000000 or --rope-theta 5000000, or put the model's config.json beside it."
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_VISION = re.compile(r"(?:^|\.)(?:visual\.|deepstack)")  # as Qwen3-VL names its vision tower, and what no other has
_LANGUAGE_MODEL = re.compile(r"(?:^|\.)(?:language_model|vision_tower)\.")  # also in other vision models
_COMPONENT = re.compile(r"^(?:text_encoders|cond_stage_model)\.(\w+)\.")
_NAMING_METADATA = re.compile(r"arch|model|format|name|title|class|base|source|repo")
_MAX_NAME = 300  # letters; what is longer is no name
# Krea 2 and Ideogram 4 came with mflux 0.18. Before, it saved no Qwen3-VL whose keys begin with `layers.`
_MFLUX_WITH_VL = (0, 18)
_VL_SIBLINGS = {
    "unconditional_transformer": "Ideogram 4",
    "mllm": "Boogu-Image",
    "preprocessor_config.json": "that it takes images",
    "video_preprocessor_config.json": "that it takes videos",
}

Sign = tuple[float, str]  # a theta, and what stands for it, as a short sentence


@dataclass(frozen=True, slots=True)
class RopeTheta:
    """What was found.

    Attributes:
        value: the theta.
        source: how it is known, in a few words.
        warning: a sentence for the user where it is an assumption, or contradicts something; else None.
    """

    value: float
    source: str
    warning: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warning, or nothing."""
        return () if self.warning is None else (self.warning,)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to see of a checkpoint.

    Attributes:
        where: the file or folder, for messages.
        given: --rope-theta; None where the user does not give it.
        frequencies: the theta that stored frequencies follow from, see inv_freq.py; None where there are none.
        keys: of all arrays in the files.
        metadata: of the files' headers.
        names: of the file or folder itself first, then of the folders around it, and of the model as the user named it.
        classes: that a pipeline's model_index.json and the transformer's config.json name.
        siblings: paths in the pipeline's folder, relative to it, down to one level: `vae`, `transformer/0.safetensors`.
        hidden_size, intermediate_size, vocab_size: dims of the model.
    """

    where: str
    given: float | None = None
    frequencies: float | None = None
    keys: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] = ()
    classes: Sequence[str] = ()
    siblings: Sequence[str] = ()
    hidden_size: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0


def settle_rope_theta(
    config: Qwen3Config, where: str, stated: bool, given: float | None
) -> tuple[Qwen3Config, RopeTheta]:
    """The config with the theta that is computed with, and how that is known.

    Args:
        config: as read, with a theta of its own or the default.
        where: the config's file, for messages.
        stated: whether the theta is the config's own.
        given: --rope-theta; None where the user does not give it.
    """
    value = config.rope_theta
    if given is not None:
        found = _given(given, [(value, f"{where} says so")] if stated else [])
    elif stated:
        found = RopeTheta(value, where)
    else:
        warning = f"{where} has no rope_theta, so it is the default, {value:.10g}; Qwen3 has 1000000. See --rope-theta"
        found = RopeTheta(value, "the default", warning)
    return replace(config, rope_theta=found.value), found


def find_rope_theta(evidence: Evidence) -> RopeTheta:
    """The theta where there is no config.

    Errors: CheckpointError that names --rope-theta, where nothing says it or two things contradict each other.
    """
    facts = list(_facts(evidence))
    if evidence.given is not None:
        return _given(evidence.given, facts)
    if evidence.frequencies is not None:
        return RopeTheta(*facts[0])
    _refuse_contradiction(facts, evidence)
    if facts:
        return RopeTheta(*facts[0])
    hints = list(_hints(evidence))
    _refuse_contradiction(hints, evidence)
    if hints:
        theta, what = hints[0]
        warning = f"there is no config; {what}, so rope_theta is taken to be {theta:.10g}. See --rope-theta"
        return RopeTheta(theta, f"assumed: {what}", warning)
    raise CheckpointError(
        f"{evidence.where}: has no config, and nothing else says whether its rope_theta is 1000000, as of Qwen3 "
        f"({QWEN3_SYSTEMS}), or 5000000, as of Qwen3-VL ({QWEN3_VL_SYSTEMS}). {_ASK}"
    )


def _given(theta: float, said: Sequence[Sign]) -> RopeTheta:
    """What the user says, with a warning where something else says another."""
    other = next((f"{value:.10g}: {what}" for value, what in said if value != theta), None)
    warning = f"rope_theta is {theta:.10g}, as --rope-theta says, and should be {other}" if other else None
    return RopeTheta(theta, "--rope-theta", warning)


def _refuse_contradiction(signs: Sequence[Sign], evidence: Evidence) -> None:
    for theta, what in signs:
        first, why = signs[0]
        if theta != first:
            raise CheckpointError(
                f"{evidence.where}: has no config; {why}, whose rope_theta is {first:.10g}, but {what}, whose "
                f"rope_theta is {theta:.10g}. {_ASK}"
            )


def _facts(evidence: Evidence) -> Iterator[Sign]:
    """What is certain, the surest first."""
    if evidence.frequencies is not None:
        yield evidence.frequencies, "it holds RoPE's frequencies"
    for key, value in evidence.metadata.items():
        theta = _theta_of_embedded_config(value, f"{evidence.where}: {shown(key)} in the header")
        if theta is not None:
            yield theta, f"it holds a config, {shown(key)} in the header"
    if any(map(_VISION.search, evidence.keys)):
        yield QWEN3_VL_THETA, "it holds the vision tower of a Qwen3-VL"
    only = ONLY_QWEN3.get((evidence.hidden_size, evidence.intermediate_size))
    if only is not None:
        yield QWEN3_THETA, f"it has the dims of {only}"
    version = _mflux_version(evidence)
    if version is not None and version < _MFLUX_WITH_VL:
        yield QWEN3_THETA, "it was saved by an mflux that has no Qwen3-VL"


def _theta_of_embedded_config(text: str, where: str) -> float | None:
    """What a config says that somebody put into a header as JSON. Errors: CheckpointError for a scaled RoPE."""
    if '"rope_theta"' not in text:
        return None
    try:
        config = json.loads(text)
        inner = config.get("text_config", config)
        fields = Fields(inner, where) if isinstance(inner, dict) else None
    except (ValueError, AttributeError, RecursionError):
        return None  # it is no config
    if fields is None or not states_theta(fields):
        return None
    theta, scaling = read_rope(fields, QWEN3_THETA, MAX_DIM)
    if scaling is not None:
        raise CheckpointError(f"{where}: RoPE is scaled by {scaling}. Put this config beside the file as config.json.")
    return theta


def _hints(evidence: Evidence) -> Iterator[Sign]:
    """What points to a theta without proving it."""
    yield from _read_path(evidence.names)
    components = sorted({name for key in evidence.keys if (name := component_of(key)) is not None})
    for name in [*components, *evidence.classes]:
        yield from _read_name(name)
    for key, value in evidence.metadata.items():
        if _NAMING_METADATA.search(key.lower()):
            yield from _read_name(value)
    if any(map(_LANGUAGE_MODEL.search, evidence.keys)):
        yield QWEN3_VL_THETA, "its keys are those of a vision model"
    if evidence.vocab_size in VOCABULARIES:
        yield QWEN3_THETA, f"it has the vocabulary of {VOCABULARIES[evidence.vocab_size]}"
    yield from _read_siblings(evidence)


def component_of(key: str) -> str | None:
    """The model that a key belongs to, in ComfyUI's files that hold several; None where the key does not say it."""
    match = _COMPONENT.match(key)
    return match[1] if match else None


def _read_path(names: Sequence[str]) -> Iterator[Sign]:
    """What the names say. Where the own name says VL, the folders around it add nothing."""
    own = list(_read_name(names[0])) if names else []
    yield from own
    if not any(theta == QWEN3_VL_THETA for theta, _ in own):
        for name in names[1:]:
            yield from _read_name(name)


def _read_name(name: str) -> Iterator[Sign]:
    """What a name says. A model says more than a system, but for plain Qwen3, which many write for Qwen3-VL too."""
    words = _CAMEL.sub("_", name[:_MAX_NAME]).lower()
    model = next((word for word in MODELS if word.pattern.search(words)), None)
    if model is not None:
        yield model.theta, f"the name {shown(name)} says {model.model}"
    if model is None or model.theta == QWEN3_THETA:
        for system in SYSTEMS:
            if system.pattern.search(words):
                yield system.theta, f"the name {shown(name)} says a system with {system.model}"


def _read_siblings(evidence: Evidence) -> Iterator[Sign]:
    siblings = set(evidence.siblings)
    for sibling, what in _VL_SIBLINGS.items():
        if sibling in siblings:
            yield QWEN3_VL_THETA, f"{sibling} beside it says {what}"
    # mflux saves the transformer of Krea 2 beside the folders of the pipeline, every other in transformer/.
    shards = any(re.fullmatch(r"transformer/.+\.safetensors", sibling) for sibling in siblings)
    if _mflux_version(evidence) is not None and "vae" in siblings and not shards:
        yield QWEN3_VL_THETA, "mflux saved it without weights in transformer/, as it saves Krea 2"


def _mflux_version(evidence: Evidence) -> tuple[int, int] | None:
    match = re.match(r"(\d{1,4})\.(\d{1,4})", evidence.metadata.get("mflux_version", ""))
    return (int(match[1]), int(match[2])) if match else None
