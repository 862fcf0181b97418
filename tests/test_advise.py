"""Advice on a cache: the least loss that fits, measured on a loaded model, and reported in sentences."""

import json
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure.advice import ADVICE, GOALS
from veloxlab.models.shapes import shape_of, usual_size

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LAYER = vl.models.ModelShape.typed(layers=1, kv_heads=8, head_dim=128)  # an exact token takes 4,096 bytes


def advise(memory, **more):
    """Advice for `LAYER` with ``memory`` bytes left for the cache."""
    return vl.advise(LAYER, weights=1, memory=4 / 3 * (memory + 1), **more)


def test_an_eight_billion_model_on_sixteen_gigabytes():
    at_32k, at_131k = (vl.advise(LLAMA_8B, context=context, memory="16 GB") for context in (32_768, 131_072))
    numbers = 2 * 128256 * 4096 + 32 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096) + 4096
    assert at_32k.weights_bytes == at_131k.weights_bytes == int(numbers * 4.5 / 8)
    assert at_32k.room_bytes == 12 * 10**9 - at_32k.weights_bytes
    assert at_32k.best["name"] == "fp16"
    assert at_32k.best["held_bytes"] == 32_768 * 32 * 2 * 8 * 128 * 2
    assert at_131k.frame.filter(name="fp16").select("fits", "most_tokens").row(0) == (
        False,
        at_131k.room_bytes // (32 * 2 * 8 * 128 * 2) // 256 * 256,
    )
    assert at_131k.best["fits"]
    assert at_131k.best["kl_mean"] <= GOALS["chat"]
    assert "Without a calibration, " in str(at_131k)


def test_the_least_loss_that_fits_comes_first_and_caches_that_do_not_fit_last():
    frame = advise(20e6, context=8192).frame
    assert frame.schema == pl.Schema(ADVICE)
    fits, others = frame.filter("fits"), frame.filter(~pl.col("fits"))
    assert frame["fits"].to_list() == [True] * fits.height + [False] * others.height
    assert fits["kl_mean"].is_sorted()
    assert others["held_bytes"].is_sorted()
    assert others.height > 0 < fits.height
    assert (fits["held_bytes"] <= 20e6).all()
    assert (others["held_bytes"] > 20e6).all()
    assert set(frame["method"].drop_nulls()) <= set(METHODS)
    assert dict(frame.select("name", "kind").rows()).pop("fp16") == "exact"
    assert set(frame.filter(pl.col("name") != "fp16")["kind"]) == {"predicted"}


def test_a_goal_with_a_lower_limit_marks_more_caches_as_too_lossy():
    told = {goal: advise(1e9, goal=goal).frame["reason"].str.contains(f"limit .* {goal}").sum() for goal in GOALS}
    assert told["draft"] < told["chat"] < told["retrieval"]


def test_where_nothing_fits_the_smallest_is_named():
    advice = advise(1000, context=8192)
    assert not advice.frame["fits"].any()
    assert advice.best["held_bytes"] == advice.frame["held_bytes"].min()
    assert f"No cache fits for 8,192 tokens; the smallest is {advice.best['name']}: it takes " in str(advice)
    assert "enough for 0 tokens" in advice.best["reason"]


@pytest.mark.parametrize(("bytes_of_exact", "code"), [(1.1, "make_prompt_cache(model)"), (0.6, "kv_bits=8")])
def test_mlx_lms_own_caches_are_advised_where_they_lose_least(bytes_of_exact, code):
    assert advise(bytes_of_exact * 8192 * 4096, context=8192).code.endswith(f"{code})".replace("))", ")"))


