"""The comparison behind the README's tables, on a small model and on small shapes."""

from functools import partial

import polars as pl
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab import cli
from veloxlab.cli import measurements
from veloxlab.cli.results import Index
from veloxlab.cli.tables import compared_table, ratio_table
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError
from veloxlab.measure import compare as measured
from veloxlab.measure.compare import COMPARED, byte_ratios, compare


def test_every_method_and_mlx_lms_cache_get_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path)
    frame = compare(tiny("llama"), Letters(), bits=(2,), text=TEXT, tokens=100, windows=2)
    assert frame.schema == COMPARED
    names = [f"{m} {2.25 if method.fractional else 2} bit" for m, method in METHODS.items() if 2 in method.bits]
    assert frame["name"].to_list() == [*names, "mlx-lm 2 bit", "mlx-lm 8 bit"]
    assert frame["kl_mean"].is_finite().all()
    assert (frame["store_us"] > 0).all()
    assert (frame["attend_ratio"] > 0).all()
    ours = frame.filter(~pl.col("name").str.starts_with("mlx-lm"))
    assert (ours["held_bytes"] < ours["fp16_bytes"]).all()
    assert compared_table(frame).count("\n") == 2 + frame.height


def test_with_sinks_first_tokens_are_exact_and_no_times_are_taken(monkeypatch):
    monkeypatch.setattr(measured, "METHODS", {"turboquant": METHODS["turboquant"]})
    none, four = (
        compare(tiny("llama"), Letters(), bits=(2,), text=TEXT, tokens=40, windows=1, sinks=n) for n in (0, 4)
    )
    assert four.schema == COMPARED
    assert four["store_us"].is_null().all()
    assert four["held_bytes"][0] > none["held_bytes"][0]
    assert four["held_bytes"][1] == none["held_bytes"][1]  # mlx-lm's cache has no sinks


def test_whole_caches_have_the_documented_size():
    """Measured on live buffers, with codebooks; the shapes of one layer of a model with a head dimension of 128."""
    frame = byte_ratios()
    assert frame.select("head_dim", "tokens").unique().rows() == [(128, 8192)]
    ratios = {row["name"]: row for row in frame.iter_rows(named=True)}
    assert ratios["vecinfer K1 V1"]["key_ratio"] >= 15.5
    assert ratios["rvq K2 V2"]["key_ratio"] >= 7.5
    assert ratios["rabitq K1 V4"]["ratio"] >= 5.9
    assert ratio_table(frame).count("\n") == 1 + frame.height


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("falcon_h1", {}, None),
        ("qwen3_next", {}, None),
        ("lfm2", {}, "head dimension 16, no multiple of its groups of 64"),
        ("llama", {"head_dim": 80}, "head dimension 80, no multiple"),
        ("llama", {"head_dim": 256}, "no room for keys of head dimension 256"),
        ("gemma3_text", {}, "layer 0 slides"),
    ],
)
def test_an_unsupported_cache_is_left_out_and_the_others_are_kept(monkeypatch, family, config, reason):
    monkeypatch.setattr(measured, "METHODS", {"turboquant": METHODS["turboquant"]})
    told, rows = {}, []
    frame = compare(
        tiny(family, **config), Letters(), bits=(3,), text=TEXT, tokens=24, windows=1,
        on_rows=lambda so_far, left_out: (told.update(left_out), rows.append(so_far.height)),
    )  # fmt: skip
    wide = reason is None or "256" in reason
    assert frame["name"].to_list() == [
        "turboquant 3 bit",
        *["mlx-lm 3 bit"] * (reason is None),
        *["mlx-lm 8 bit"] * wide,
    ]
    assert rows[-1] == frame.height
    assert len(rows) == 3
    assert (reason in told["mlx-lm 3 bit"]) if reason else not told


def test_an_unexpected_error_is_reported_with_its_class(monkeypatch):
    monkeypatch.setattr(measured, "METHODS", {"turboquant": METHODS["turboquant"]})
    monkeypatch.setattr(measured, "_ours", lambda *_: lambda model: [])
    told, labels = {}, []
    frame = compare(
        tiny("llama"), Letters(), bits=(4,), text=TEXT, tokens=24, windows=1,
        progress=lambda done, total, label: labels.append(label), on_rows=lambda _, left_out: told.update(left_out),
    )  # fmt: skip
    assert frame["name"].to_list() == ["mlx-lm 4 bit", "mlx-lm 8 bit"]
    assert told == {"turboquant 4 bit": "IndexError: list index out of range"}
    assert "turboquant 4 bit is left out: IndexError: list index out of range" in labels


