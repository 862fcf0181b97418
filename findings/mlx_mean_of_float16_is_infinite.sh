#!/usr/bin/env bash
# The mean of a float16 array can be infinity although each number in it is 100.
#
# Versions: mlx 0.32.4, numpy 2.4.6, Linux, CPU.
# MLX sums in the dtype of the array. The sum for a mean, a variance or a norm exceeds 65,504 long before the result
# does. NumPy sums float16 means in float32. Use `astype(mx.float32)` before a root mean square or a variance of a
# float16 model's activations.
#
# Observed: mean of 4,096 times 100: inf, and 100 in NumPy; variance of 1,000 normal numbers times 300: inf (86,000 in
# float32); norm of 64 times 100: inf (800).
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4" "numpy==2.4.6"
"$folder/env/bin/python" - <<'PY'
import math
import sys

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
hundreds = mx.full((4096,), 100.0)
normal = mx.random.normal((1000,), key=mx.random.key(0)) * 300
cases = {
    "mean": (mx.mean, hundreds),
    "variance": (mx.var, normal),
    "norm": (mx.linalg.norm, hundreds[:64]),
}
seen = {name: (f(x.astype(mx.float16)).item(), f(x).item()) for name, (f, x) in cases.items()}
for name, (half, single) in seen.items():
    print(f"{name}: {half} in float16, {single:.6g} in float32")
in_numpy = float(np.full(4096, 100, np.float16).mean())
print("mean in NumPy, float16:", in_numpy)
sys.exit(0 if in_numpy == 100 and all(math.isinf(half) and math.isfinite(single) for half, single in seen.values()) else 1)
PY
