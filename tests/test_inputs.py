"""Bad input of every public name gives one sentence; equivalent input of other types is accepted."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS
import mlx.core as mx
import numpy as np
import polars as pl
import pytest

from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.codecs import METHODS
from veloxlab.codecs.method import Method
from veloxlab.errors import InputError

NAN, INFINITY = float("nan"), float("inf")
NUMBER = ["x", [4], {}, object(), NAN, True]
REAL = [*NUMBER, INFINITY, -INFINITY, -1, np.float32("nan"), (4,)]
POSITIVE = [*REAL, 0]
WHOLE = [*NUMBER, 5.5, 4.0, np.float32(4), INFINITY, mx.array(4.0)]
COUNT = [*WHOLE, -1, np.int64(-1)]
AMOUNT = [*COUNT, 0]
WORDS = [5, ["turboquant"], {}, b"turboquant", True]
PATH = [5, "", b"plan", ["plan"], "a\0b", True]
FILE = [*PATH, ".", "no-such-file", __file__]
FOLDER = [*PATH, __file__]
FUNCTION = [5, "print"]
FLAG = [1, 0, "yes"]
WIDTH = [*WHOLE, 0, -1, 99]
WIDTHS = [4, 4.0, "234", [], (), ["2"], [2.0], [True], {2: 3}, NAN, [99]]
COUNTS = [4, [], "x", [-1], [5.5], [True], ["x"], NAN]
METHOD_IDS = ["turboquant", 5, [], [5], ["x"]]

BAD: dict[str, list[Any]] = {
    "adapter_path": PATH,
    "allocation": WORDS,
    "batch": AMOUNT,
    "bits": WIDTH,
    "bounds": [5, "x", (2, 4)],
    "budget": POSITIVE,
    "by": [*WORDS, "x"],
    "cache": [5, "x", [5], {1: 2}],
    "calibration": [5, "x", [5]],
    "calibrations": [5, "x", [5]],
    "capture": [5, "x", [1]],
    "chat": FLAG,
    "chunk": [*WORDS, "x"],
    "confidence": [*POSITIVE, 1, 1.5],
    "context": [*AMOUNT, 10**9],
    "decoded": [*COUNT, 10**9],
    "depths": [0.5, [], "x", [2], [NAN], ["x"], [-0.1], [True]],
    "dtype": [5, "float64", mx.int8, np.float32, ["float32"]],
    "exact": [5, "x", [1]],
    "exact_bytes": AMOUNT,
    "executor": [5, "x"],
    "folder": FOLDER,
    "full_every": [*WHOLE, -1],
    "growth": [5, "x", [1]],
    "measured": [5, "x", [1]],
    "head": [*COUNT, 9],
    "head_dim": AMOUNT,
    "key_bits": WIDTH,
    "key_weight": POSITIVE,
    "keys_over_values": FLAG,
    "kv_heads": AMOUNT,
    "layer": [*COUNT, 9],
    "layers": [(), 5, [5], "ab"],
    "least_bits": AMOUNT,
    "max_kv_size": [*AMOUNT, 4],
    "megabytes": POSITIVE,
    "goal": [*WORDS, "x"],
    "parameters": COUNT,
    "trained_tokens": COUNT,
    "memory": [*POSITIVE, "16 XB", "-1 GB"],
    "memory_bytes": POSITIVE,
    "most": AMOUNT,
    "memory_gb": POSITIVE,
    "metadata": [5, "x", {1: "x"}, {"x": 5}],
    "method": [*WORDS, "x", ""],
    "method_or_plan": [5, "x", "", ["turboquant"], b"turboquant", Path("no-such-plan.json"), Path()],
    "methods": METHOD_IDS,
    "mode": [*WORDS, "x"],
    "model_hash": WORDS,
    "model": [5, "no-such-folder/model", (1, 2), mx.zeros(1)],
    "model_or_config": [5, "", "no-such-folder", {}, {"model_type": "x"}, b"x", (1, 2)],
    "most_bits": AMOUNT,
    "most_bytes_per_token": [*POSITIVE, 1e-3],
    "most_kl": POSITIVE,
    "name": WORDS[:-3],
    "nbytes": POSITIVE,
    "no_such_option": [1],
    "on_token": FUNCTION,
    "outliers": ["x", -1, NAN, [8], True, 99],
    "path": FILE,
    "per_sequence": FLAG,
    "per_question": FLAG,
    "per_token": FLAG,
    "points": AMOUNT,
    "predicted_loss": POSITIVE,
    "progress": FUNCTION,
    "prompt": [*AMOUNT, 23, 99],
    "protected": [0, [], [0], "x", [[99]], [["x"]], [[0.5]]],
    "protected_first": COUNT,
    "protected_last": COUNT,
    "protection": [*WORDS, "x"],
    "questions": AMOUNT,
    "rate_settings": [5, {"bits": [2]}],
    "rates": [5, "x"],
    "replace": FLAG,
    "rotation": [5, "x", []],
    "row": [*COUNT, 99],
    "seed": ["a", -1, 1.5, True, NAN, [1]],
    "sequences": AMOUNT,
    "sinks": [*COUNT, "x"],
    "sliding": [*WORDS, "x"],
    "sliding_window": [*WHOLE, -1],
    "space": [5, "x"],
    "split": [*WORDS, "train"],
    "state_bytes": COUNT,
    "tensor": [5, "x"],
    "tasks": ["copy", 5, [], [5], ["x"]],
    "text": [5, b"text", ["text"]],
    "tokenizer": [5, "words"],
    "weight_bits": [*AMOUNT, 33],
    "weights": [*POSITIVE, "4 XB"],
    "tokens": AMOUNT,
    "upto": [*AMOUNT, 4],
    "value_bits": WIDTH,
    "value_dim": [*WHOLE, 0, -1],
    "window": COUNT,
    "windows": [*AMOUNT, 10**6],
}
"""Bad values by the names of arguments; None is another one if it is not the default."""

OWN: dict[str, list[Any]] = {
    "AverageBits bits": POSITIVE,
    "Capture tokens": [(), 5, "ab", [0.5], [-1]],
    "ModelShape caches": [(), 5, [5]],
    "Plan calibrations": [5, ["x"]],
    "Plan.save path": PATH,
    "RateBudget.save path": PATH,
    "Calibration.save path": PATH,
    "SearchResult.save path": PATH,
    "save_cache path": [*PATH, "."],
    "allocate_bits bits": WIDTHS,
    "by_window tokens": [5, "x", [1]],
    "calibrate bits": ["x", 4.0, True, NAN, [], (), ["4"], [4.0], 0, -1, 99],
    "calibrate tokens": [*AMOUNT, 63],
    **{f"difference {name}": [5, "x", [1]] for name in ("first", "second")},
    "distortion_curves bits": WIDTHS,
    "distortion_curves sinks": [*COUNT, 10**6],
    "evaluate cache": [5, "x", "", [5], b"turboquant", Path("no-such-plan.json")],
    "evaluate context": [*AMOUNT, 20, 10**9],
    "fidelity tokens": [*AMOUNT, 1],
    "load name": [*PATH, "no such model", "no-such.gguf", __file__],
    "advise context": AMOUNT,
    "plan_memory context": ["x", 0, -1, 5.5, [], [0], ["x"], True, NAN, 2**24 + 1, [2**24 + 1]],
    "rate_budget bits": WIDTHS,
    "reference tokens": [*AMOUNT, 1],
    "register method": [5, "none"],
    "relative_errors tokens": [5, "x", [1]],
    "Method id": WORDS,
    "Method name": WORDS,
    "Method paper": WORDS,
    "Method bits": [5, "x", (2, 3), [2], NAN],
    "Method stored": WORDS,
    "Method long_texts": WORDS,
    "Method build": FUNCTION,
    "Method calibrated": FLAG,
    "Method options": [5, "bits", [5], b"x"],
    "Method codecs": [5, "x", [5], int],
    "Method version": AMOUNT,
    "Method colour": [5, "red", "#12", ["#123456"]],
    "Method mark": WORDS,
    "Method space": WORDS,
    "Method per_head": FLAG,
    "Method timed": FLAG,
    "Method fractional": FLAG,
    "Method planned": FUNCTION,
    "Method prediction": [5, "x", {}],
    "Tasks own": WORDS,
    "Tasks tasks": ["copy", 5, [5], ["x"]],
    "find_method name": [*WORDS, "x"],
    "registered kind": [5, "x", ["x"], {}],
    "search model": [5, "", (1, 2)],
    "search tokens": [*AMOUNT, 1],
    "search prompt": AMOUNT,
    "search context": AMOUNT,
    "predicted_growth upto": AMOUNT,
    "Plan model": WORDS,
    "side_by_side prompt": [5, "", [], ["x"], [0.5], [-1]],
    "unregister name": [*WORDS, "x", "turboquant"],
    **{f"search {name}": WIDTHS for name in ("bits", "key_bits", "value_bits")},
    **{f"search {name}": COUNTS for name in ("sinks", "window")},
    **{f"ModelShape.typed {name}": AMOUNT for name in ("layers", "sliding_window", "full_every")},
    **{f"MemoryPlanner {name}": AMOUNT for name in ("layers", "context")},
    **{f"{explorer} head": [*COUNT, 9] for explorer in ("KeyExplorer", "ErrorExplorer")},
    "Question context": [*WORDS, "", " "],
    "Question question": [*WORDS, "", " "],
    "Question answer": [*WORDS, "", "x"],
    "Question choices": [5, "x", [5], ["x"]],
    "SideBySide prompt": [5, ["x"]],
    "Task name": WORDS,
    "Task questions": [5, "x", [], ["x"]],
    "BudgetTuner tokens": [*AMOUNT, 1],
    "BudgetTuner windows": AMOUNT,
    "BudgetTuner model": [5, "x"],
    "BudgetTuner layer": WHOLE,
    "BudgetTuner tokenizer": [5, "x"],
}
"""Bad values of one function's argument, if its name alone does not decide."""

