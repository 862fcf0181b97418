"""From a token to its causes: sums over tokens agree with other measurements, and shares add up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.test_calibration import TEXT
from tests.tiny_models import tiny
from veloxlab import views
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure import scores, tokens
from veloxlab.measure.errors import attention_map
from veloxlab.measure.frames import in_schema
from veloxlab.views.tokens import alternatives_data, attended_data

EXACT = {"sinks": 2, "window": 8}


@pytest.fixture(scope="module")
def here():
    model = tiny("llama")
    return SimpleNamespace(model=model, seen=vl.capture(model, Letters(), TEXT, tokens=48))


@pytest.fixture(scope="module")
def pairs(here):
    return [(layer, tokens.as_held(layer, "rvq", (2, 2), **EXACT)) for layer in here.seen.layers]


@pytest.fixture(scope="module")
def found(here):
    return tokens.token_predictions(here.model, Letters(), here.seen.tokens, "rvq", bits=2, **EXACT)


def test_predictions_are_those_of_fidelity(here, found):
    row = vl.measure.fidelity(here.model, Letters(), "rvq", text=TEXT, tokens=48, bits=2, **EXACT).row(0, named=True)
    own = found.tokens
    assert own.schema == tokens.PREDICTIONS
    assert own["position"].to_list() == list(range(1, 48))
    assert own["token"].to_list() == list(here.seen.tokens[1:])
    assert own["kl"].mean() == pytest.approx(row["kl_mean"], rel=1e-5)
    assert own["flip"].mean() == row["top1_flips"]
    assert -own["probability"].log().mean() == pytest.approx(np.log(row["perplexity"]), rel=1e-5)
    assert found.worst == own.sort("kl")["position"][-1]


def test_texts_read_in_several_calls_are_compared_at_every_token(here, monkeypatch):
    monkeypatch.setattr(tokens, "CALL", 20)
    own = tokens.token_predictions(here.model, Letters(), here.seen.tokens, "none").tokens
    assert own["position"].to_list() == list(range(1, 48))
    assert own["kl"].max() < 1e-5  # nats: float32 sums in another order
    assert own["exact_probability"].to_list() == pytest.approx(own["probability"].to_list(), rel=1e-4)


def test_alternatives_are_the_most_likely_of_either_cache_and_the_text_s_token(found):
    own = found.alternatives(Letters(), found.worst)
    assert own.schema == tokens.ALTERNATIVES
    assert own["rank"].to_list() == list(range(1, own.height + 1))
    assert own.filter("came")["token"].to_list() == found.tokens.filter(position=found.worst)["token"].to_list()
    assert own.filter("came")["text"].to_list() == found.tokens.filter(position=found.worst)["text"].to_list()
    assert 5 <= own.height <= 11
    greatest = own.select(pl.max_horizontal("probability", "exact_probability")).to_series()
    assert greatest.is_sorted(descending=True)


def test_errors_of_tokens_add_up_to_those_of_layers(here, pairs):
    frames = [tokens.errors_of_token(pairs, position) for position in range(48)]
    assert all(frame.schema == tokens.ERRORS_OF_TOKEN for frame in frames)
    assert frames[0].filter(tensor="keys")["error"].max() == 0  # a sink
    whole = vl.measure.layer_errors(here.seen, "rvq", bits=2, **EXACT)
    for layer, head in ((0, 0), (1, 1)):
        own = here.seen.layers[layer]
        errors = [frame.filter(layer=layer, head=head, tensor="keys")["error"][0] for frame in frames]
        norms = np.square(np.array(own.vectors("keys")[0, head])).sum(axis=-1)
        expected = whole.filter(layer=layer, head=head, tensor="keys")["rel_mse"][0]
        assert np.dot(errors, norms) / norms.sum() == pytest.approx(expected, rel=1e-4)
    exact, held = pairs[1]
    errors = [frame.filter(layer=1, head=1, tensor="output")["error"][0] for frame in frames]
    norms = np.square(np.array(exact.output[1])).sum(axis=(0, 2))
    lost = np.square(np.array(exact.output - exact.attend(held.keys, held.values))[1]).sum()
    assert np.dot(errors, norms) == pytest.approx(lost, rel=1e-3)


def test_attended_keys_have_the_weights_of_the_map(here, pairs):
    exact, held = pairs[0]
    # a map of single tokens of each of the two query heads that share the KV head
    maps = [attention_map(exact, head, "rvq", bits=2, blocks=48).filter(query=30) for head in (0, 1)]
    own = tokens.attended_keys(exact, tokens.as_held(exact, "rvq", (2, 2)), 30, 0)
    assert own.schema == tokens.ATTENDED
    assert own["key"].to_list() == list(range(31))
    assert own["weight"].sum() == pytest.approx(1, abs=1e-5)
    theirs = np.mean([each.filter(kind="exact")["weight"].to_numpy() for each in maps], axis=0)
    assert own["exact_weight"].to_numpy() == pytest.approx(theirs, abs=1e-6)
    assert {*own["state"]} == {"codes"}
    assert tokens.attended_keys(exact, held, 30, 0)["state"].to_list()[:3] == ["exact", "exact", "codes"]
    with pytest.raises(InputError, match="does not show its queries"):
        tokens.attended_keys(replace(exact, queries=None), exact, 30, 0)


def test_blocks_keep_their_greatest_weight(found, pairs):
    exact, held = pairs[0]
    own = tokens.attended_keys(exact, held, 47, 0)
    pooled = tokens.pooled_keys(own, 10)
    assert pooled.height == 10
    assert pooled["weight"].max() == own["weight"].max()
    assert (pooled["key"][0], pooled["key_end"][-1]) == (0, 48)
    assert tokens.pooled_keys(own, 100).equals(own)
    worst = tokens.worst_of_blocks(found.tokens, 10)
    assert worst.height == 10
    assert found.worst in worst["position"].to_list()
    assert worst["position"].is_sorted()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("none", "commvq")])
def test_shares_of_a_logits_error_add_up_to_it(here, method, calibrations):
    bits = METHODS[method].bits[0] if method == "qjl" else 2
    given = {}
    if METHODS[method].calibrated:
        given["calibration"] = vl.calibrate(
            here.model, Letters(), method, TEXT, bits=bits, tokens=256, folder=calibrations
        )
    one = replace(here.seen, layers=here.seen.layers[:1])
    frame = scores.score_errors(one, method, bits=bits, **given)
    assert frame.schema == scores.SCORE_ERRORS
    whole = vl.measure.layer_errors(one, method, bits=bits, **given).filter(tensor="keys")["logit_error"]
    for kind in ("pair", "coordinate"):
        own = frame.filter(kind=kind).group_by("head", maintain_order=True).agg(pl.col("share").sum())
        # float32 sums of products of both signs
        assert own["share"].to_list() == pytest.approx([1.0, 1.0], abs=2e-3), kind
    # coordinates of a rotation are almost uncorrelated, so their squares nearly add up
    if method == "turboquant":
        alone = frame.filter(kind="coordinate").group_by("head", maintain_order=True).agg(pl.col("rms").pow(2).sum())
        assert np.sqrt(alone["rms"].to_numpy()) == pytest.approx(whole.to_numpy(), rel=0.5)
    given_bits = frame.filter(kind="coordinate")["bits"]
    assert given_bits.null_count() == 0
    assert frame.filter(kind="pair")["bits"].null_count() == frame.filter(kind="pair").height


def test_an_error_in_one_pair_is_assigned_to_that_pair(here):
    (layer, *_) = here.seen.layers
    lost = np.zeros((2, 48, 64), np.float32)
    lost[:, :, [3, 35]] = np.random.default_rng(0).normal(size=(2, 48, 2))
    queries = np.array(layer.queries[0]).reshape(2, -1, 64)
    causal = np.tril(np.ones((48, 48)))
    errors = np.einsum("hgqd,hkd->hgqk", queries.reshape(2, -1, 48, 64), lost) * causal
    rms = np.sqrt(np.square(errors).sum(axis=(1, 2, 3)) / (causal.sum() * errors.shape[1]))
    share, alone = scores._split(queries, lost, np.array([[3, 35], [4, 36]]))
    assert share == pytest.approx(np.array([[1.0, 0.0]] * 2), abs=1e-5)
    assert alone[:, 0] == pytest.approx(rms, rel=1e-4)


SEEN = tokens.ATTENDED | {"text": pl.String}


def test_white_space_has_a_visible_name_in_lists_and_captions():
    texts = {"  ": "␣␣", "\n\n": "↵↵", " \t": "␣⇥", " the": "the", ",\n": ",↵"}
    same = {"position": 7, "came": [True] + [False] * 4, "token": range(5), "rank": range(1, 6)}
    rows = pl.DataFrame({"text": [*texts], "probability": 0.1, "exact_probability": 0.1} | same)
    assert alternatives_data(rows)["said"].to_list() == [
        f"{i + 1}. {name}{'' if i else '  ◀ text'}" for i, name in enumerate(texts.values())
    ]
    assert "Both choose '␣␣'; the text has '␣␣'" in views.alternatives_caption(rows)
    keys = {"key": range(5), "weight": 0.1, "exact_weight": 0.1, "error": 0.0, "state": "codes"}
    attended = in_schema(pl.DataFrame({"text": [*texts]} | keys).with_columns(key_end=pl.col("key") + 1), SEEN)
    assert {*attended_data(attended)["said"].drop_nulls()} == {f"{i}  {name}" for i, name in enumerate(texts.values())}


@pytest.mark.parametrize(("now", "said"), [(0.1, "fell from 0.2 to 0.1"), (0.3, "did not fall: other tokens changed")])
def test_a_prediction_that_moved_is_not_explained_by_a_probability_that_rose(now, said):
    rows = pl.DataFrame({"position": [7], "text": ["a"], "kl": [0.4], "probability": [now], "exact_probability": [0.2]})
    assert views.losses_caption(rows) == f"Most: 0.4 nats at token 7 ('a'), whose probability {said}"


def test_the_alternative_that_changed_most_is_named():
    numbers = {"probability": [0.2, 0.6], "exact_probability": [0.3, 0.1]}
    rows = pl.DataFrame({"position": [7, 7], "rank": [1, 2], "text": ["a", "b"], "came": [True, False]} | numbers)
    assert views.alternatives_caption(rows).endswith("; most changed: 'b', 0.1 exact, 0.6 now")
