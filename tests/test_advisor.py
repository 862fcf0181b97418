"""The page of advice: constraints in, a ranked table out, and the actions of its buttons, with a random model."""

import re
import threading
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import controls, turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.generation import side_by_side
from veloxlab.models.shapes import SIZES
from veloxlab.widgets.pages import advice_runs, advise
from veloxlab.widgets.pages.advice_words import answer_said
from veloxlab.widgets.pages.memory import HERE


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lab = vl.Lab(tiny("llama"), Letters(), tokens=48)
        yield lab
        lab.close()


@pytest.fixture
def page(lab):
    page = lab.turn_to("advise")
    turn(page, model=HERE, context=32_768, memory_gb=16.0, goal="chat")
    return page


def button(page, words: str) -> Any:
    return next(part for said, part in controls(page).items() if said.startswith(words))


def pressed(page, words: str) -> None:
    button(page, words).click()
    assert page.wait(120)


def test_an_eight_billion_model_on_sixteen_gigabytes_is_answered_in_a_sentence(page):
    turn(page, model="8B, as Llama 3.1", context=131_072)
    expected = vl.advise(SIZES["8B, as Llama 3.1"], context=131_072, memory="16 GB")
    assert page.advice.frame.equals(expected.frame)
    assert f"Take {expected.best['name']}: {expected.best['reason']}" in page._verdict.value
    assert page.row["fits"]
    assert page.row["method"] in page._code.value
    assert "predicted" in page._table.value
    assert page.picked == page.advice.best["name"]
    for words in ("Measure the first 3", "Which layers may go to 2 bits?", "Does the answer change?"):
        assert button(page, words).disabled
        assert button(page, words).tooltip == "Only the loaded model can be run: choose 'this model' as the model."
    turn(page, memory_gb=12.0)
    assert page.advice.memory_bytes == 12_000_000_000


def test_the_picked_cache_sets_the_controls_of_all_pages(page, lab):
    turn(page, picked="rabitq 4 bit")
    assert controls(page)["cache"].value == "rabitq 4 bit"
    assert re.search("\u25b6</td><td[^>]*>rabitq 4 bit<", page._table.value)
    pressed(page, "Set the controls")
    assert (lab.method, lab.key_bits, lab.value_bits, lab.sinks, lab.window) == ("rabitq", 4, 4, 4, 64)
    assert "All pages now show rabitq K4 V4, sinks=4, window=64." in page._message.value
    turn(page, picked="fp16")
    with pytest.raises(InputError, match="fp16 is not a method of veloxlab"):
        page.take()


def test_what_was_measured_stays_measured_under_other_constraints(page, monkeypatch):
    monkeypatch.setattr("veloxlab.widgets.pages.advise.MOST", 1)
    pressed(page, "Measure the first 3")
    measured = page.advice.frame.filter(kind="measured")
    assert measured.height == 1
    assert "measured" in page._table.value
    turn(page, memory_gb=20.0)
    again = page.advice.frame.filter(kind="measured").select("name", "kl_mean")
    assert again.equals(measured.select("name", "kl_mean"))


def test_layers_that_can_have_two_bits_are_found_and_used(page, lab):
    turn(page, picked="turboquant 4 bit")
    assert button(page, "Use these layers").disabled
    pressed(page, "Which layers may go to 2 bits?")
    assert f"{page.narrow} The limit for chat is 0.05 nats a token" in page._narrowed.value
    assert "Measured with all tokens except the sinks in codes." in page._narrowed.value
    assert (page.picked, page.row["kind"], page.row["kl_mean"]) == ("turboquant 4 bit", "measured", page.narrow.before)
    assert "veloxlab-stale" not in page._narrowed._dom_classes
    assert button(page, "Use these layers").disabled == (not page.narrow.layers)
    page.take_narrow()
    assert {layer for layer, bits in lab.layer_bits.items() if bits == (2, 2)} == {*page.narrow.layers}
    names: dict[str, Any] = {"model": page.experiment.model, "vl": vl}
    exec(page._code.value, names)
    widths = {layer.layer: layer.key_codec.bits for layer in names["cache"]}
    assert {layer for layer, bits in widths.items() if bits == 2} == {*page.narrow.layers}
    assert (lab.sinks, lab.window) == (names["plan"].sinks, names["plan"].window)
    pressed(page, "Set the controls")
    assert "with_layer" not in page._code.value


def test_a_cache_whose_layers_were_tried_stays_picked(page, monkeypatch):
    """A measurement can make another cache the best one."""

    def best_until_measured(*given, measured, **more):
        found = vl.advise(*given, measured=measured, **more)
        first = found.frame.sort(pl.col("name") == "turboquant 4 bit", descending=True)
        return found if measured.height else replace(found, frame=first)

    page._measured = page._measured.clear()
    monkeypatch.setattr(advise, "advise", best_until_measured)
    turn(page, picked=page.advice.best["name"], memory_gb=17.0)
    assert page.picked == page.advice.best["name"] == "turboquant 4 bit"
    pressed(page, "Which layers may go to 2 bits?")
    assert page.picked == "turboquant 4 bit" != page.advice.best["name"]


