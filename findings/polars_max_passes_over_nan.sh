#!/usr/bin/env bash
# Polars' maximum ignores NaN, but a filter for large values keeps NaN.
#
# Versions: polars 2.1.0, Linux.
# A report with mean, 99th percentile and maximum of errors shows NaN, NaN and an ordinary number. So the maximum
# alone hides a failure. And `x > 2` is true for NaN, because Polars orders NaN above all numbers. `nan_max` gives
# NaN; `is_finite` keeps only finite numbers.
#
# Observed with 1, NaN, 3: max 3, mean NaN, quantile(0.99) NaN, nan_max NaN; filter(x > 2) keeps NaN and 3.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "polars==2.1.0"
"$folder/env/bin/python" - <<'PY'
import math
import sys

import polars as pl

x = pl.col("x")
frame = pl.DataFrame({"x": [1.0, math.nan, 3.0]})
row = frame.select(max=x.max(), mean=x.mean(), p99=x.quantile(0.99), nan_max=x.nan_max()).row(0, named=True)
kept = frame.filter(x > 2)["x"].to_list()
print(row)
print("x > 2:", kept)
right = row["max"] == 3 and all(math.isnan(row[name]) for name in ("mean", "p99", "nan_max"))
sys.exit(0 if right and len(kept) == 2 and math.isnan(kept[0]) else 1)
PY