def test_the_code_makes_the_cache_and_fits_the_method_before():
    model, advice = tiny("llama"), advise(0.3 * 8192 * 4096, context=8192)
    at_once = advice.frame.filter(pl.col("method").is_not_null() & ~pl.col("reason").str.contains("calibration"))
    calibrated, other = (
        replace(advice, frame=advice.frame.filter(name="fisherquant 4.25 bit")),
        replace(advice, frame=at_once),
    )
    assert calibrated.code.splitlines() == [
        "calibration = vl.calibrate(model, tokenizer, 'fisherquant', bits=4.25)",
        "cache = vl.make_cache(model, 'fisherquant', bits=4.25, calibration=calibration)",
    ]
    names: dict[str, Any] = {"model": model, "vl": vl}
    exec(other.code, names)
    assert len(names["cache"]) == len(model.layers)
    assert names["cache"][0].key_codec.bits_per_value >= other.best["bits"]


def test_a_model_at_hand_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = tiny("llama"), Letters()
    told: list[str] = []
    advice = vl.advise(model, tokenizer, memory=1e9, tokens=24, most=2, progress=lambda _i, _n, said: told.append(said))
    measured = advice.frame.filter(kind="measured")
    assert measured.height == 2
    assert {said.split(": ")[0] for said in told[1:]} == {*measured["name"]}  # after the exact cache
    assert measured["reason"].str.contains("on this model").all()
    assert advice.frame.filter("fits")["kl_mean"].is_sorted()


def test_a_shape_without_weights_and_a_tokenizer_without_a_model_are_refused():
    with pytest.raises(InputError, match=r"no weights: give their size, such as weights=\"4.5 GB\"\."):
        vl.advise(LAYER, memory="16 GB")
    with pytest.raises(InputError, match="tokenizer is for a loaded model"):
        vl.advise(LLAMA_8B, Letters(), memory="16 GB")


def test_the_command_prints_it_for_a_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 1}))
    assert cli.main(["advise", str(tmp_path), "--context", "8192", "--memory", "2 GB", "--goal", "draft"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("2.00 GB of memory: ")
    assert "\nTake fp16 for 8,192 tokens: it takes 0.03 GB, and loses nothing.\n" in told
    assert "| fp16 | 33.6 | " in told


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("llama 3 8b", "8B, as Llama 3.1"),
        ("Llama-3.1-70B", "70B, as Llama 3.1"),
        ("qwen2.5 14b", "14B, as Qwen 2.5"),
        ("1B", "1B, as Llama 3.2"),
        ("llama 3.1", ""),  # two
        ("someone/llama-8b", ""),
        ("", ""),
        (",", ""),
    ],
)
def test_a_usual_size_has_all_of_the_words_and_is_the_only_one(words, name):
    assert usual_size(words) == name


def test_a_folder_of_that_name_goes_before_a_usual_size(tmp_path, monkeypatch):
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 1}))
    monkeypatch.chdir(tmp_path)
    assert len(shape_of("8b").caches) == 1


def test_the_message_on_an_unknown_model_lists_the_sizes_once_and_code_that_works():
    with pytest.raises(InputError) as refused:
        vl.advise("some 8b")
    assert str(refused.value).count("8B, as Llama 3.1") == 1
    code = str(refused.value).rpartition(": ")[2].removesuffix(".")
    assert eval(code, {"vl": vl}).weights_bytes == 4.5e9


@pytest.mark.parametrize(("context", "said"), [(8192, False), (8193, True)])
def test_a_context_beyond_the_trained_one_is_reported(context, said):
    shape = replace(LAYER, trained_tokens=8192)
    advice = vl.advise(shape, context=context, weights="1 GB", memory="4 GB")
    assert (f"up to 8,192 tokens: its output in a context of {context:,} is not" in str(advice)) == said


@pytest.mark.parametrize(
    ("name", "positions", "option"),
    [("spectralquant 4 bit", 1024, "tokens={N}"), ("fisherquant 4.25 bit", 8192, "basis='before_rope'")],
)
def test_a_context_beyond_the_usual_calibration_is_reported_and_the_code_reaches_it(name, positions, option):
    for context, said in ((positions, False), (positions + 1, True)):
        own = advise(1e9, context=context)
        own = replace(own, frame=own.frame.filter(name=name))
        expected = f"fits the keys of {positions:,} positions, and later keys lose more: calibrate with "
        assert (expected + option.format(N=context) in own.best["reason"]) == said
        assert (f", {option.format(N=context)})\n" in own.code) == said
        assert "or take commvq" in own.best["reason"] or not said


