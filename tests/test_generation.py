"""Two texts from one prompt: their content, their first difference, the divergence; and hidden passkeys."""

import itertools
import re
import threading
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import polars as pl
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.generation import GENERATION, PASSKEY, first_parting, prompt_ids
from veloxlab.mlxlm.probe import probe
from veloxlab.views import held_caption, held_while_generating, passkey_map, picture, strip_caption, token_strip
from veloxlab.views.generation import COLUMNS, _places
from veloxlab.widgets.pages.generation import LATE

IDS = [i * i % 90 for i in range(60)]  # after these, this random model's texts differ at one bit


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def parted(model):
    frame = vl.measure.side_by_side(model, Letters(), IDS, bits=1, sinks=0, window=0, tokens=24)
    assert first_parting(frame) is not None
    return frame


def texts(frame):
    return [frame.filter(pl.col("side") == side)["token"].to_list() for side in ("exact", "compressed")]


class Poisoned(KVCache):
    """Returns values that are NaN."""

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        return keys, values * mx.nan


def test_a_nan_prediction_is_not_shown_as_exact(model):
    frame = vl.measure.side_by_side(model, Letters(), IDS, lambda m: [Poisoned() for _ in m.layers], tokens=2)
    kl = frame.filter(pl.col("side") == "compressed")["kl"]
    assert kl.is_nan().all()


def test_the_texts_equal_those_of_mlx_lm(smollm2):
    model, tokenizer = smollm2
    frame = vl.measure.side_by_side(model, tokenizer, "Name a colour.", bits=3, window=4, tokens=8)
    ids = prompt_ids(tokenizer, "Name a colour.")
    for side, cache in (("exact", None), ("compressed", vl.make_cache(model, bits=3, window=4))):
        text = mlx_lm.generate(model, tokenizer, ids, max_tokens=8, prompt_cache=cache)
        own = frame.filter(pl.col("side") == side)["text"]
        assert "".join(own).removesuffix("<|im_end|>") == text


def test_divergences_compare_two_predictions_of_one_text(model, parted):
    """After the first difference, the exact model reads the compressed cache's text: here again, from the start."""
    ours = texts(parted)[1]
    caches = make_prompt_cache(model), vl.make_cache(model, bits=1, sinks=0, window=0)
    probabilities = []
    for cache in caches:
        rows = [model(mx.array([IDS[:-1]]), cache=cache)]
        rows = [model(mx.array([[token]]), cache=cache)[0, -1] for token in (IDS[-1], *ours[:-1])]
        probabilities.append(np.array(mx.softmax(mx.stack(rows), axis=-1), np.float64))
    exact, compressed = probabilities
    kl = (exact * np.log(exact / compressed)).sum(axis=-1)
    shown = parted.filter(pl.col("side") == "compressed")
    # float32 sums of 96 terms in another order
    assert np.allclose(shown["kl"], kl, rtol=1e-3, atol=1e-6)
    assert np.allclose(shown["probability"], compressed[range(len(ours)), ours], rtol=1e-4)
    assert np.allclose(shown["exact_probability"], exact[range(len(ours)), ours], rtol=1e-4)
    assert shown["kl"].min() > 0


def test_the_exact_cache_has_no_divergence_and_the_same_text(model):
    frame = vl.measure.side_by_side(model, Letters(), IDS, "none", bits=32, tokens=12)
    assert first_parting(frame) is None
    assert frame["kl"].max() < 1e-5  # rounding: a prompt in blocks has other sums than in one call
    assert frame.schema == GENERATION
    assert "The same text for 12 tokens" in strip_caption(frame, None)


def test_a_run_repeats(model, parted):
    again = vl.measure.side_by_side(model, Letters(), IDS, bits=1, sinks=0, window=0, tokens=24)
    assert again.equals(parted)


def test_the_first_parting_is_the_first_token_that_differs(parted):
    exact, compressed = texts(parted)
    at = first_parting(parted)
    assert exact[:at] == compressed[:at]
    assert exact[at] != compressed[at]
    shorter = pl.concat([parted.filter(pl.col("position") < at), parted.filter(pl.col("side") == "exact").head(at + 1)])
    assert first_parting(shorter.unique(["side", "position"], maintain_order=True)) == at


def test_a_side_stops_at_the_end_of_its_text(model, parted):
    exact, compressed = texts(parted)
    at = first_parting(parted)

    class Ending(Letters):
        eos_token_ids = frozenset({exact[at]})

    frame = vl.measure.side_by_side(model, Ending(), IDS, bits=1, sinks=0, window=0, tokens=24)
    ends = exact.index(exact[at]) + 1
    assert texts(frame)[0] == exact[:ends]
    stop = compressed.index(exact[at]) + 1 if exact[at] in compressed else 24
    assert texts(frame)[1] == compressed[:stop]