PASSED_ON = ("bits", "key_bits", "value_bits", "sinks", "window", "sliding", "calibration")
CACHED = (*PASSED_ON, "seed", "outliers", "rotation", "no_such_option")
CODED = ("seed", "outliers", "rotation", "no_such_option")
KEYWORDS: dict[str, Sequence[str]] = {
    "ErrorExplorer": ("no_such_option",),
    "KeyExplorer": ("tensor", "space", "no_such_option"),
    "MemoryPlanner": (
        *PASSED_ON[:5],
        "context",
        "batch",
        "memory_gb",
        "method",
        "layers",
        "kv_heads",
        "no_such_option",
    ),
    "Plan.uniform": CODED,
    "SideBySide": (*PASSED_ON[:5], "prompt", "tokens", "method", "no_such_option"),
    "Tasks": (*PASSED_ON[:5], "tasks", "questions", "context", "own", "method", "no_such_option"),
    "allocate_bits": ("bits", "methods", "text", "by", "sequences", "tokens", "sinks", "window", "folder", "progress"),
    "calibrate": CODED[1:],
    "code_bits": CODED,
    "fidelity": (*CACHED, "mode", "chunk", "name", "per_token"),
    "fidelity_to": CACHED,
    "evaluate": CACHED,
    "largest_contexts": CACHED,
    "layer_errors": CODED,
    "layer_times": CACHED,
    "load": ("adapter_path", "no_such_option"),
    "load_cache": CACHED,
    "make_cache": CODED,
    "memory_growth": CODED,
    "passkey": (*PASSED_ON, "outliers", "rotation", "no_such_option"),
    "plan_memory": CACHED,
    "side_by_side": CACHED,
    "token_errors": CODED,
}
"""Names that extra keyword arguments can have."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return a small model, and results of functions for it."""
    model, tokenizer, folder = tiny("llama"), Letters(), tmp_path_factory.mktemp("kept")
    seen = vl.capture(model, tokenizer, tokens=24)
    rates = vl.rate_budget(model, tokenizer, bits=[2, 3], sequences=1, tokens=32, sinks=2, folder=folder)
    exact = vl.measure.reference(model, tokenizer, tokens=24)
    predictions = vl.measure.fidelity_to(exact, per_token=True)
    found = vl.search(model, tokenizer, methods=["turboquant"], bits=[3], tokens=16, windows=1, context=16)
    fitted = vl.calibrate(model, tokenizer, "turboquant", tokens=64, folder=folder)
    return SimpleNamespace(
        both={"model": model, "tokenizer": tokenizer},
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        capture=seen,
        exact=exact,
        predictions=predictions,
        windows=vl.measure.by_window(predictions),
        errors=vl.measure.token_errors(seen),
        growth=vl.measure.memory_growth(seen, upto=16, points=2),
        rates=rates,
        found=found,
        fitted=fitted,
        plan=vl.Plan.uniform(model),
        shape=vl.models.ModelShape.typed(layers=2, kv_heads=2, head_dim=64),
    )


