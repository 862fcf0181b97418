"""The README's figures are those of the committed results."""

from pathlib import Path

import polars as pl

from veloxlab.cli import compared_table

ROOT = Path(__file__).parents[1]


def test_the_table_is_the_committed_measurement():
    frame = pl.read_parquet(ROOT / "data" / "results" / "compare_smollm2-135m.parquet")
    assert compared_table(frame) in (ROOT / "README.md").read_text()
