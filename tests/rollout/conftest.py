"""A real vLLM server, started once for all tests that need one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from mrpo.config import Config
from mrpo.file_lock import lock_file
from mrpo.rollout.vllm_server import server_command


@pytest.fixture
def only_launched_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test at a time holds it: on a CPU vLLM names the memory that an engine's processes share by their ranks."""
    with (tmp_path_factory.getbasetemp().parent / "launched_engines.lock").open("wb") as file:
        assert lock_file(file, patience=600)
        yield


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server of the shipped policy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, *server_command(Config())[1:], "--enforce-eager", "--host", "127.0.0.1"]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=os.environ | environment, stdout=output, stderr=output
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()