def method(**fields: Any) -> Method:
    """Return a method to register."""
    return Method(**{**vars(METHODS["none"]), "id": "mine", "codecs": (vl.allocate.Bounds,), **fields})


CALLS: dict[str, Callable[[SimpleNamespace], partial[Any]]] = {
    "AverageBits": lambda h: partial(vl.allocate.AverageBits, bits=3),
    "Bounds": lambda h: partial(vl.allocate.Bounds),
    "BudgetTuner": lambda h: partial(vl.widgets.BudgetTuner, rates=h.rates, **h.both),
    "BytesPerToken": lambda h: partial(vl.allocate.BytesPerToken, nbytes=3),
    "CacheExplorer": lambda h: partial(vl.widgets.CacheExplorer, **h.both, tokens=24),
    "Calibration.load": lambda h: partial(vl.Calibration.load, path="x"),
    "Calibration.save": lambda h: partial(h.fitted.save, path="x"),
    "Capture": lambda h: partial(vl.measure.Capture, layers=h.capture.layers, tokens=h.capture.tokens),
    "ErrorExplorer": lambda h: partial(vl.widgets.ErrorExplorer, capture=h.capture),
    "KeyExplorer": lambda h: partial(vl.widgets.KeyExplorer, capture=h.capture),
    "Lab": lambda h: partial(vl.Lab, **h.both, tokens=24),
    "MemoryPlanner": lambda h: partial(vl.widgets.MemoryPlanner),
    "Method": lambda h: partial(Method, **vars(METHODS["none"])),
    "ModelShape": lambda h: partial(vl.models.ModelShape, name="x", caches=h.shape.caches),
    "ModelShape.typed": lambda h: partial(
        vl.models.ModelShape.typed, layers=2, kv_heads=2, head_dim=64, sliding_window=16
    ),
    "Plan": lambda h: partial(vl.Plan, model_hash="x", layers=h.plan.layers),
    "Plan.load": lambda h: partial(vl.Plan.load, path="x"),
    "Plan.save": lambda h: partial(h.plan.save, path="x"),
    "Plan.settings_for": lambda h: partial(h.plan.settings_for, model=h.model),
    "Plan.uniform": lambda h: partial(vl.Plan.uniform, model=h.model),
    "QualityFloor": lambda h: partial(vl.allocate.QualityFloor, predicted_loss=3),
    "Question": lambda h: partial(vl.measure.Question, context="a", question="b", answer="c", choices=("c", "d")),
    "RateBudget.frontier": lambda h: partial(h.rates.frontier),
    "RateBudget.load": lambda h: partial(vl.allocate.RateBudget.load, path="x"),
    "RateBudget.plan": lambda h: partial(h.rates.plan, budget=3),
    "RateBudget.save": lambda h: partial(h.rates.save, path="x"),
    "RateBudget.solve": lambda h: partial(h.rates.solve, budget=3),
    "RateBudget.uniform": lambda h: partial(h.rates.uniform, budget=3),
    "SearchResult.calibration": lambda h: partial(h.found.calibration, **h.both, method="commvq"),
    "SearchResult.load": lambda h: partial(vl.allocate.SearchResult.load, path="x"),
    "SearchResult.plan": lambda h: partial(h.found.plan, row=0),
    "SearchResult.save": lambda h: partial(h.found.save, path="x"),
    "SideBySide": lambda h: partial(vl.widgets.SideBySide, **h.both),
    "Task": lambda h: partial(vl.measure.Task, name="x", questions=[vl.measure.Question("a", "b", "c")]),
    "Tasks": lambda h: partial(vl.widgets.Tasks, **h.both),
    "TokensInMemory": lambda h: partial(vl.allocate.TokensInMemory, tokens=512, megabytes=3),
    "advise": lambda h: partial(vl.advise, model_or_config=h.shape, weights="1 GB", memory="2 GB"),
    "allocate_bits": lambda h: partial(vl.allocate.allocate_bits, **h.both, budget=3, folder=h.folder),
    "by_window": lambda h: partial(vl.measure.by_window, tokens=h.predictions),
    "calibrate": lambda h: partial(vl.calibrate, **h.both, method="turboquant", tokens=64, folder=h.folder),
    "capture": lambda h: partial(vl.capture, **h.both),
    "code_bits": lambda h: partial(vl.measure.code_bits, capture=h.capture),
    "difference": lambda h: partial(vl.measure.difference, **dict.fromkeys(("first", "second"), h.windows)),
    "distortion_curves": lambda h: partial(vl.allocate.distortion_curves, **h.both),
    "excerpt": lambda h: partial(vl.texts.excerpt),
    "find_method": lambda h: partial(vl.codecs.find_method, name="rvq"),
    "fidelity": lambda h: partial(vl.fidelity, **h.both, tokens=24),
    "evaluate": lambda h: partial(vl.evaluate, **h.both, tasks=["copy"], questions=1, context=420),
    "fidelity_to": lambda h: partial(vl.measure.fidelity_to, exact=h.exact, mode="decode", prompt=20),
    "largest_contexts": lambda h: partial(vl.measure.largest_contexts, model_or_config=h.shape, memory_bytes=1e6),
    "layer_errors": lambda h: partial(vl.measure.layer_errors, capture=h.capture),
    "layer_times": lambda h: partial(vl.measure.layer_times, model=h.model, capture=h.capture),
    "load": lambda h: partial(vl.load, name="smollm2-135m"),
    "load_cache": lambda h: partial(vl.load_cache, path="x", model=h.model),
    "make_cache": lambda h: partial(vl.make_cache, model=h.model),
    "memory_growth": lambda h: partial(vl.measure.memory_growth, capture=h.capture),
    "passkey": lambda h: partial(vl.measure.passkey, **h.both, context=256, depths=[0.5]),
    "plan_memory": lambda h: partial(vl.measure.plan_memory, model_or_config=h.shape),
    "predicted_growth": lambda h: partial(vl.measure.predicted_growth, growth=h.growth, upto=64),
    "rate_budget": lambda h: partial(vl.rate_budget, **h.both, folder=h.folder),
    "reference": lambda h: partial(vl.measure.reference, **h.both),
    "register": lambda h: partial(vl.register, method=method()),
    "registered": lambda h: partial(vl.codecs.registered, kind=Method),
    "relative_errors": lambda h: partial(vl.measure.relative_errors, tokens=h.errors),
    "report": lambda h: partial(vl.report),
    "save_cache": lambda h: partial(vl.save_cache, path="x", cache=vl.make_cache(h.model)),
    "search": lambda h: partial(vl.search, **h.both, tokens=16, windows=1),
    "sensitivities": lambda h: partial(vl.allocate.sensitivities, **h.both, folder=h.folder),
    "side_by_side": lambda h: partial(vl.measure.side_by_side, **h.both, prompt="Once"),
    "token_errors": lambda h: partial(vl.measure.token_errors, capture=h.capture),
    "unregister": lambda h: partial(vl.codecs.unregister, name="x"),
}
"""A valid call of everything public that takes arguments; methods of classes after a dot."""