def test_an_answer_is_compared_with_the_cache_of_the_shown_code(page, monkeypatch):
    plans = []

    def compared(model, tokenizer, prompt, plan, **more):
        plans.append(plan)
        return side_by_side(model, tokenizer, prompt, plan, **more)

    monkeypatch.setattr(advice_runs, "side_by_side", compared)
    turn(page, prompt="what changes?", picked="turboquant 4 bit")
    pressed(page, "Does the answer change?")
    names: dict[str, Any] = {"model": page.experiment.model, "vl": vl}
    exec(page._code.value, names)
    ours, copied = (
        [(layer.key_codec.bits_per_value, layer.max_sinks, layer.window) for layer in cache]
        for cache in (vl.make_cache(names["model"], *plans), names["cache"])
    )
    assert ours == copied
    assert (
        "The answer does not change in 64 tokens. At its end, 0 of 77 tokens (0%) are in codes" in page._answered.value
    )


def test_a_changed_answer_reports_how_close_the_probabilities_were():
    def rows(*sides):
        """Texts of both sides, one token for each letter, and the exact cache's probabilities of each."""
        every = [
            (side, position, ord(letter), letter, chance)
            for side, (text, chances) in zip(("exact", "compressed"), sides, strict=True)
            for position, (letter, chance) in enumerate(zip(text, chances, strict=True))
        ]
        columns = ["side", "position", "token", "text", "exact_probability"]
        return pl.DataFrame(every, schema=columns, orient="row")

    said = answer_said(rows(("ab<", (1, 0.5, 0.4)), ("abd", (1, 0.5, 0.35))), "12 of 80 tokens (15%) are in codes.")
    assert said.startswith("The answer changes at token 3. At its end, 12 of 80 tokens (15%) are in codes.")
    assert "There the exact cache gives \u201c&lt;\u201d 40% and \u201cd\u201d 35%." in said
    same = ("ab", (1, 0.5))
    assert answer_said(rows(same, same), "").startswith("The answer does not change in 2 tokens.")
    assert "There the exact cache" not in answer_said(rows(same, ("a", (1,))), "")  # one ended


def test_a_missing_model_is_reported_and_the_last_advice_stays(page):
    before = page._verdict.value
    turn(page, model="no/such-model")
    assert "no config.json of a repository of that name" in page._message.value
    assert page._verdict.value == before
    assert "veloxlab-stale" in page._verdict._dom_classes
    assert repr(page).endswith("; still measuring, this is of older settings)")
    turn(page, model=HERE)
    assert "veloxlab-stale" not in page._verdict._dom_classes


def test_a_size_is_found_by_words_of_its_name(page):
    turn(page, model="llama 3 8b", context=131_072)
    assert "&#x27;llama 3 8b&#x27; is taken as &#x27;8B, as Llama 3.1&#x27;." in page._message.value
    assert page.advice.frame.equals(vl.advise(SIZES["8B, as Llama 3.1"], context=131_072, memory="16 GB").frame)
    turn(page, context=131_073)
    assert "The model was trained for texts of up to 131,072 tokens" in page._verdict.value


def test_the_result_of_a_job_for_another_model_is_stale(page):
    """Advice for 8B was not marked as stale when another model was chosen while a job was ending."""
    turn(page, model="8B, as Llama 3.1")
    begun, end = threading.Event(), threading.Event()
    page.worker.submit("another job", lambda progress: begun.set() or end.wait(60))
    assert begun.wait(60)
    page.model = HERE  # its advice waits for that job
    assert "veloxlab-stale" in page._verdict._dom_classes
    page.picked = "rabitq 4 bit"  # everything is drawn again, with the old advice
    assert "4.52 GB for the weights" in page._verdict.value
    assert "veloxlab-stale" in page._verdict._dom_classes
    end.set()
    assert page.wait(60)
    assert "4.52 GB for the weights" not in page._verdict.value
    assert "veloxlab-stale" not in page._verdict._dom_classes


def test_an_answer_to_another_prompt_is_stale(page):
    turn(page, prompt="one", picked="turboquant 4 bit")
    pressed(page, "Does the answer change?")
    assert "veloxlab-stale" not in page._answered._dom_classes
    turn(page, prompt="two")
    assert "veloxlab-stale" in page._answered._dom_classes


def test_a_cache_stays_picked_if_it_was_picked_by_hand(page):
    turn(page, picked=page.advice.best["name"])
    turn(page, model="70B, as Llama 3.1", memory_gb=60.0)
    assert page.picked == page.advice.best["name"] != "fp16"
    turn(page, picked="rabitq 3 bit", memory_gb=64.0)
    assert page.picked == "rabitq 3 bit"


def test_a_button_states_that_it_calibrates_first_and_for_how_long(page):
    turn(page, picked="fisherquant 4.25 bit")
    answer = button(page, "Does the answer change?")
    assert answer.description == "Does the answer change? (calibrates first)"
    assert "This first calibrates fisherquant, once: about 3 minutes for SmolLM2-135M, longer" in answer.tooltip
    turn(page, picked="turboquant 4 bit")
    assert answer.description == "Does the answer change?"
    turn(page, picked="fp16")
    assert answer.disabled
    assert answer.tooltip == "fp16 is not a method of veloxlab: pick another cache."