def test_rows_arrive_one_by_one_and_work_can_be_ended(model):
    seen = []

    def watch(rows):
        seen.append(len(rows))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vl.measure.side_by_side(model, Letters(), IDS, tokens=20, on_token=watch)
    assert seen == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": []}, "The prompt is empty"),
        ({"method_or_plan": "turbo"}, "Unknown method 'turbo'"),
        ({"method_or_plan": make_prompt_cache, "bits": 3}, "A cache of your own takes no settings, but 'bits'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(model, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        vl.measure.side_by_side(model, Letters(), **{"prompt": IDS} | arguments)


# passkeys


def test_a_hidden_number_is_found_by_the_exact_cache_and_lost_at_one_bit(smollm2):
    exact = vl.measure.passkey(*smollm2, "none", bits=32, context=64, depths=(0.9,))
    assert exact.schema == PASSKEY
    assert exact["hit"].to_list() == [True] * 2
    assert exact["context"].to_list() == [64] * 2
    lost = vl.measure.passkey(*smollm2, bits=1, sinks=0, window=0, context=64, depths=(0.3,))
    assert lost["hit"].to_list() == [True, False]
    assert lost["passkey"][0] == exact["passkey"][0]


def test_tokens_of_many_characters_are_counted_to_the_end_of_the_text(model):
    class Long(Letters):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text[::40])

    frame = vl.measure.passkey(model, Long(), context=100, depths=(0.5,), text="x" * 40 * 120)
    assert frame["context"].to_list() == [100] * 2


