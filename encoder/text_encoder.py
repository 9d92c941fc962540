"""The steps of a request, synchronously: prompts in, prompt embeds out.

The command line, benchmarks and parity tests use this directly; the Engine calls the same steps from its threads.
"""

import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from encoder.checkpoint import Checkpoint, load_weights, open_checkpoint
from encoder.errors import CheckpointError, EncoderError
from encoder.options import ModelOptions
from encoder.pipeline.plan import check_fit, plan_jobs
from encoder.pipeline.selection import Outcome, Selection, export, select
from encoder.pipeline.tokenizer import tokenize
from encoder.presets.preset import Preset
from encoder.qwen3.cpu.blas import Blas, activate
from encoder.qwen3.depth import choose_depth
from encoder.qwen3.forward import ForwardPass, OverlappingForward, choose_forward, widens_bfloat16
from encoder.qwen3.model import Qwen3
from encoder.types import DType, Job, ModelInfo, Pass, PromptEmbeds, Tap, TokenizedPrompt

log = logging.getLogger(__name__)

COMPUTE_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
VERSIONED = ("mlx", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True, slots=True, eq=False)
class BegunBatch:
    """A batch after the first step: the device may compute its first layers.

    Attributes:
        jobs: of the batch.
        taps: all hidden states that the jobs want.
        forward_pass: the pass that has begun; None where it cannot begin early, and no layer runs yet.
    """

    jobs: Sequence[Job]
    taps: Sequence[Tap]
    forward_pass: ForwardPass | None


@dataclass(frozen=True, slots=True, eq=False)
class DispatchedBatch:
    """A batch after the second step: the device computes all of it.

    Attributes:
        selection: the results, while MLX computes them.
        computed_at: where passes are measured, when the forward pass ended, in seconds of time.perf_counter.
        measured: where passes are measured, the pass without the time of its selection.
    """

    selection: Selection
    computed_at: float = 0.0
    measured: Pass | None = None


class CollectedBatch(NamedTuple):
    """A batch after the last step: the outcome of each job, and, where passes are measured, the pass."""

    outcomes: list[Outcome]
    measured: Pass | None