NOTHING_TO_GIVE = {"detach", "doctor", "methods"}
# users see these, but do not make them; parts of pages have their own tests
NOT_CALLED = {"InputError", "LayerCapture", "Reference", "first_parting", "Code", "Codec"} | {
    *("METHODS", "TENSORS", "Tensor"),
    *("Cancelled", "ChartView", "Progress", "ProgressBar", "Status", "VegaRuntime", "Worker", "link"),
}
PLACES = (vl, vl.allocate, vl.codecs, vl.measure, vl.mlxlm, vl.models, vl.widgets)
OURS = {"self", "cls", "selection", "worker", "runs"}  # arguments that only veloxlab itself gives


def bad_inputs(label: str, function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield names of arguments, each with its bad values."""
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        extra = p.kind is p.VAR_KEYWORD
        for name in KEYWORDS[label] if extra else [p.name]:
            if name in OURS:
                continue
            own = f"{label} {name}"
            yield from ((name, value) for value in (OWN[own] if own in OWN else BAD[name]))
            if not extra and p.default is not None:
                yield name, None


@pytest.mark.parametrize("label", CALLS)
def test_bad_input_gets_one_sentence(here, label, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    call, wrong = CALLS[label](here), []
    for name, value in bad_inputs(label, call.func):
        try:
            call(**{name: value})
        except InputError as error:
            said = str(error)
            if "\n" in said or not said.endswith(".") or len(said) > 500:
                wrong.append(f"{name}={value!r} says {said!r}")
        except Exception as error:  # noqa: BLE001 - any other is what this test is about
            wrong.append(f"{name}={value!r} raises {type(error).__name__}: {error}"[:200])
        else:
            wrong.append(f"{name}={value!r} is accepted")
    assert not wrong, f"{len(wrong)} of {label}:\n" + "\n".join(wrong)


def test_every_public_name_has_a_row():
    rows = {label.partition(".")[0] for label in CALLS} | NOTHING_TO_GIVE | NOT_CALLED
    public = {name: getattr(place, name) for place in PLACES for name in place.__all__}
    public = {name: thing for name, thing in public.items() if not inspect.ismodule(thing)}
    assert rows == set(public) | {"excerpt"}
    assert all(not inspect.signature(public[name]).parameters for name in NOTHING_TO_GIVE)


OPTIONS = [(m.id, option) for m in METHODS.values() for option in m.options]
NO_OPTION = ["no such word", -1, NAN, 5.5, [-1], object(), 10**6]
NO_FLAGS = [*NO_OPTION, 1, 0, []]
OWN_OPTIONS: dict[str, list[Any]] = {
    "seed": NO_OPTION[:-1],
    "damping": [*NO_OPTION[:3], *NO_OPTION[4:6], True],
    "outlier_bits": ["no such word", NAN, 5.5, [3], object()],
    **dict.fromkeys(("group", "stages", "words", "positions"), NO_OPTION[:-1]),
    **dict.fromkeys(("smooth", "hadamard", "centred", "bounds", "centroid"), NO_FLAGS),
}
VALUES_ALONE = [("qjl", "levels"), ("qjl", "group")]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_impossible_option_of_a_method_gets_one_sentence(name, option):
    own = METHODS[name]
    role = "values" if (name, option) in VALUES_ALONE else "keys"
    beside = {"variant": "prod"} if option == "sketch" and "variant" in own.options else {}
    for value in OWN_OPTIONS.get(option, NO_OPTION):
        with pytest.raises(InputError, match=r"^[^\n]+\.$"):
            own.codec(64, own.bits[-1], role, **beside, **{option: value})


def test_arguments_that_contradict_each_other_are_refused(here):
    with pytest.raises(InputError, match="two points"):
        vl.measure.predicted_growth(here.growth.filter(tokens=16), 64)
    with pytest.raises(InputError, match="fewer points"):
        vl.measure.memory_growth(here.capture, upto=4, points=8)
    with pytest.raises(InputError, match="give no less than those"):
        vl.measure.plan_memory(here.shape, context=[512, 256], decoded=300)


def content_of(plan: vl.Plan) -> dict[str, Any]:
    """Return a plan's content without its checksum, as a person can write it."""
    content = json.loads(plan.to_json())
    del content["sha256"]
    return content


def in_plan(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a plan's content with other fields."""
    return lambda plan: plan | fields


def in_layer(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a plan's content with other fields in its first layer."""
    return lambda plan: plan | {"layers": [plan["layers"][0] | fields, *plan["layers"][1:]]}


FILES: list[Callable[[dict[str, Any]], Any]] = [
    *(in_plan(layers=layers) for layers in ([], {}, None, 5, "ab", [5], [[]], [{}])),
    *(in_layer(**{name: value}) for name in ("options", "key_options") for value in (None, 5, "x", [1])),
    *(in_layer(key_bits=bits) for bits in (None, "4", True, [4])),
    *(in_layer(key_method=method) for method in (None, 5, ["turboquant"])),
    *(in_plan(sinks=count) for count in (None, -1, 2.5, "4")),
    in_plan(sliding="x"),
    in_plan(chunk=None),
    in_plan(calibrations=None),
    in_plan(calibrations=[]),
    in_plan(name=5),
    in_plan(of_a_later_version=1),
    lambda plan: [plan],
    lambda plan: None,
]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_file_without_a_plan_gets_one_sentence(here, tmp_path, number):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(FILES[number](content_of(here.plan))))
    with pytest.raises(InputError, match=r"The plan .*plan\.json cannot be read") as told:
        vl.Plan.load(path)
    assert "\n" not in str(told.value)


def test_a_deeply_nested_file_is_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="The plan .* cannot be read"):
        vl.Plan.load(path)


@pytest.mark.parametrize("options", [{"seed": "a"}, {"outliers": -1}])
def test_an_option_of_a_plan_s_file_is_checked_when_a_cache_is_made(here, tmp_path, options):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(in_layer(options=options)(content_of(here.plan))))
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        vl.make_cache(here.model, path)