def test_a_needle_is_at_its_stated_depth(model):
    read = []

    class Watching(Letters):
        def decode(self, ids):
            return "?"

    def cache(model):
        made = make_prompt_cache(model)
        own = made[0].update_and_fetch
        made[0].update_and_fetch = lambda keys, values: (read.append(keys.shape[2]), own(keys, values))[1]
        return made

    frame = vl.measure.passkey(model, Watching(), cache, context=400, depths=(0.0, 1.0), text="x" * 1000)
    assert frame["hit"].to_list() == [False] * 4
    assert read[:3] == [399, 1, len("\n\nWhat is the pass key? The pass key is")]  # the question is a call of its own


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"context": 20}, "context=20 has no room for a text"),
        ({"context": 400, "text": "short"}, "context=400 is longer than the text, which has 5 tokens"),
    ],
)
def test_a_needle_that_cannot_be_hidden_is_refused(model, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        vl.measure.passkey(model, Letters(), **arguments)


def test_the_exact_side_is_exact_in_a_model_that_makes_compressed_caches():
    used = tiny("llama")
    settings: dict[str, Any] = {"bits": 1, "sinks": 0, "window": 0}
    before = vl.measure.side_by_side(used, Letters(), IDS, tokens=12, **settings)
    used.make_cache = lambda: vl.make_cache(used, **settings)
    assert vl.measure.side_by_side(used, Letters(), IDS, tokens=12, **settings).equals(before)


# charts


def test_the_strip_shows_every_token_and_frames_the_parting(parted):
    at = first_parting(parted)
    drawing = picture.svg(token_strip(parted, parting=at).to_dict())
    assert drawing.count('stroke="#d8435c"') == 2
    assert f"The texts part at token {at + 1}" in drawing
    assert "exact" in drawing
    assert "compressed" in drawing
    whole = token_strip(parted, lines=9).to_dict()
    assert [plot["height"] for plot in whole["vconcat"]] == [9 * 25] * 2
    assert 'stroke="#d8435c"' not in picture.svg(whole)


def test_tokens_are_laid_out_in_lines_without_a_gap_or_an_overlap():
    words = ["Once", " upon", " a", " time", ",\n", "there", " was"] + [" word"] * 40
    places = list(_places(pl.Series(words)))
    assert places[4] == (",\u21b5", 0, 16, 18)
    assert places[5] == ("there", 1, 0, 5)
    assert places[6] == ("was", 1, 6, 9)
    for (_, line, _, end), (_, following, column, after) in itertools.pairwise(places):
        assert following > line or column >= end
        assert after <= COLUMNS
    assert places[-1][1] == 3


def test_the_map_shows_the_found_passkeys():
    frame = pl.DataFrame(
        [
            (d, 100, "12345", side, f" {a}.", a == "12345")
            for d, side, a in (
                (0.1, "exact", "12345"),
                (0.5, "exact", "12345"),
                (0.1, "compressed", "12345"),
                (0.5, "compressed", "12"),
            )
        ],
        schema=PASSKEY,
        orient="row",
    )
    drawing = picture.svg(passkey_map(frame).to_dict())
    assert "Found in 100 tokens: exact 2 of 2, compressed 1 of 2." in drawing
    said = re.findall(r"<text\b[^>]*>([\u2713\u2717][^<]*)<", drawing)
    assert sorted(said) == ["\u2713 12345.", "\u2713 12345.", "\u2713 12345.", "\u2717 12."]


def test_held_bytes_are_those_of_the_caches(model, parted):
    prompt, ours = make_prompt_cache(model), vl.make_cache(model, bits=1, sinks=0, window=0)
    texts_of = dict(zip(("exact", "compressed"), texts(parted), strict=True))
    for side, cache in (("exact", prompt), ("compressed", ours)):
        model(mx.array([IDS[:-1]]), cache=cache)
        for token, held in zip(
            [IDS[-1], *texts_of[side][:-1]], parted.filter(pl.col("side") == side)["held_bytes"], strict=True
        ):
            mx.eval(model(mx.array([[token]]), cache=cache))
            assert held == sum(entry.nbytes for entry in cache)
    said = held_caption(parted)
    exact, ours = (parted.filter(side=side).row(-1, named=True) for side in ("exact", "compressed"))
    tokens = len(IDS) + exact["position"]
    width = 2 * sum(facts.values_per_token for facts in probe(model))  # bytes of a token in 16 bits
    assert exact["fp16_bytes"] == ours["fp16_bytes"] == tokens * width
    assert f"{ours['fp16_bytes'] / ours['held_bytes']:.2f} times less" in said
    assert f"mlx-lm allocates {exact['held_bytes'] / 1e6:,.3g} MB, in steps" in said
    assert said in picture.svg(held_while_generating(parted).to_dict())


# the widget


@pytest.fixture
def widget(model):
    widget = vl.widgets.SideBySide(
        model, Letters(), prompt="a prompt of some words", bits=1, window=0, sinks=0, tokens=12
    )
    yield widget
    widget.worker.close()


def within(widget):
    """Yield a widget and all widgets in it."""
    return [widget, *(part for child in getattr(widget, "children", ()) for part in within(child))]


def test_the_widget_shows_generated_text_from_any_thread(widget, model):
    assert repr(widget).endswith("nothing is generated yet.)")
    for bits in (1, 8):
        widget.key_bits = widget.value_bits = bits
        thread = threading.Thread(target=widget.run)
        thread.start()
        thread.join()
        assert widget.wait(60)
        expected = vl.measure.side_by_side(model, Letters(), widget.prompt, bits=bits, window=0, sinks=0, tokens=12)
        assert widget.generated.equals(expected)
        assert len(widget.charts["texts"].frame) == len(expected)
    bundle, _ = widget._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    assert bundle["text/plain"].startswith("SideBySide(turboquant at 8 bits: ")


def test_settings_that_arrive_shortly_after_a_press_of_generate_count_for_it(widget):
    generate = next(each for each in within(widget) if getattr(each, "description", "") == "Generate")
    widget.tokens = 400
    generate.click()
    widget.method = "rvq"  # a page sent it late, like the number of tokens
    widget.tokens = 3
    assert widget.wait(60)
    assert widget.generated["position"].max() == 2
    assert "rvq at 2 bits" in str(widget.views[0].to_dict())
    widget.tokens = 400
    generate.click()
    widget._pressed -= LATE  # some time passes
    widget.tokens = 3
    widget.cancel()
    assert widget.wait(60)
    generate.click()
    widget.cancel()
    assert widget.wait(60)
    before = widget.generated
    widget.method = "turboquant"  # after a run that has ended
    assert widget.wait(0)
    assert widget.generated is before


def test_a_cancelled_run_keeps_what_it_has_and_the_widget_lives_on(widget):
    widget.tokens = 400
    first = threading.Event()
    widget.worker.watch(lambda status: first.set() if status.done >= 3 else None)
    widget.run()
    assert first.wait(60)
    widget.cancel()
    assert widget.wait(60)
    assert 3 <= widget.generated["position"].max() + 1 < 400
    widget.tokens = 2
    widget.run()
    assert widget.wait(60)
    assert len(widget.generated) == 4


def test_errors_are_shown_in_the_widget(widget):
    widget.prompt = " "
    widget.run()
    assert widget.wait(60)
    assert "The prompt is empty" in widget._message.value
    widget.method = "rvq"
    assert (widget.key_bits, widget.value_bits) == (2, 2)  # the nearest that it has
    with pytest.raises(InputError, match="Values at bits=3 are out of range"):
        widget.value_bits = 3
    with pytest.raises(InputError, match="tokens=0 cannot be used"):
        widget.tokens = 0
    with pytest.raises(InputError, match="Unknown method 'turbo'"):
        widget.method = "turbo"


def test_an_impossible_widget_is_refused_in_a_sentence(model):
    with pytest.raises(InputError, match="SideBySide has no setting 'colour'"):
        vl.widgets.SideBySide(model, Letters(), colour="red")
    with pytest.raises(InputError, match="(Keys|Values) at bits=9 are out of range"):
        vl.widgets.SideBySide(model, Letters(), bits=9)
