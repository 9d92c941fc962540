"""How the process of a service runs. Work is counted here, in a process of its own: page faults, objects."""

import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from app.listen import listening_socket
from app.main import create_app
from app.server import Server
from app.settings import Settings

ALLOCATE = """
import json, resource, sys
import numpy as np
from app.process import tune_process

if sys.argv[1] == "tuned":
    tune_process()
for round in range(10):
    blocks = [np.ones(2**24, np.uint8) for _ in range(4)]
    del blocks
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""
COLLECT = """
import gc, json
from app.main import create_app
from app.process import tune_process

app = create_app()
before = len(gc.get_objects())
tune_process()
print(json.dumps([before, len(gc.get_objects())]))
"""


def output(script: str, *arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_memory_of_results_is_used_again() -> None:
    """Else the kernel gives and takes it anew: four results of 16 MiB, eight times."""
    as_it_was, tuned = (output(ALLOCATE, how) for how in ("as it was", "tuned"))

    assert 20 * tuned < as_it_was


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"MALLOC_MMAP_THRESHOLD_": "1048576"}], ids=str)
def test_whoever_runs_the_service_may_say_otherwise(own: dict[str, str]) -> None:
    as_asked, tuned = output(ALLOCATE, "tuned", **own), output(ALLOCATE, "tuned")

    assert 20 * tuned < as_asked


def test_a_server_says_when_its_model_is_loaded() -> None:
    """Then the process is tuned: what loading has freed goes back to the kernel."""
    settings, loaded = Settings(model="demo", port=0), threading.Event()
    app = create_app(settings)

    def when_loaded() -> None:
        assert app.state.engine.info.model == "demo"
        loaded.set()

    with listening_socket(settings) as sock:
        server = Server(app, sock, when_loaded)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        assert loaded.wait(60)
        server.should_exit = True
        thread.join()


def test_what_was_imported_is_not_collected_again() -> None:
    before, after = output(COLLECT)

    assert after < 0.01 * before
