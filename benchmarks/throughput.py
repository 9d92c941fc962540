"""Throughput with many clients at once, relative to the same prompts in ideal batches.

    python -m benchmarks.throughput [--requests 256] [--clients 64] [--rounds 3] [--model FOLDER]

Unless a model is given, the checkpoint has half of Qwen3-0.6B's width, so that enough requests fit into a minute. The
service's own work then weighs four times as much. For the ideal batches, a TextEncoder in a process of its own knows
all prompts beforehand, sorts them by length and fills batches up to max_batch_tokens. Padding waste is the share of the
computed rows that no request needs. Padding rows that a preset delivers, such as FLUX.2 klein's, are not waste.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.checkpoints import Dims, read_prompts, write_checkpoint
from benchmarks.mixed import CLIENTS, Asked, mixed_requests, send_all
from benchmarks.report import Row, report
from benchmarks.service import Service
from benchmarks.workers import Result, Worker, answer_requests

MODULE = "benchmarks.throughput"
HALF = Dims(512, 1536, 8, 4)
LAYERS = 28
SHARE_PERCENT, WASTE_PERCENT = 95.0, 8.0


def measure(requests: int = 256, clients: int = CLIENTS, rounds: int = 3, model: Path | None = None) -> list[Row]:
    """Two rows: the share of the ideal throughput, and the padding waste."""
    asked = mixed_requests(read_prompts(), requests)
    warm_up = mixed_requests(read_prompts(), clients, seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or Path(scratch)
        if model is None:
            write_checkpoint(folder, HALF, LAYERS)
        with Service(folder) as service, Worker(MODULE, "--work", str(folder)) as ideal:
            send_all(service, warm_up, clients)
            ideal(warm_up)
            before = service.connect().metrics()
            seconds: dict[str, list[float]] = {"ideal batches": [], "service": []}
            for _ in range(rounds):
                seconds["ideal batches"].append(ideal(asked).seconds)
                seconds["service"].append(send_all(service, asked, clients))
            after = service.connect().metrics()
    names = ("real_tokens", "padded_tokens", "batches")
    grown = {name: after[f"{name}_total"] - before[f"{name}_total"] for name in names}
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    share = 100 * medians["ideal batches"] / medians["service"]
    waste = 100 * (1 - grown["real_tokens"] / grown["padded_tokens"])
    load = f"{clients} clients, {requests} mixed requests"
    return [
        Row(f"{load}: share of the throughput of ideal batches", MODULE, share, "%", SHARE_PERCENT, medians=medians),
        Row(f"{load}: padding waste", MODULE, waste, "%", WASTE_PERCENT, False, medians=grown, medians_unit=""),
    ]


def work(folder: str) -> None:
    """In a worker: answer each list of requests with the time that they take in ideal batches."""
    from encoder import Limits, ModelOptions, TextEncoder, get_preset
    from encoder.types import Job

    encoder = TextEncoder.open(ModelOptions(folder))
    budget = Limits().max_batch_tokens

    def run(requests: list[list[str]]) -> Result:
        jobs: list[Job] = []
        for prompt, preset in map(Asked._make, requests):
            jobs += encoder.plan(encoder.tokenize([prompt], get_preset(preset)), get_preset(preset), "bfloat16")
        batch: list[Job] = []
        for job in sorted(jobs, key=lambda job: job.computed_rows):
            if batch and encoder.forward.count_rows([each.computed_rows for each in [*batch, job]]) > budget:
                encoder.run(batch)
                batch = []
            batch.append(job)
        encoder.run(batch)
        return None

    answer_requests(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    with report(options.output) as rows:
        rows += measure(options.requests, options.clients, options.rounds, options.model)


if __name__ == "__main__":
    main()
