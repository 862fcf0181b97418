"""mlx-lm's server with checked requests, so that no bad request ends it.

An invalid request gets status 400 and a sentence. If the generating thread still ends, the process ends too, with a
non-zero status; otherwise the port would stay open without answers. A client that is slow to send its request, or to
read the answer, is disconnected after `SECONDS`.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import io
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm import server
from transformers import PreTrainedTokenizerBase

from veloxlab.errors import InputError
from veloxlab.serve.requests import check_fields

WAITING = 256  # waiting connections; with Python's default of 5 the system resets some of many at once
MOST_BYTES = 64 << 20  # of a request; images are in it as text
SECONDS = 60.0  # limit for a whole request, and for the client to read each part of an answer
THEIRS: Any = server  # mlx-lm's methods have no types
END_SECONDS = 1.0  # limit for the generating thread to end
RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
log = logging.getLogger(__name__)


class Incoming(io.RawIOBase):
    """Data from a client, until `SECONDS` after it connected; then a read raises `TimeoutError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._end = connection, time.monotonic() + SECONDS

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        """Wait for some bytes. The socket's own timeout would start again with each byte."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(SECONDS)  # for the answer


class Handler(THEIRS.APIHandler):  # type: ignore[misc]
    """Answers one request after a check."""

    rfile: Any  # source of the request

    def setup(self) -> None:
        """Connect with a time limit."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(Incoming(self.connection))

    def do_POST(self) -> None:  # noqa: N802 - http.server calls it by this name
        """Check the request, then let mlx-lm answer it."""
        connection = self.rfile
        try:
            self.rfile = io.BytesIO(self._checked())
        except InputError as error:
            self._refuse(400, str(error))
            return
        except TimeoutError:
            self._refuse(408, f"The request did not come within {SECONDS:g} seconds: send it at once.")
            return
        try:
            super().do_POST()
        finally:
            self.rfile = connection

    def _refuse(self, status: int, sentence: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": sentence}).encode())

    def _checked(self) -> bytes:
        """Return the body of a valid request; empty if mlx-lm refuses the request by its headers."""
        length = self.headers.get("Content-Length")
        if length is None or not self.path.endswith("/completions"):
            return b""
        if not (length.isdecimal() and len(length) < 16 and int(length) <= MOST_BYTES):
            raise InputError(f"The request has Content-Length {length[:20]}: send from 1 to {MOST_BYTES:,} bytes.")
        content: bytes = self.rfile.read(int(length))
        provider = self.response_generator.model_provider
        images = provider.model is None or provider.processor is not None  # unknown before the model is loaded
        check_fields(content, "messages" if "chat" in self.path else "prompt", images=images)
        return content

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx-lm answers 404 for any error of a generation
        super()._set_completion_headers(400 if isinstance(sys.exc_info()[1], InputError) else status_code)


class Answer:
    """Receives the parts of an answer; once ``stopped`` is set, the next part ends the thread."""

    def __init__(self, parts: Queue[Any], stopped: threading.Event) -> None:
        self._parts, self._stopped = parts, stopped

    def put(self, part: object) -> None:
        """Pass on a token, prompt progress, or an error; raises `KeyboardInterrupt` once ``stopped`` is set."""
        if self._stopped.is_set():
            raise KeyboardInterrupt
        self._parts.put(part)


class Generator(THEIRS.ResponseGenerator):  # type: ignore[misc]
    """The generating thread. `failure` is the error that ended it; ``stopped`` is set when it must end."""

    failure: BaseException | None = None

    def __init__(self, stopped: threading.Event, *arguments: Any) -> None:
        self._stopped = stopped
        super().__init__(*arguments)

    def stop_and_join(self) -> None:
        """End the thread, also during a calibration or an answer. Waits `END_SECONDS`, so not for a long step."""
        self._stopped.set()
        self._stop = True
        self._generation_thread.join(END_SECONDS)

    def _run_generate(self) -> None:
        try:
            self._generate()
        except BaseException as error:
            if not isinstance(error, InputError | KeyboardInterrupt):
                log.exception("The thread that generates ended.")
            self.failure = error.with_traceback(None)  # a traceback would keep the arrays of an answer
        finally:
            mx.clear_streams()  # otherwise MLX aborts a process that ends just after a thread with streams

    def _next_request(self, timeout: float | None = None) -> tuple[Any, ...] | None:
        request = super()._next_request(timeout)
        return request and (Answer(request[0], self._stopped), *request[1:])

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:  # noqa: ANN401
        for name in RESERVED.keys() & (args.chat_template_kwargs or {}):  # arguments of the tokenizer's own method
            wrong = f"The field chat_template_kwargs has {name!r}, which is no variable of a template"
            raise InputError(f"{wrong}: leave it out.")
        try:
            tokenized: tuple[Any, ...] = super()._tokenize(tokenizer, request, args)
        except Exception as error:  # of the model's own template
            raise InputError(f"The model's tokenizer refuses this request ({error}).") from error
        _check_for_model(self.model_provider.model, tokenizer, len(tokenized[0]), args)
        return tokenized


def hooks_of(stopped: threading.Event) -> dict[str, object]:
    """Return the replacements of names in ``mlx_lm.server``; ``stopped`` is set when the server ends."""
    theirs = server._run_http_server

    def serve(host: str, port: int, generator: Generator) -> None:
        class Server(ThreadingHTTPServer):
            request_queue_size = WAITING

            def service_actions(self) -> None:
                """Called about twice a second."""
                if not generator.generation_available():
                    self.server_close()
                    if isinstance(generator.failure, InputError):
                        raise generator.failure
                    raise SystemExit(
                        f"The thread that generates ended ({generator.failure!r}), and the server with it."
                    )

        theirs(host, port, generator, server_class=Server, handler_class=Handler)
        atexit.register(gc.freeze)  # garbage collection at exit took longer than all other steps
        if generator.generation_available():  # a long step still runs, such as the first of a long prompt
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    return {"ResponseGenerator": partial(Generator, stopped), "_run_http_server": serve}


def _check_for_model(model: Module, tokenizer: Any, length: int, args: Any) -> None:  # noqa: ANN401
    """Raise `InputError` unless ``model`` can do what is asked with a prompt of ``length`` tokens."""
    if not length:
        raise InputError("The prompt has no tokens: send some text.")
    positions = positions_of(model)
    if length > positions:
        raise InputError(f"The prompt has {length:,} tokens, and this model takes {positions:,}: send fewer.")
    tokens = _configured(model, "vocab_size") or len(tokenizer.get_vocab())
    if args.sampling.top_k >= tokens:
        raise InputError(f"The field top_k is {args.sampling.top_k}: this model has {tokens:,} tokens, give fewer.")
    for token in args.logits.logit_bias or {}:
        if not 0 <= token < tokens:
            raise InputError(f"The field logit_bias has the token {token}: give ids from 0 to {tokens - 1:,}.")
    for word in args.stop_words:
        if not tokenizer.encode(word, add_special_tokens=False):
            raise InputError(f"The field stop has {word!r}, which is no token: leave it out.")


def positions_of(model: Module) -> float:
    """Return the trained context of a model in tokens; infinite if it has no such setting."""
    most = _configured(model, "max_position_embeddings") or _configured(model, "n_positions") or math.inf
    scaling = _configured(model, "rope_scaling") or {}
    return max(most, (scaling.get("factor") or 1) * (scaling.get("original_max_position_embeddings") or 0))


def _configured(model: Module, name: str) -> Any:  # noqa: ANN401
    """Return a value of a model's configuration, or of its text part; None if there is none."""
    whole = getattr(model, "args", None)
    parts = (whole, getattr(whole, "text_config", None))
    found = (part.get(name) if isinstance(part, dict) else getattr(part, name, None) for part in parts)
    return next((value for value in found if value is not None), None)
