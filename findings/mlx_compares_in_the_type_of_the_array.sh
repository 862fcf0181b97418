#!/usr/bin/env bash
# MLX compares an array with a Python number in the array's dtype, where the number can become infinity.
#
# Versions: mlx 0.32.4, Linux, CPU.
# `mx.abs(x) <= 1e9` looks like a test for finite numbers. MLX converts the Python number to the dtype of the array. In
# float16, 1e9 becomes infinity, so the comparison is true for infinity itself. In bfloat16 and float32 it is false.
# A cache that checks its range in this way stores infinities, but only in float16 models.
#
# Observed: true for float16, false for bfloat16 and float32; `mx.isfinite` is correct for all three.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx

found, finite = {}, {}
for dtype in (mx.float16, mx.bfloat16, mx.float32):
    x = mx.array([float("inf")]).astype(dtype)
    found[str(dtype)] = (mx.abs(x) <= 1e9).item()
    finite[str(dtype)] = mx.isfinite(x).item()
print("inf passes |x| <= 1e9:", found)
print("mx.isfinite(inf):", finite)
sys.exit(0 if list(found.values()) == [True, False, False] and not any(finite.values()) else 1)
PY
