"""The page of advice: constraints in, a ranked table out, and the actions of its buttons, with a random model."""

import html
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
from veloxlab.widgets.selection import Choice


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
    said = f"Take {expected.best['name']} for 131,072 tokens: {expected.best['reason']}"
    assert said in html.unescape(page._verdict.value)
    assert page.row["fits"]
    assert page.row["method"] in page._code.value
    assert ">loss is</th>" in page._table.value
    assert "predicted from SmolLM2-135M" in page._table.value
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
    assert "This chat is too short to tell: 0 of 77 tokens are in codes." in page._answered.value
    page.all_codes = True
    assert "veloxlab-stale" in page._answered._dom_classes
    pressed(page, "Does the answer change?")
    assert (plans[-1].sinks, plans[-1].window) == (4, 0)
    assert "too short" not in page._answered.value
    page.all_codes = False


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

    choice = Choice(sinks=4, window=64)  # codes are made of 32 tokens at once
    said = answer_said(rows(("ab<", (1, 0.5, 0.4)), ("abd", (1, 0.5, 0.35))), choice, 80)
    assert said.startswith("The answer changes at token 3. At its end, 0 of 80 tokens (0%) are in codes;")
    assert "There the exact cache gives \u201c&lt;\u201d 40% and \u201cd\u201d 35%." in said
    same = ("ab", (1, 0.5))
    assert answer_said(rows(same, same), choice, 100).startswith("The answer does not change in 2 tokens.")
    assert answer_said(rows(same, same), choice, 99).startswith("This chat is too short to tell: 0 of 99 tokens")
    assert "There the exact cache" not in answer_said(rows(same, ("a", (1,))), choice, 99)  # one ended


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
    assert "4.52 GB for 4-bit weights" in page._verdict.value
    assert "veloxlab-stale" in page._verdict._dom_classes
    end.set()
    assert page.wait(60)
    assert "4.52 GB for 4-bit weights" not in page._verdict.value
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


def test_an_entry_is_read_as_the_command_reads_it_and_a_wrong_one_is_refused(page):
    fields = controls(page)
    for words, entry, trait, value, shown in (
        ("context", "64k", "context", 65_536, "65,536"),
        ("RAM (GB)", "24 GB", "memory_gb", 24, "24"),
        ("RAM (GB)", "16", "memory_gb", 16, "16"),
        ("sequences", "2", "batch", 2, "2"),
    ):
        fields[words].value = entry
        assert page.wait(60)
        assert (getattr(page, trait), fields[words].value) == (value, shown)
    assert "for 2 sequences of 65,536 tokens" in page._verdict.value
    for words, entry, shown in (
        ("context", "99999999k", "65,536"),
        ("RAM (GB)", "-3", "16"),
        ("sequences", "1.5", "2"),
    ):
        fields[words].value = entry
        assert fields[words].value == shown
        assert " cannot be used: give " in page._message.value
    turn(page, batch=1)


def test_weight_bits_of_the_loaded_model_cannot_be_set(page):
    bits = controls(page)["weight bits"]
    assert bits.disabled
    assert "their bytes are known" in bits.tooltip
    page.model = "8B, as Llama 3.1"
    assert not bits.disabled
    bits.value = "3"
    assert page.wait(60)
    assert "for 3-bit weights" in page._verdict.value
    turn(page, weight_bits=4)


def test_a_cache_that_does_not_fit_is_not_marked_and_does_not_set_the_controls(page):
    turn(page, model="70B, as Llama 3.1", memory_gb=8.0)
    turn(page, picked="turboquant 4 bit")
    assert "\u25b6" not in page._table.value
    assert button(page, "Set the controls").disabled
    assert button(page, "Set the controls").tooltip.startswith("turboquant 4 bit does not fit: it takes ")


def test_the_token_that_ends_an_answer_is_not_shown(page, monkeypatch):
    letters = Letters()
    rows = [(side, 0, letters.encode("z")[0], "z", 1.0) for side in ("exact", "compressed")]
    frame = pl.DataFrame(rows, schema=["side", "position", "token", "text", "exact_probability"], orient="row")
    monkeypatch.setattr(advice_runs, "side_by_side", lambda *_, **__: frame)
    monkeypatch.setattr(advice_runs, "stops", lambda _: {rows[0][2]})
    choice = page.selection.choice
    assert "\u201c\u201d" in advice_runs.answered(page.experiment, choice, "hello", lambda *_: None)
