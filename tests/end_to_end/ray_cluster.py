"""A Ray cluster as a user starts one, on this host."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_END_S = 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running_cluster() -> Iterator[str]:
    """`ray start --head`; yields the address. Jobs that join it need RAY_AUTH_MODE=disabled, as it has."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}"]
        command += ["--include-dashboard=false", f"--temp-dir={folder}/ray", "--disable-usage-stats"]
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )
        assert started.stdout is not None
        said = ""
        for line in started.stdout:
            said += line
            if "Ray runtime started" in line:
                break
        assert started.poll() is None, said
        try:
            yield f"127.0.0.1:{port}"
            assert started.poll() is None, "the cluster did not outlive the jobs"
        finally:
            head = psutil.Process(started.pid)
            processes = [head, *head.children(recursive=True)]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, _END_S)
