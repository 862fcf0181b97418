"""mlx-lm's commands on compressed caches: the server with several requests at a time, and prompt caches in files."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import veloxlab as vl
from tests.gguf_files import write_chat_model
from tests.servers import VELOXLAB, post, serving
from tests.test_calibration import Letters
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.codecs.saving import same_codec
from veloxlab.errors import InputError
from veloxlab.serve.commands import Wanted

QUESTIONS = [
    ("What is the capital of France?", 8),
    ("List the first ten prime numbers, then explain why 1 is not one of them.", 10),
    ("Say hello.", 4),
    ("Write a story about a lighthouse keeper who finds a letter in a bottle.", 6),
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Return the path of a tiny chat model, for tests that do not depend on its answers."""
    return str(write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def ask(port: int, messages: list[dict[str, str]], count: int) -> tuple[str, int]:
    """Return the answer, and how many tokens of the question were already in the cache."""
    body = {"model": "default_model", "messages": messages, "max_tokens": count, "temperature": 0}
    status, answer = post(port, "/v1/chat/completions", body)
    assert status == 200, answer
    held = answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return answer["choices"][0]["message"]["content"], held


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


TINY = "the tiny model"
SETTINGS = ("--method", "turboquant", "--bits", "4", "--window", "16")


def test_requests_at_once_get_the_answers_they_get_alone(chat_model):
    """Without reuse of a cache: tokens trimmed to a common beginning stay encoded, but a fresh window is exact."""
    with (
        serving(*SETTINGS, "--prompt-cache-size", "0", model=chat_model) as port,
        ThreadPoolExecutor(len(QUESTIONS)) as pool,
    ):
        alone = [ask(port, question(text), count)[0] for text, count in QUESTIONS]
        assert len({*alone}) == len(QUESTIONS)
        for _ in range(2):
            at_once = list(pool.map(lambda asked: ask(port, question(asked[0]), asked[1])[0], QUESTIONS))
            assert at_once == alone


def test_the_beginning_of_a_conversation_is_reused(chat_model):
    with serving(*SETTINGS, model=chat_model) as port:
        answer, _ = ask(port, question(QUESTIONS[1][0]), 24)
        turns = [*question(QUESTIONS[1][0]), {"role": "assistant", "content": answer}, *question("Thank you. And 11?")]
        _, held = ask(port, turns, 5)
        assert held > 40  # of the first turn
        again, held = ask(port, question(QUESTIONS[1][0]), 8)  # a cache of more than this, trimmed
        assert held > 30
        assert again


def test_the_server_takes_a_plan_and_is_not_reachable_from_other_machines(tmp_path, smollm2):
    plan = vl.Plan.uniform(smollm2[0], key_bits=6, value_bits=4).save(tmp_path / "plan.json")
    with serving("--plan", str(plan)) as port:
        text, count = QUESTIONS[0]
        assert "Paris" in ask(port, question(text), count)[0]
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        hosts = {line[1].split(":")[0] for line in listening if line[1].endswith(f":{port:04X}") and line[3] == "0A"}
    assert hosts == {"0100007F"}  # 127.0.0.1


@pytest.fixture
def learner(tmp_path, monkeypatch):
    """Return a model, a plan of a method that learns, and its calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny("llama")
    settings: dict[str, Any] = {"key_bits": 3, "value_bits": 2}
    fitted = vl.calibrate(model, Letters(), "spectralquant", bits=[2, 3], folder=tmp_path)
    return model, vl.Plan.uniform(model, "spectralquant", **settings), fitted


def silent(done, total, label):
    raise AssertionError(f"this was to be fitted already: {label}")


def test_a_plan_of_a_method_that_learns_uses_its_calibration(learner):
    model, plan, fitted = learner
    cache = Wanted(plan, {}, [fitted]).maker(model, Letters(), silent)()
    assert cache[1].key_codec is fitted.codecs[1, "keys", 3]
    assert cache[1].value_codec is fitted.codecs[1, "values", 2]


def test_widths_of_one_method_can_be_in_separate_files(learner, tmp_path):
    model, plan, fitted = learner
    files = [
        str(vl.calibrate(model, Letters(), "spectralquant", bits=bits).save(tmp_path / str(bits))) for bits in (2, 3)
    ]
    cache = Wanted(plan, {}, [vl.Calibration.load(file) for file in files]).maker(model, Letters(), silent)()
    assert same_codec(cache[0].key_codec, fitted.codecs[0, "keys", 3])
    assert same_codec(cache[0].value_codec, fitted.codecs[0, "values", 2])


def test_a_plan_of_a_method_that_learns_is_fitted_with_progress(learner):
    model, plan, fitted = learner
    told = []
    make = Wanted(plan, {}).maker(model, Letters(), lambda done, total, label: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    for layer, cache in enumerate(make()):
        assert same_codec(cache.key_codec, fitted.codecs[layer, "keys", 3])


def test_an_unused_calibration_is_refused(learner):
    with pytest.raises(InputError, match="A calibration of spectralquant was given, and turboquant is used"):
        Wanted(None, {}, [learner[2]])


def test_a_plan_of_another_model_is_refused_before_anything_is_fitted(learner):
    with pytest.raises(InputError, match="was made for a model with hash"):
        Wanted(learner[1], {}).maker(tiny("llama", num_hidden_layers=3), Letters(), silent)


def run(*arguments: str) -> str:
    done = subprocess.run([*VELOXLAB, *arguments], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt_cache_is_continued_in_another_process_and_one_of_another_width_is_refused(tmp_path, chat_model):
    file = str(tmp_path / "prompt.safetensors")
    text = "The lighthouse keeper is called Ida. " + vl.texts.excerpt()[:200]
    run("cache-prompt", chat_model, "--bits", "4", "--prompt", text, "--prompt-cache-file", file)
    again = ["generate", chat_model, "--bits", "8", "--prompt-cache-file", file, "--prompt", "x"]
    done = subprocess.run([*VELOXLAB, *again], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "This prompt cache holds turboquant at" in done.stderr
    asked = ("--prompt", "Who is the lighthouse keeper?", "--max-tokens", "12")
    assert "==========" in run("generate", chat_model, "--prompt-cache-file", file, *asked)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["serve", "smollm2-135m", "--kv-bits", "4"],
            "--kv-bits cannot be given here: the cache is compressed already",
        ),
        (["serve", "smollm2-135m", "--kv-bits=4"], "--kv-bits cannot be given here"),
        (["serve", "smollm2-135m", "--kv-group-size", "32"], "--kv-group-size cannot be given here"),
        (["serve", "smollm2-135m", "--model", "x"], "--model cannot be given here: the model is the first word"),
        (
            ["generate", TINY, "--max-kv-size", "4", "--prompt", "x"],
            "max_kv_size=4 leaves no room after sinks=4",
        ),
        (["serve", "smollm2-135m", "--method", "zip"], "Unknown method 'zip'. Known methods:"),
        (["serve", "smollm2-135m", "--method", "rvq", "--plan", "p.json"], "leave out --method"),
        (
            ["generate", "smollm2-135m", "--plan", "p.json", "--prompt", "x"],
            "The plan p.json cannot be read (there is no such file)",
        ),
        (["serve", "smollm2-135m", "--calibration", "c.json"], "The calibration c.json cannot be read"),
    ],
)
def test_options_that_contradict_a_compressed_cache_are_refused_in_a_sentence(capsys, chat_model, arguments, sentence):
    assert cli.main([chat_model if word is TINY else word for word in arguments]) == 2
    assert sentence in capsys.readouterr().err