INT = [np.int64, np.uint8, np.int32, lambda n: np.array(n)]
FLOAT = [np.float64, np.float32, int]
GOOD: list[tuple[str, dict[str, Any]]] = [
    *(
        (label, {"bits": kind(3)})
        for label in ("Plan.uniform", "code_bits", "layer_errors", "token_errors")
        for kind in INT
    ),
    *(
        (label, {"sinks": kind(2), "window": kind(8)})
        for label in ("make_cache", "fidelity", "layer_errors")
        for kind in INT
    ),
    *(("make_cache", {"bits": kind(3), "seed": kind(1), "max_kv_size": kind(64)}) for kind in INT),
    *(("AverageBits", {"bits": kind(3)}) for kind in (*FLOAT, *INT[:3])),
    *(("RateBudget.solve", {"budget": kind(3)}) for kind in (*FLOAT, *INT[:3])),
    *(("TokensInMemory", {"tokens": np.int64(512), "megabytes": kind(3)}) for kind in FLOAT),
    ("Bounds", {"least_bits": np.int64(2), "most_bits": np.int64(3), "keys_over_values": np.bool_(True)}),
    ("BudgetTuner", {"budget": np.float32(2.9)}),
    ("CacheExplorer", {"bits": np.int64(3), "sinks": np.int64(2), "window": np.int64(8)}),
    ("KeyExplorer", {"bits": np.int64(3), "layer": np.int64(1), "head": np.int64(1)}),
    ("MemoryPlanner", {"context": np.int64(2048), "memory_gb": np.float32(4), "key_bits": np.int64(3)}),
    ("ModelShape.typed", {"layers": np.int64(4)}),
    ("SearchResult.plan", {"row": np.int64(0)}),
    ("SideBySide", {"bits": np.int64(3), "tokens": np.int64(4)}),
    ("allocate_bits", {"budget": np.float32(2.9), "bits": np.array([2, 3]), "sequences": np.int64(1), "tokens": 32}),
    ("calibrate", {"bits": np.int64(2)}),
    ("calibrate", {"bits": np.array([2, 3]), "seed": np.int64(1)}),
    ("calibrate", {"bits": (2, 3), "outliers": np.int64(8)}),
    ("capture", {"tokens": np.int64(16)}),
    ("distortion_curves", {"bits": np.array([2, 3]), "tokens": np.int64(32)}),
    ("fidelity", {"mode": "decode", "prompt": np.int64(8), "per_token": np.bool_(True)}),
    ("fidelity_to", {"calibration": None, "bits": None, "name": None}),
    ("largest_contexts", {"memory_bytes": np.float32(1e6), "batch": np.int64(2)}),
    ("make_cache", {"method_or_plan": "ratequant", "head_bits": np.array([2, 3])}),
    ("make_cache", {"calibration": []}),
    ("memory_growth", {"upto": np.int64(16), "points": np.int64(2)}),
    ("passkey", {"depths": np.array([0.5]), "context": np.int64(256), "seed": np.int64(3)}),
    ("plan_memory", {"context": np.array([256, 512]), "batch": np.int64(1)}),
    ("plan_memory", {"context": range(256, 512, 128)}),
    ("predicted_growth", {"upto": np.int64(64)}),
    ("search", {"methods": ["turboquant"], "bits": np.array([3]), "protected": [np.array([0])], "context": 16}),
    ("search", {"methods": ["turboquant"], "bits": [3], "most_kl": np.float32(100), "context": np.int64(16)}),
    ("side_by_side", {"prompt": np.arange(1, 9), "tokens": np.int64(2)}),
]
"""Arguments that are equivalent to Python's own types."""


