"""Starts `veloxlab serve` for a test, sends requests, and checks that Ctrl-C ends it cleanly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores SIGINT
MAIN = "import sys; from veloxlab.cli import main; sys.exit(main())"
VELOXLAB = [sys.executable, "-c", f"{LISTEN}; {MAIN}"]
# to leave a long step is a failure here, where all steps are short
PATIENT = "import os; from veloxlab.serve import server; server.END_SECONDS = 60; os._exit = lambda status: os.abort()"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(*arguments: str, model: str = "smollm2-135m"):
    """Start a server of a model, and yield its port; at the end Ctrl-C must end it and all its threads cleanly."""
    port = free_port()
    options = ["serve", model, *arguments, "--port", str(port), "--log-level", "WARNING"]
    command = [sys.executable, "-c", f"{PATIENT}; {LISTEN}; {MAIN}", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        yield port
        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 0, server.stdout.read()
    finally:
        server.kill()
        server.wait(30)
        server.stdout.close()


def post(port: int, path: str, body: dict | bytes) -> tuple[int, dict]:
    """Return status and content of an answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
