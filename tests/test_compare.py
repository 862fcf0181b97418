"""The comparison behind the README's tables, on a small model and on small shapes."""

import polars as pl

from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.cli.tables import compared_table, ratio_table
from veloxlab.codecs import METHODS
from veloxlab.measure.compare import COMPARED, LONG, byte_ratios, compare


def test_every_method_and_mlx_lms_cache_get_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path)
    frame = compare(tiny("llama"), Letters(), bits=(2,), text=TEXT, tokens=100, windows=2)
    assert frame.schema == COMPARED
    names = [f"{m} 2 bit" for m, method in METHODS.items() if 2 in method.bits]
    assert frame["name"].to_list() == [*names, "mlx-lm 2 bit", "mlx-lm 8 bit"]
    assert frame["kl_mean"].is_finite().all()
    assert (frame["store_us"] > 0).all()
    assert (frame["attend_ratio"] > 0).all()
    ours = frame.filter(~pl.col("name").str.starts_with("mlx-lm"))
    assert (ours["held_bytes"] < ours["fp16_bytes"]).all()
    assert compared_table(frame).count("\n") == 2 + frame.height


def test_whole_caches_are_as_small_as_promised():
    """Read off live buffers, codebooks included; the shapes of one layer of a model with a head dimension of 128."""
    frame = byte_ratios()
    assert (LONG.head_dim, LONG.tokens) == (128, 8192)
    ratios = {row["name"]: row for row in frame.iter_rows(named=True)}
    assert ratios["vecinfer K1 V1"]["key_ratio"] >= 15.5
    assert ratios["rvq K2 V2"]["key_ratio"] >= 7.5
    assert ratios["rabitq K1 V4"]["ratio"] >= 5.9
    assert ratio_table(frame).count("\n") == 1 + frame.height
