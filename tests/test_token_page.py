"""The page of one token shows its measurements, and every pick counts on all pages."""

import pytest

import veloxlab as vl
from tests.knobs import turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure import tokens
from veloxlab.widgets.pages import tokens as pages


@pytest.fixture(scope="module")
def lab():
    lab = vl.Lab(tiny("llama"), Letters(), method="rvq", bits=2, tokens=96, sinks=0, window=0)
    assert lab.wait(120)
    yield lab
    lab.worker.close()


@pytest.fixture(scope="module")
def page(lab):
    return lab.turn_to("tokens")


@pytest.fixture(autouse=True)
def _as_it_was(lab, page):
    yield
    lab.selection.choose(token=None, ids=(), layer=None, head=0, own_bits={}, key_bits=2, value_bits=2)
    lab.page = "tokens"
    assert lab.wait(120)


@pytest.fixture(scope="module")
def found(lab, page):
    settings = {"bits": 2, "sinks": 0, "window": 0}
    return tokens.token_predictions(lab.experiment.model, Letters(), lab.experiment.capture.tokens, "rvq", **settings)


def said(page, chart):
    return page.charts[chart].content["params"]["caption"]


def test_without_a_pick_the_page_shows_the_token_that_lost_most(page, found):
    assert (page.token, page.place) == (None, found.worst)
    assert f"Token {found.worst}. " in said(page, "alternatives")
    assert f"at token {found.worst} (" in said(page, "along")
    assert page.charts["along"].picked_token == found.worst
    assert page.charts["along"].frame["kl"].to_list() == pytest.approx(found.tokens["kl"].to_list(), rel=1e-4)


def test_a_token_picked_in_a_chart_is_shown_in_every_chart_and_on_every_page(lab, page):
    errors = lab.turn_to("errors")
    turn(lab, page="tokens")
    drawn = [page.charts[name].revision for name in ("along", "text")]
    page.charts["text"].picked_token = 40
    assert page.wait(120)
    assert [page.charts[name].revision for name in ("along", "text")] == drawn  # only a mark moves there
    assert (lab.token, page.place, page._steps.value) == (40, 40, 40)
    assert all(view.picked_token == 40 for view in page.views)
    pairs = [(layer, tokens.as_held(layer, "rvq", (2, 2))) for layer in lab.experiment.capture.layers]
    expected = tokens.errors_of_token(pairs, 40)
    assert page.charts["heads"].frame["error"].to_list() == pytest.approx(expected["error"].to_list())
    keys = page.charts["keys"].frame.filter(kind="block")
    exact, held = pairs[0]
    assert keys["weight"].to_list() == pytest.approx(tokens.attended_keys(exact, held, 40, 0)["weight"].to_list())
    turn(lab, page="errors")
    assert errors.charts["attention"].picked_token == errors.charts["positions"].picked_token == 40
    errors.charts["attention"].picked_token = 20
    assert lab.token == 20
    turn(lab, page="tokens")
    assert page.place == 20
    page.charts["along"].picked_token = None  # Escape
    assert lab.token is None


def test_a_cell_of_the_map_picks_its_layer_and_head(lab, page):
    page.charts["heads"].picked, page.charts["heads"].picked_head = 1, 1
    assert page.wait(120)
    assert (lab.layer, lab.head) == (1, 1)
    place = page.place
    exact, held = page._held[(), 1, "rvq", (2, 2), 0, 0, 0]
    expected = tokens.attended_keys(exact, held, place, 1)
    assert page.shown["keys"]["weight"].to_list() == expected["weight"].to_list()


def test_a_cell_picked_on_the_cache_page_is_picked_here(lab, page):
    turn(lab, layer=0)
    errors = lab.turn_to("cache").charts["errors"]
    errors.picked, errors.picked_head = 1, 1
    lab.turn_to("tokens")
    heads = page.charts["heads"]
    assert (page.layer, page.head, heads.picked, heads.picked_head) == (1, 1, 1, 1)
    heads.picked = None  # Escape, or a second click: this page always shows some layer
    assert (page.layer, heads.picked) == (1, 1)


def test_other_bits_of_one_layer_change_only_that_layer(lab, page, monkeypatch):
    coded, as_held = [], tokens.as_held
    monkeypatch.setattr(
        pages, "as_held", lambda layer, *of, **more: coded.append(layer.layer) or as_held(layer, *of, **more)
    )
    before = page.charts["heads"].frame
    turn(lab, layer=1)
    turn(page, key_bits=4)
    assert coded == [1]
    now = page.charts["heads"].frame
    keys = [frame.filter(tensor="keys", layer=1)["error"].mean() for frame in (before, now)]
    assert keys[1] < keys[0] / 4
    assert now.filter(layer=0, tensor="keys").equals(before.filter(layer=0, tensor="keys"))


def test_a_generated_token_has_causes_too(lab, page):
    texts = lab.turn_to("generation")
    texts.prompt, texts.tokens = "Once upon a time", 6
    texts.run()
    assert lab.wait(120)
    texts.charts["texts"].picked_token = 3
    prompt = len("Once upon a time")
    ids = lab.selection.choice.ids
    assert (lab.token, len(ids)) == (prompt + 3, prompt + 6)
    assert "the page Tokens shows its causes" in texts._message.value
    turn(lab, page="tokens")
    assert page.place == prompt + 3
    assert page._steps.max == prompt + 5
    assert "the answer generated for it" in page._banner.value
    assert f"Token {prompt + 3}. " in said(page, "alternatives")
    # the compressed cache read these tokens one by one, and here in one call
    kl = texts.generated.filter(side="compressed", position=3)["kl"][0]
    own = page.found["predictions", ids, page._look().cache].tokens.filter(position=prompt + 3)["kl"][0]
    assert own == pytest.approx(kl, abs=0.05)
    assert texts.charts["texts"].picked_token == 3
    page._back.click()
    assert page.wait(120)
    assert (lab.token, lab.selection.choice.ids) == (None, ())


def test_a_missing_token_is_refused(lab, page):
    with pytest.raises(InputError, match="There is no token 96: the text has 96"):
        lab.token = 96
    assert page.token is None


def test_each_page_says_which_tokens_are_in_codes_there(lab, page):
    turn(lab, sinks=2, window=16)
    assert " of 96 tokens (" in page._banner.value
    assert "On this page all 96 tokens are in codes" in lab.turn_to("errors")._banner.value
    turn(lab, sinks=0, window=0)


def test_the_page_compare_says_what_to_press_before_the_first_measurement(lab):
    assert "Press one of the buttons that measure" in lab.page_of("compare")._message.value