def test_methods_that_learn_no_positions_are_advised_for_any_length():
    reasons = dict(advise(1e10, context=2**20).frame.select("method", "reason").rows())
    assert [method for method, said in reasons.items() if "positions" in said] == [
        method for method in reasons if method in ("fisherquant", "spectralquant", "vecinfer")
    ]


def test_the_command_takes_a_usual_size_and_thousands_of_tokens(capsys):
    assert cli.main(["advise", "llama 8b", "--context", "128k", "--memory", "16 GB"]) == 0
    expected = vl.advise("8B, as Llama 3.1", context=131_072, memory="16 GB")
    assert capsys.readouterr().out.startswith(f"'llama 8b' is taken as '8B, as Llama 3.1'.\n{expected}\n\n| cache |")
    with pytest.raises(SystemExit):
        cli.main(["advise", "8b", "--context", "many"])
    assert "many is not a number of tokens: give 32768 or 32k" in capsys.readouterr().err


def test_a_measurement_without_the_sinks_of_the_cache_is_marked():
    """A cache of advise has 4 sinks; without them the loss of a method that learns can be several times larger."""
    reasons = dict(advise(1e9).frame.select("name", "reason").rows())
    said = {name: "without the 4 sinks that this cache has" in reason for name, reason in reasons.items()}
    assert said["spectralquant 3 bit"]
    assert not any(said[name] for name in ("fp16", "mlx-lm 4 bit", "turboquant 3 bit"))
    measured = advise(1e9).frame.with_columns(kind=pl.lit("measured"))
    assert not advise(1e9, measured=measured).frame["reason"].str.contains("without the 4 sinks").any()


def test_words_of_sizes_mean_the_same_as_numbers():
    expected = vl.advise("8b", context=32_768, memory=16e9, batch=2)
    for context, memory in (("32k", "16"), ("32,768", "16 GB")):
        assert str(vl.advise("8b", context=context, memory=memory, batch=2)) == str(expected)
    assert "Take mlx-lm 8 bit for 2 sequences of 32,768 tokens: " in str(expected)
    for wrong in ("32kB", "0", "", "99999999k"):
        with pytest.raises(InputError, match=r'context=.* cannot be used: give a whole number .* words such as "32k"'):
            vl.advise("8b", context=wrong)
    with pytest.raises(InputError, match="memory='0' cannot be used"):
        vl.advise("8b", memory="0")


def test_assumed_weights_are_named_and_weights_of_fewer_bits_that_help():
    """An 8B model at 8 bits takes 8.53 GB, all but .09 GB of three quarters of 11.5 GB; at 6 bits 6.52 GB."""
    tight = vl.advise("8b", context="32k", memory="11.5 GB", weight_bits=8)
    assert "8.53 GB for 8-bit weights" in str(tight)
    narrower = vl.advise("8b", context="32k", memory="11.5 GB", weight_bits=6)
    assert narrower.best["fits"]
    assert f"With 6-bit weights, {narrower.best['name']} fits." in str(tight)
    assert "weights, " not in str(narrower).replace("for 6-bit weights, ", "")
    assert "Fewer bits for the weights do not help" in str(vl.advise("70b", memory="8 GB"))
    known = vl.advise("8b", memory="4 GB", weights="4 GB")
    assert "4.00 GB for the weights" in str(known)
    assert "bit weights" not in str(known)


def test_advice_shows_the_sentence_first_and_the_source_of_each_loss():
    advice = vl.advise("8b", memory="16 GB")
    for shown in (repr(advice), advice._repr_markdown_()):
        assert shown.startswith("16.00 GB of memory: ")
        assert shown.index("Take fp16") < shown.index("| cache | ") < shown.index("Predicted losses are those of")
        assert "0.0% | exact |" in shown
        assert "| predicted from SmolLM2-135M |" in shown
        assert "the model was trained for 131,072 tokens." in shown
        assert advice.code in shown
