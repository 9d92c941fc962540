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

tune_process(sys.argv[1])
for round in range(10):
    blocks = [np.ones(int(sys.argv[2]), np.uint8) for _ in range(4)]
    del blocks
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""
RETURN = """
import json, os, sys
from pathlib import Path
from app.process import tune_process

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "tuned":
    tune_process("cpu")
del_first = bytearray(2**24)
del del_first  # glibc learns from it that large blocks come and go
before = resident()
kept = []
for round in range(20):
    blocks = [bytearray(b"x" * 2**21) for _ in range(8)]
    kept.append(bytearray(b"x" * 10_000))
    del blocks
print(json.dumps(resident() - before))
"""
HEAPS = """
import ctypes, sys, tempfile, threading
from app.process import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
libc = ctypes.CDLL(None)
barrier = threading.Barrier(9)

def use_a_heap():
    libc.malloc(1000)
    barrier.wait()
    barrier.wait()

for _ in range(8):
    threading.Thread(target=use_a_heap).start()
barrier.wait()
with tempfile.NamedTemporaryFile() as file:
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
barrier.wait()
"""
COLLECT = """
import gc, json
from app.main import create_app
from app.process import tune_process

app = create_app()
before = len(gc.get_objects())
tune_process("cpu")
print(json.dumps([before, len(gc.get_objects())]))
"""

ANSWER = """
import gc, http.client, json, threading
from app.listen import listening_socket
from app.main import create_app
from app.process import tune_process
from app.server import Server
from app.settings import Settings

settings, loaded = Settings(model="demo", port=0, log_level="warning"), threading.Event()
with listening_socket(settings) as sock:
    server = Server(create_app(settings), sock, loaded.set)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    assert loaded.wait(60)
    tune_process("cpu")
    connection = http.client.HTTPConnection(*sock.getsockname())

    def ask(times):
        for number in range(times):
            for body, status in (
                ({"prompt": f"a cat {number}"}, 200),
                ({"prompt": f"a cat {number}", "preset": "z-image"}, 200),
                ({"prompts": [f"a dog {number} {other}" for other in range(64)]}, 200),
                ({"prompt": number}, 422),
            ):
                headers = {"content-type": "application/json", "cache-control": "no-store"}
                connection.request("POST", "/encode", json.dumps(body), headers)
                reply = connection.getresponse()
                reply.read()
                assert reply.status == status, reply.status

    ask(10)
    gc.collect()
    before = sum(generation["collections"] for generation in gc.get_stats())
    ask(25)
    collections = sum(generation["collections"] for generation in gc.get_stats()) - before
    gc.collect()
    gc.disable()
    ask(25)
    left = gc.collect()
    server.should_exit = True
    thread.join()
print(json.dumps([collections, left]))
"""


def output(script: str, *arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_memory_of_small_results_is_used_again() -> None:
    """Else the kernel gives and takes it anew: four results of 400 kB, eight times."""
    assert output(ALLOCATE, "cpu", "400000") < 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_memory_of_large_results_goes_back_to_the_kernel() -> None:
    """Also where a small object, here in the middle, outlives them. Else the service stays as large as it ever was."""
    as_it_was, tuned = (output(RETURN, how) for how in ("as it was", "tuned"))

    assert tuned < 0.1 * as_it_was


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_memory_of_large_results_of_a_gpu_is_used_again() -> None:
    """New pages for four results of 8 MB, eight times, would take as long as their passes."""
    assert output(ALLOCATE, "gpu", "8000000") < 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_threads_share_heaps() -> None:
    """Each heap keeps what its busiest moment took."""
    apart, shared = (output(HEAPS, how) for how in ("apart", "shared"))

    assert apart > 2
    assert shared <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_whoever_runs_the_service_may_say_otherwise() -> None:
    size, own = "4000000", {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
    as_asked, tuned = output(ALLOCATE, "cpu", size, **own), output(ALLOCATE, "cpu", size)

    assert 20 * as_asked < tuned


def test_a_server_says_when_its_model_is_loaded() -> None:
    """Then the process is tuned: what loading has freed goes back to the kernel."""
    settings, loaded = Settings(model="demo", port=0), threading.Event()
    app = create_app(settings)

    def when_loaded() -> None:
        assert app.state.service.engine.info.model == "demo"
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


def test_requests_leave_nothing_to_the_collector_and_hardly_ever_wait_for_it() -> None:
    """A result that only it could find would stay in memory until it comes."""
    collections, left = output(ANSWER)

    assert collections <= 2  # of 100 requests
    assert left <= 10