def test_rows_are_written_one_by_one_and_the_table_lists_what_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vl, "load", lambda name: (tiny("llama", head_dim=80), Letters()))
    monkeypatch.setattr(measured, "METHODS", {"turboquant": METHODS["turboquant"]})
    monkeypatch.setattr(measured, "byte_ratios", partial(byte_ratios, kv_heads=1, tokens=1024))
    words = ["compare", "--tokens", "24", "--windows", "1", "--out", str(tmp_path)]

    def stopped(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measurements, "say", stopped)
        with pytest.raises(KeyboardInterrupt):
            cli.main(words)
    (unfinished,) = tmp_path.glob("*")
    assert pl.read_parquet(unfinished)["name"].to_list() == ["turboquant 1 bit", "turboquant 2 bit"]
    assert cli.main(words) == 0
    assert "mlx-lm 8 bit is left out: mlx-lm has no 8-bit cache for this model" in capsys.readouterr().out
    stem = "compare_smollm2-135m"
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"{stem}.{x}" for x in ("md", "parquet", "png")),
        "byte_ratios.parquet",
    }
    assert pl.read_parquet(tmp_path / f"{stem}.parquet").height == 4


def test_times_of_an_earlier_comparison_are_measured_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vl, "load", lambda name: (tiny("llama"), Letters()))
    monkeypatch.setattr(measured, "METHODS", {"turboquant": METHODS["turboquant"]})
    monkeypatch.setattr(measured, "byte_ratios", partial(byte_ratios, kv_heads=1, tokens=1024))
    words = ["compare", "--tokens", "24", "--windows", "1", "--out", str(tmp_path)]
    assert cli.main([*words, "--times"]) == 2
    assert "run `veloxlab compare` without --times first" in capsys.readouterr().err
    assert cli.main(words) == 0
    rows, page = tmp_path / "compare_smollm2-135m.parquet", tmp_path / "compare_smollm2-135m.md"
    before, text = pl.read_parquet(rows), page.read_text()
    seconds = [measured.CacheSeconds(1e-6, 2e-6), measured.CacheSeconds(24e-6, 6e-6)]
    monkeypatch.setattr(measured, "cache_seconds", lambda *_: seconds)
    assert cli.main([*words, "--times"]) == 0
    after, times = pl.read_parquet(rows), ["store_us", "store_ratio", "attend_us", "attend_ratio"]
    assert after.schema == before.schema
    assert after.drop(times).equals(before.drop(times))
    assert after.select(times).unique().rows() == [(1.0, 24.0, 6.0, 3.0)]
    assert page.read_text() == text.replace(compared_table(before), compared_table(after))
    assert "| 1.0 | 6 (3.0×) |" in page.read_text()


def test_a_model_without_any_of_these_caches_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(measured, "METHODS", {})
    with pytest.raises(
        InputError, match=r"No cache can be compared with this model's own; mlx-lm 3 bit: mlx-lm has no"
    ):
        compare(tiny("llama", head_dim=80), Letters(), bits=(3,), text=TEXT, tokens=24, windows=1)


def test_only_some_methods_are_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vl, "load", lambda name: (tiny("llama"), Letters()))
    words = ["compare", "--methods", "rvq", "--sinks", "2", "--out", str(tmp_path), "--tokens", "24", "--windows", "1"]
    assert cli.main([*words, "--peers"]) == 2
    assert "--methods has no effect" in capsys.readouterr().err
    assert cli.main(words) == 0
    names = pl.read_parquet(tmp_path / "compare_smollm2-135m_2_sinks.parquet")["name"].to_list()
    assert names == ["rvq 2 bit", "rvq 4 bit", "mlx-lm 2 bit", "mlx-lm 3 bit", "mlx-lm 4 bit", "mlx-lm 8 bit"]


def test_the_committed_rows_with_sinks_are_those_of_the_command_in_the_index():
    name = "compare_smollm2-135m_4_sinks.parquet"
    index = Index.read()
    _, behind = index.commands[name].split("--methods ")
    makers = measured._makers(tiny("llama"), Letters(), (1, 2, 3, 4), 4, behind.split(" --")[0].split())
    assert pl.read_parquet(index.folder / name)["name"].to_list() == [*makers]
