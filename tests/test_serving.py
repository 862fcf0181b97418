"""The server refuses impossible requests with a sentence, and continues; if it cannot continue, its process ends."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import mlx_lm.server
import pytest

import veloxlab as vl
from tests.gguf_files import write_chat_model
from tests.servers import free_port, post, serving
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.errors import InputError
from veloxlab.serve import server as served
from veloxlab.serve.commands import Loader, Wanted
from veloxlab.serve.requests import FIELDS, check_fields

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    model = str(write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))
    with ExitStack() as stack, serving(model=model) as port:
        assert post(port, CHAT, {"messages": HELLO, "max_tokens": 2})[0] == 200  # the model is loaded
        yield port
        # Ctrl-C, which `serving` sends now, must end an answer that is generated alone, as one with a seed
        endless = {"prompt": "ab", "max_tokens": 2**31 - 1, "seed": 1, "stream": True}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{TEXT}", json.dumps(endless).encode())
        answer = stack.enter_context(urllib.request.urlopen(request, timeout=60))
        assert answer.readline().startswith((b":", b"data"))


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (CHAT, b"{", "The request is not valid JSON"),
        (CHAT, [1], "The request is [1]: give an object."),
        (CHAT, {}, "The request has no field messages: give a list of objects"),
        (TEXT, {}, "The request has no field prompt: give a string that is not empty."),
        (
            TEXT,
            {"prompt": "a", "temperature": "hot"},
            'The field temperature is "hot": give a number from 0 to 1,000,000.',
        ),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "The field max_tokens is 0: give a whole number from 1 to"),
        (CHAT, {"messages": "hello"}, 'The field messages is "hello": give a list of objects with a role'),
        (CHAT, {"messages": [{"content": "a"}]}, "The field messages[0] is "),
        (CHAT, {"messages": [{**HELLO[0], "content": [{"type": "text"}]}]}, "The field messages[0].content[0] is "),
        (TEXT, {"prompt": "a" * 600}, "The prompt has 600 tokens, and this model takes 512: send fewer."),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs has 'tokenize'"),
    ],
)
def test_an_impossible_request_gets_a_sentence_and_the_next_is_served(port, path, body, sentence):
    status, answer = post(port, path, body)
    assert (status, sentence in answer["error"]) == (400, True), answer
    assert post(port, TEXT, {"prompt": "ab", "max_tokens": 2, "temperature": 0.7, "top_k": 3})[0] == 200


def test_many_clients_that_connect_at_once_are_all_answered(port):
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(port, TEXT, {"prompt": "ab", "max_tokens": 1})[0], range(192)))
    assert answers == [200] * 192


def test_mlx_lm_still_refuses_requests_by_their_headers(port):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/other", b"{}", timeout=60)


# slow clients


class Handler(served.Handler):
    """Answers any GET without an end, and reports when it disconnects a client."""

    left = threading.Event()

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        while True:
            self.wfile.write(bytes(1 << 16))

    def finish(self):
        super().finish()
        self.left.set()


@pytest.fixture
def client(monkeypatch):
    """Return a connection to a server with a short time limit."""
    monkeypatch.setattr(served, "SECONDS", 0.3)
    Handler.left.clear()
    generator = SimpleNamespace(cli_args=SimpleNamespace(allowed_origins="*"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, generator, system_fingerprint="")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address, timeout=0.05) as client:
            yield client
            assert Handler.left.wait(20)
        server.shutdown()


@pytest.mark.parametrize(
    ("begun", "answer"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nSlow: ", b""),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 10000\r\n\r\n", b"did not come within 0.3 seconds"),
    ],
)
def test_a_client_that_sends_byte_by_byte_is_disconnected(client, begun, answer):
    client.sendall(begun)
    got = b""
    for _ in range(400):  # 20 seconds
        try:
            part = client.recv(10_000)
        except TimeoutError:
            client.sendall(b"1")
        else:
            got += part
            if not part:
                break
    else:
        pytest.fail("It waits for ever.")
    assert answer in got
    assert bool(got) == bool(answer)


def test_a_client_that_does_not_read_its_answer_is_disconnected(client):
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert Handler.left.wait(20)


# fields


def test_every_field_refuses_other_types():
    for field in FIELDS:
        with pytest.raises(InputError, match=f"The field {field}.* is .*: give "):
            check(**{field: [[]]})


RANGES = {
    field: (schema["minimum"], schema["maximum"])
    for field, whole in FIELDS.items()
    for schema in (whole, *whole.get("anyOf", ()))
    if "minimum" in schema
}


@pytest.mark.parametrize("field", RANGES)
def test_every_number_must_be_in_its_range(field):
    least, most = RANGES[field]
    for number in (least, most):
        check(**{field: number})
    for number in (least - 1, most + 1, True):
        with pytest.raises(InputError, match=f"The field {field} is "):
            check(**{field: number})


GOOD = {
    "model": "default_model",
    "stop": ["end", "\n"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "logit_bias": {"5": -100},
    "seed": None,
    "user": "someone",
    "chat_template_kwargs": {"enable_thinking": False},
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "content": "2"},
    ],
}


def check(images=False, asked="messages", **fields):
    check_fields(json.dumps({"messages": HELLO, "prompt": "a", **fields}).encode(), asked, images=images)


def test_requests_of_usual_clients_are_accepted():
    check(**GOOD)


def test_images_are_only_for_vision_models():
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "image", "image": "https://example.org/a.png"},
    ]
    messages = [{"role": "user", "content": parts}]
    check(messages=messages, images=True)
    with pytest.raises(InputError, match=r"messages\[0\].content\[0\].* content of text"):
        check(messages=messages)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
        ('{"prompt": "a", "temperature": 1e999}', "1e999 is no number of JSON"),
        ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_request_without_json_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        check_fields(text.encode(), "prompt", images=False)


# limits of the model


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 100}}, 100),
        ({"text_config": SimpleNamespace(n_positions=90)}, 90),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": None}}, 512),
        ({}, float("inf")),
    ],
)
def test_positions_are_those_of_the_configuration(config, positions):
    assert served.positions_of(SimpleNamespace(args=SimpleNamespace(**config))) == positions


# the end


@pytest.fixture
def serve(tmp_path):
    model = str(write_chat_model(tmp_path / "tiny.gguf"))
    return lambda *options: cli.main(["serve", model, *options, "--port", str(free_port())])


@pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
def test_bad_input_found_during_the_load_of_the_model_ends_the_server(serve, tmp_path, capsys):
    plan = vl.Plan.uniform(tiny("llama")).save(tmp_path / "plan.json")
    assert serve("--plan", str(plan)) == 2
    assert "was made for a model with hash" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
@pytest.mark.parametrize("error", [RuntimeError("lost"), SystemExit("lost")])
def test_the_server_ends_with_the_thread_that_generates(serve, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(mlx_lm.server.ModelProvider, "load_default", fail)
    with pytest.raises(SystemExit, match=r"thread that generates ended .*lost") as ended:
        serve()
    assert ended.value.code not in (0, None)


def test_ctrl_c_ends_a_calibration():
    loader, started = Loader(mlx_lm.server, "tiny", Wanted(None, {})), threading.Event()

    class Provider:
        def load_default(self):
            while True:
                loader.say(0, 2, "fitting layer 0")
                started.set()

    generator = served.hooks_of(loader.stopped)["ResponseGenerator"](Provider(), None)
    assert started.wait(20)
    generator.stop_and_join()
    generator.join()
    assert isinstance(generator.failure, KeyboardInterrupt)