@pytest.mark.parametrize("number", range(len(GOOD)), ids=lambda n: f"{n} {GOOD[n][0]} {' '.join(GOOD[n][1])}")
def test_good_input_of_another_type_is_accepted(here, number, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    label, given = GOOD[number]
    made = CALLS[label](here)(**given)
    if hasattr(made, "worker"):
        made.wait(60)
        made.worker.close()
        shown = {name: getattr(made, name) for name in given if made.has_trait(name)}
        assert shown == {name: np.asarray(given[name]).tolist() for name in shown}
    else:
        assert made is not None
        assert not isinstance(made, pl.DataFrame) or made.height


def test_numpy_s_numbers_in_a_plan_are_written_and_read_again(here, tmp_path):
    plan = vl.Plan.uniform(here.model, bits=np.int64(3), sinks=np.int64(2), seed=np.int64(1))
    assert vl.Plan.load(plan.save(tmp_path / "plan.json")) == vl.Plan.uniform(here.model, bits=3, sinks=2, seed=1)


def test_a_plan_can_be_given_by_its_path(here, tmp_path):
    path = here.plan.save(tmp_path / "plan.json")
    by_path, by_plan = (vl.make_cache(here.model, plan) for plan in (path, here.plan))
    assert [c.key_codec for c in by_path] == [c.key_codec for c in by_plan]
    assert vl.fidelity(here.model, here.tokenizer, path, tokens=24)["kl_mean"].item() >= 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_models_of_other_dtypes_are_accepted(dtype):
    model = tiny("llama")
    model.set_dtype(dtype)
    assert vl.fidelity(model, Letters(), tokens=24, bits=np.int64(8))["kl_mean"].is_finite().all()


@pytest.mark.parametrize("call", [vl.make_cache, vl.Plan.uniform])
def test_the_pair_of_load_is_refused_as_a_model(here, call):
    with pytest.raises(InputError, match=r"^model \(of the type tuple\).*the first of the two that vl\.load gives"):
        call(tuple(here.both.values()))


def test_a_name_instead_of_a_model_is_refused_with_the_way_out(here):
    with pytest.raises(InputError, match=r"^model='smollm2-135m' cannot be used: give a language model, the first of"):
        vl.Lab("smollm2-135m")
    with pytest.raises(InputError, match=r"^The tokenizer is missing: give both results of vl\.load"):
        vl.Lab(here.model)


@pytest.mark.parametrize("call", [vl.make_cache, partial(vl.load_cache, "x.safetensors")])
def test_method_as_an_option_is_refused(here, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vl.save_cache("x.safetensors", vl.make_cache(here.model))
    with pytest.raises(
        InputError, match=r"^method='rvq' is none of a method's options: give the method as method_or_p"
    ):
        call(model=here.model, method="rvq")


def test_an_unknown_keyword_is_python_s_own_error(here):
    with pytest.raises(TypeError, match=r"capture\(\) got an unexpected keyword argument 'word'"):
        vl.capture(here.model, here.tokenizer, word=1)  # type: ignore[call-arg]


def test_checked_functions_keep_their_signatures():
    assert "key_bits" in inspect.signature(vl.make_cache).parameters
    assert "tokens" in inspect.signature(vl.widgets.CacheExplorer).parameters


def test_controls_accept_the_same_values_as_arguments(here):
    planner = vl.widgets.MemoryPlanner(here.shape)
    planner.key_bits, planner.memory_gb = np.int64(3), np.float32(4)
    assert (planner.key_bits, planner.memory_gb) == (3, 4)  # type: ignore[comparison-overlap]
    for knob, value in (("key_bits", "x"), ("sinks", 2.5), ("memory_gb", NAN), ("method", 5), ("context", True)):
        with pytest.raises(InputError, match=f"^{knob}=.* cannot be used: give "):
            setattr(planner, knob, value)
    planner.worker.close()