class TextEncoder:
    """A loaded Qwen3 text encoder. Create it and run it on the same thread: MLX streams belong to threads.

    Args:
        checkpoint: opened with the same options; its weights are read here.
        options: how to load and compute it.
        progress: called with bytes done and bytes in total while the weights load.
    Attributes:
        measures_passes: whether a batch waits between its steps to measure them; False unless set.
    Errors: CheckpointError.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ModelOptions,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.compute_dtype = resolve_compute_dtype(options.compute_dtype, checkpoint.dtype, options.force_float16)
        depth = choose_depth(self.config, options.num_layers, options.presets)
        log.info("loading %d of %d decoder layers: %s", depth.layers, self.config.num_hidden_layers, depth.reason)
        self.num_layers = depth.layers
        self.model = Qwen3(replace(self.config, num_hidden_layers=self.num_layers))
        dtype = COMPUTE_DTYPES[self.compute_dtype]
        self.loaded = load_weights(
            checkpoint,
            self.model,
            dtype,
            progress,
            quantize=options.quantize,
            keep_bfloat16=dtype == mx.float32 and widens_bfloat16(self.config),
        )
        self.parameter_bytes = sum(array.nbytes for array in dict(tree_flatten(self.model.parameters())).values())
        self.forward = choose_forward(self.model, dtype)
        self.measures_passes = False

    @classmethod
    def open(cls, options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> "TextEncoder":
        """Open a checkpoint and load it. Errors: CheckpointError."""
        return cls(open_checkpoint(options), options, progress)

    def encode(self, prompts: Sequence[str], preset: Preset, dtype: DType = "bfloat16") -> list[PromptEmbeds]:
        """Encode prompts in one batch. The default dtype is that of the HTTP API and of `Engine.encode`.

        Errors: InvalidField when the preset does not fit or a prompt cannot be read, ModelFailure.
        """
        results = self.run(self.plan(self.tokenize(prompts, preset), preset, dtype))
        embeds = [result for result in results if isinstance(result, PromptEmbeds)]
        for result in results:
            if isinstance(result, EncoderError):
                raise result
        return embeds

    def check(self, preset: Preset) -> None:
        """Return if the preset fits the checkpoint. Safe on any thread. Errors: InvalidField."""
        check_fit(preset, self.checkpoint.tokenizer, self.config, self.num_layers)

    def tokenize(self, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        """Apply the template of a preset and tokenize. Safe on any thread. Errors: InvalidField."""
        return tokenize(self.checkpoint.tokenizer, prompts, preset)

    def plan(self, prompts: Sequence[TokenizedPrompt], preset: Preset, dtype: DType) -> list[Job]:
        """What must be computed for the prompts of one request. Safe on any thread.

        Errors: InvalidField when the preset does not fit this checkpoint, or a token is outside its vocabulary.
        """
        return plan_jobs(prompts, preset, dtype, self.checkpoint.tokenizer, self.config, self.num_layers)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Compute one batch: each job's result in memory of its own, or the error that concerns the job alone.

        The forward pass runs to the deepest layer that a job wants, and each job takes its own hidden states.
        """
        outcomes, _ = self.collect(self.dispatch(self.begin(jobs)))
        return [outcome.detach() if isinstance(outcome, PromptEmbeds) else outcome for outcome in outcomes]

    def begin(self, jobs: Sequence[Job]) -> BegunBatch:
        """The first step of `run`: where batches overlap, give the device the first layers, and don't wait."""
        taps = list(dict.fromkeys(tap for job in jobs for tap in job.taps))
        if isinstance(self.forward, OverlappingForward) and self.overlaps:
            return BegunBatch(jobs, taps, self.forward.begin(jobs, taps))
        return BegunBatch(jobs, taps, forward_pass=None)

    def dispatch(self, begun: BegunBatch) -> DispatchedBatch:
        """The second step: give the device the rest of the batch, and wait for as little as possible.

        Where passes are measured, wait for the forward pass.
        """
        if self.measures_passes:
            return self._dispatch_measured(begun)
        hidden_states = begun.forward_pass.finish() if begun.forward_pass else self.forward(begun.jobs, begun.taps)
        return DispatchedBatch(select(hidden_states, begun.jobs))

    def collect(self, dispatched: DispatchedBatch) -> CollectedBatch:
        """The third step: wait for the results and take them. Some may share memory, see `PromptEmbeds.detach`."""
        outcomes = export(dispatched.selection)
        if dispatched.measured is None:
            return CollectedBatch(outcomes, None)
        selection_ms = (time.perf_counter() - dispatched.computed_at) * 1e3
        return CollectedBatch(outcomes, replace(dispatched.measured, selection_ms=selection_ms))

    def _dispatch_measured(self, begun: BegunBatch) -> DispatchedBatch:
        started_at = time.perf_counter()
        hidden_states = self.forward(begun.jobs, begun.taps)
        mx.eval(list(hidden_states.values()))
        computed_at = time.perf_counter()
        measured = Pass(
            prompts=len(begun.jobs),
            real_tokens=sum(len(job.input_ids) for job in begun.jobs),
            computed_tokens=self.forward.count_rows([job.computed_rows for job in begun.jobs]),
            layers=max(tap.depth for tap in begun.taps),
            forward_ms=(computed_at - started_at) * 1e3,
            selection_ms=0.0,
        )
        return DispatchedBatch(select(hidden_states, begun.jobs), computed_at, measured)

    @property
    def overlaps(self) -> bool:
        """Whether the device computes one batch while the host collects another; not while passes are measured."""
        return isinstance(self.forward, OverlappingForward) and not self.measures_passes

    @property
    def layers_run(self) -> int:
        """Decoder layers that have run since the start: a batch that runs k layers adds k."""
        return self.model.layers_run

    @cached_property
    def info(self) -> ModelInfo:
        """What is loaded and how it computes."""
        blas = activate()
        return ModelInfo(
            model=self.checkpoint.name,
            revision=self.checkpoint.revision,
            fingerprint=self.loaded.fingerprint,
            quantization=self.loaded.quantization,
            random_weights=self.checkpoint.random_weights,
            loras=self.checkpoint.loras,
            compute_dtype=self.compute_dtype,
            device=mx.default_device().type.name,
            forward=self.forward.name,
            blas=_describe(blas),
            parameter_bytes=self.parameter_bytes,
            dims=asdict(self.config),
            num_layers=self.num_layers,
            origin=asdict(self.checkpoint.origin),
            warnings=list(self.checkpoint.warnings),
            versions={"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        )


def resolve_compute_dtype(requested: str, stored: str, force_float16: bool) -> str:
    """The dtype to compute in, by name.

    Errors: CheckpointError when float16 is asked for and not forced.
    """
    if requested == "float16" and not force_float16:
        raise CheckpointError(
            "compute_dtype float16 is refused: Qwen3 overflows to NaN in it. Use bfloat16 or float32, or force float16."
        )
    if requested != "auto":
        return requested
    if mx.default_device().type == mx.DeviceType.cpu:
        return "float32"  # bfloat16 is about 40 times slower there: no BLAS computes it
    return "bfloat16" if stored == "float16" else stored


def _describe(blas: Blas) -> str:
    """Name, version and number of threads: the last bits of its results depend on them."""
    threads = f"with {blas.threads} threads" if blas.threads else None
    return " ".join(filter(None, [blas.name, blas.version, threads]))
