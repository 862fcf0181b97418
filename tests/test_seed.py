"""The seed of random parts in codes and calibrations: chosen once, for pages, functions and commands."""

import pytest

import veloxlab as vl
from tests.knobs import controls, turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.cli import main
from veloxlab.errors import InputError
from veloxlab.measure.compare import compare
from veloxlab.measure.reproduce import calibration_code
from veloxlab.widgets.runs import Runs

FITTED = "spectralquant"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lab = vl.Lab(tiny("llama", num_hidden_layers=1), Letters(), tokens=64, sinks=0, window=0)
        yield lab
        lab.worker.close()


@pytest.fixture(autouse=True)
def _as_it_was(lab):
    yield
    lab.selection.choose(method="turboquant", seed=0)
    assert lab.wait(120)


def test_the_seed_of_codes_is_that_of_every_page_the_plan_and_the_code(lab):
    errors, tokens = lab.turn_to("errors"), lab.turn_to("tokens")
    texts, keys = lab.turn_to("generation"), lab.turn_to("keys")
    turn(texts, prompt="abc", tokens=2)
    before = {}
    for page in (errors, tokens, keys):
        turn(lab, page={errors: "errors", tokens: "tokens", keys: "keys"}[page])
        before[page] = [view.content["datasets"] for view in page.charts.values()]
    turn(lab, page="cache")
    mse = lab.errors.frame["output_error"].to_list()
    controls(lab.pages["cache"])["seed"].value = 3
    assert lab.wait(120)
    options = {"bits": 4, "sinks": 0, "window": 0, "seed": 3}
    expected = vl.measure.layer_errors(lab.experiment.capture, "turboquant", **options)
    assert (
        lab.errors.frame["output_error"].to_list() == expected.sort("tensor", "layer")["output_error"].to_list() != mse
    )
    assert {layer.options["seed"] for layer in lab.plan.layers} == {3}
    assert "window=0, seed=3)" in lab.pages["cache"]._code.value
    for page, then in before.items():
        turn(lab, page={errors: "errors", tokens: "tokens", keys: "keys"}[page])
        assert [view.content["datasets"] for view in page.charts.values()] != then
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veloxlab.widgets.pages.generation.side_by_side", lambda *_, **settings: given.update(settings))
        texts.run()
        lab.wait(60)
    assert given["seed"] == 3


def test_a_run_has_its_seed_and_the_function_s_result(lab, tmp_path):
    turn(lab, seed=3)
    lab.measure()
    assert lab.wait(60)
    run = lab.points.every[-1]
    assert (run.seed, run.name, run.choice.seed) == (3, "turboquant K4 V4, seed 3", 3)
    given = {"tokens": 64, "bits": 4, "sinks": 0, "window": 0}
    kl = {
        seed: vl.fidelity(lab.experiment.model, Letters(), "turboquant", seed=seed, **given)["kl_mean"].item()
        for seed in (0, 3)
    }
    assert run.kl.mean == pytest.approx(kl[3], rel=1e-6)
    assert run.kl.mean != pytest.approx(kl[0], rel=1e-3)
    again = Runs()
    again.open(lab.points.save(tmp_path / "runs.parquet"))
    assert again.every[-1].choice == run.choice
    page = lab.turn_to("runs")
    assert ">3</td>" in page._table.value
    state = lab.state
    turn(lab, seed=0)
    lab.restore(state)
    assert lab.selection.choice.seed == 3
    lab.restore({name: value for name, value in state.items() if name != "seed"})  # a state from an older version
    assert lab.selection.choice.seed == 0


def test_a_method_is_fitted_with_the_seed(lab):
    turn(lab, page="cache", method=FITTED)
    turn(lab, seed=5)
    assert "seed" not in lab.plan.layers[0].options
    assert {codec.seed for codec in lab.selection.fitting.calibration(FITTED, [4]).codecs.values()} == {5}
    assert f'vl.calibrate(model, tokenizer, "{FITTED}", bits=[4], seed=5)' in lab.pages["cache"]._code.value
    lab.measure()
    assert lab.wait(60)
    assert lab.points.every[-1].seed == 5
    fitting = lab.selection.fitting
    assert [fitting.calibration(FITTED, [4], seed=seed).facts["seed"] for seed in (0, 5)] == [0, 5]
    assert fitting.is_ready(FITTED, 4)
    lab.selection.choose(seed=6)
    assert not fitting.is_ready(FITTED, 4)
    assert ", seed=6)" in calibration_code(lab.plan, seed=6)


def test_a_given_calibration_keeps_its_seed(lab):
    given = lab.selection.fitting.calibration(FITTED, [4], seed=5)
    other = vl.Lab(lab.experiment.model, Letters(), method=FITTED, tokens=64, calibration=given)
    with pytest.raises(InputError, match=r"spectralquant that was given has seed 5: for another seed give .*seed=6"):
        other.selection.choose(seed=6)
    other.selection.choose(seed=5)
    other.close()


def test_a_comparison_takes_a_seed_for_all_its_methods(lab, monkeypatch, tmp_path, capsys):
    given = {"methods": ["rvq", "vecinfer"], "bits": (2,), "tokens": 64, "windows": 1, "sinks": 2}
    first, again, other = (
        compare(lab.experiment.model, Letters(), seed=seed, **given)["kl_mean"].to_list()[:2] for seed in (3, 3, 0)
    )
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    monkeypatch.setattr(vl, "load", lambda _: (lab.experiment.model, Letters()))
    words = ["compare", "--methods", "rvq", "--tokens", "24", "--windows", "1", "--sinks", "2", "--out", str(tmp_path)]
    assert main([*words, "--seed", "3"]) == 0
    assert (tmp_path / "compare_smollm2-135m_2_sinks_seed_3.parquet").is_file()
    assert main(["compare", "--times", "--seed", "3"]) == 2
    assert "leave out --seed 3" in capsys.readouterr().err
