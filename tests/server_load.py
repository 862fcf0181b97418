"""A server under load: ``python -m tests.server_load`` writes ``data/results/server_load.md``.

`veloxlab serve` gets a small model with random weights. Clients send requests at the same time, streaming and not, and
each answer is compared with that of a client alone. Others disconnect early, or send malformed requests. Then the
server gets a signal to end while it is busy.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import veloxlab  # noqa: F401, isort: skip - before mlx, which the next one imports

from tests.gguf_files import write_chat_model
from tests.servers import VELOXLAB, free_port, post
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "server_load.json"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CLIENTS, REQUESTS, GONE, MALFORMED = 32, 128, 200, 60
ROUNDS = 5
START = "a text that all prompts begin with, so that it is read once; "
PROMPTS = [f"{START}{word * count}" for word in ("ab", "c d ", "xyz") for count in (3, 20, 45)]
TOKENS = 24


class Server:
    """A serving process, and its port."""

    def __init__(self, model: Path) -> None:
        self.port = free_port()
        command = [*VELOXLAB, "serve", str(model), "--bits", "4", "--port", str(self.port), "--log-level", "ERROR"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                break
            time.sleep(0.1)
        self.ask(PROMPTS[0])  # loads the model, and compiles kernels

    def ask(self, prompt: str, stream: bool = False) -> str:
        """Return the text that follows a prompt."""
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        if not stream:
            status, answer = post(self.port, TEXT, body)
            return str(answer["choices"][0]["text"]) if status == 200 else f"{status}: {answer}"
        content = json.dumps(body | {"stream": True}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{TEXT}", content, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            lines = [line.decode().removeprefix("data: ").strip() for line in response]
        parts = [json.loads(line) for line in lines if line.startswith("{")]
        return "".join(part["choices"][0]["text"] for part in parts if part["choices"])

    def leave(self, number: int) -> None:
        """Send a request, read a little of the answer or nothing, and disconnect."""
        body = json.dumps({"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 200, "stream": number % 2 == 0})
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sent = (head + body).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(sent if number % 5 else sent[:-5])  # some requests are incomplete
            if number % 5 and number % 2 == 0:
                connection.recv(64)

    def memory(self) -> int:
        """Return resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def addresses(self) -> set[str]:
        """Return the addresses with the open port."""
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        listening = (words[1].split(":") for words in lines if words[3] == "0A")
        found = {address for address, port in listening if int(port, 16) == self.port}
        return {socket.inet_ntoa(bytes.fromhex(each)[::-1]) if len(each) == 8 else each for each in found}

    def end(self, number: signal.Signals) -> float:
        """Return the seconds until the process ends after a signal, while clients wait for answers."""
        clients = [threading.Thread(target=self._wait, args=(i,), daemon=True) for i in range(8)]
        for client in clients:
            client.start()
        time.sleep(0.5)
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(120)
        return time.monotonic() - start

    def _wait(self, number: int) -> None:
        with suppress(Exception):
            post(self.port, TEXT, {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 400})


def malformed(rng: random.Random) -> bytes:
    """Return the body of an invalid request."""
    good = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
    return rng.choice(
        [
            b"",
            good[: rng.randrange(1, len(good) - 1)],
            b"[" * 10_000,
            json.dumps({"prompt": "ab" * 50_000}).encode(),  # 100 KB: more than the model takes
            json.dumps({"prompt": "ab", "max_tokens": rng.choice([-1, 0, "x", 1.5, None, [], 10**30])}).encode(),
            json.dumps({"prompt": rng.choice([5, None, "", {}, [["x"]]])}).encode(),
            bytes(rng.randrange(128, 256) for _ in range(50)),
        ]
    )


def loaded(server: Server) -> dict[str, Any]:
    """Return the results of all clients."""
    expected = {prompt: server.ask(prompt) for prompt in PROMPTS}
    rng = random.Random(0)
    asked = [(rng.choice(PROMPTS), rng.random() < 0.5) for _ in range(REQUESTS)]
    right, refused, memory = [], 0, []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(ROUNDS):
            answers = pool.map(lambda one: server.ask(*one), asked)
            right.append(sum(answer == expected[prompt] for answer, (prompt, _) in zip(answers, asked, strict=True)))
            list(pool.map(server.leave, range(GONE // ROUNDS)))
            bad = pool.map(
                lambda body: post(server.port, TEXT, body), [malformed(rng) for _ in range(MALFORMED // ROUNDS)]
            )
            refused += sum(status == 400 and answer["error"].endswith(".") for status, answer in bad)
            memory.append(server.memory())
            print(right, refused, memory, flush=True)
    body = {"prompt": PROMPTS[-1], "max_tokens": 1, "temperature": 0}
    usage = post(server.port, TEXT, body)[1]["usage"]
    return {
        "clients": CLIENTS,
        "requests": REQUESTS,
        "rounds": ROUNDS,
        "right": right,
        "disconnects": GONE,
        "malformed": MALFORMED,
        "refused": refused,
        "reused_tokens": usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        "prompt_tokens": usage["prompt_tokens"],
        "grown_bytes": [late - early for early, late in pairwise(memory)],
        "addresses": sorted(server.addresses()),
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    many = f"{found['rounds']} × {found['requests']} requests of {found['clients']} clients at once"
    grown = ", ".join(f"{more / 1e6:+.1f}" for more in found["grown_bytes"])
    rows = {
        many: f"{', '.join(map(str, found['right']))} answers as of one alone",
        f"between them {found['disconnects']} clients that leave": "no answer of others changes",
        f"and {found['malformed']} malformed requests": f"{found['refused']} refused in a sentence",
        "memory from round to round": f"{grown} MB",
        "tokens of a prompt that were read before": f"{found['reused_tokens']} of {found['prompt_tokens']}",
        "open at": ", ".join(found["addresses"]),
        "SIGINT while busy": f"ends after {found['sigint_seconds']:.2f} s",
        "SIGTERM while busy": f"ends after {found['sigterm_seconds']:.2f} s",
    }
    lines = "\n".join(f"| {what} | {came} |" for what, came in rows.items())
    heading = "A server under load, by `uv run python -m tests.server_load`: a small model with random weights, 4 bits."
    return f"{heading}\n\n| what | what came of it |\n|---|---|\n{lines}\n"


def main() -> int:
    """Measure, and write the results; 1 if an answer is wrong."""
    with TemporaryDirectory() as folder:
        model = write_chat_model(Path(folder) / "tiny.gguf")
        server = Server(model)
        try:
            found = loaded(server)
            print(found, flush=True)
            found["sigint_seconds"] = server.end(signal.SIGINT)
            server = Server(model)
            found["sigterm_seconds"] = server.end(signal.SIGTERM)
        finally:
            server.process.kill()
    write_atomically(FILE, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(FILE.with_suffix(".md"), table(found).encode())
    print(table(found))
    return int(min(found["right"]) < REQUESTS or found["refused"] < MALFORMED)


if __name__ == "__main__":
    sys.exit(main())
