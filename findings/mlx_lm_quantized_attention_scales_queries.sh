#!/usr/bin/env bash
# mlx-lm's quantized attention changes its input array of queries.
#
# Versions: mlx 0.32.4, mlx-lm 0.32.2, Linux, CPU.
# `mlx_lm.models.base.quantized_scaled_dot_product_attention` multiplies its `queries` by `scale` in place. So a second
# call with the same array gives a different result: each call scales the array again. In float16, a
# query for head dimension 64 (scale 1/8) is exactly 0 after twelve calls, and the attention is a plain mean of the
# values. A benchmark that repeats the call with one query measures this case.
#
# Observed: the same call twice gives two results; the sum of |queries| decreases by the scale at each call, to 0.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention

mx.set_default_device(mx.cpu)
mx.random.seed(0)
heads, tokens, dim, scale = 2, 32, 64, 64**-0.5
queries = mx.random.normal((1, heads, 1, dim)).astype(mx.float16)
keys, values = (mx.quantize(mx.random.normal((1, heads, tokens, dim)).astype(mx.float16), 64, 8) for _ in "kv")

sizes, answers = [float(mx.abs(queries).sum())], []
for _ in range(12):
    answers.append(attention(queries, keys, values, scale=scale, mask=None, group_size=64, bits=8))
    mx.eval(answers[-1])
    sizes.append(float(mx.abs(queries).sum()))
same = mx.array_equal(answers[0], answers[1]).item()
print("first two answers equal:", same)
print("sum of |queries| before, after 1, 2, 12 calls:", sizes[0], sizes[1], sizes[2], sizes[12])
sys.exit(0 if not same and sizes[1] < sizes[0] / 4 and sizes[12] == 0 else 1)
PY
