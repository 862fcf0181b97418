#!/usr/bin/env bash
# On a CPU, MLX's logsumexp of a large vocabulary is low by 1e-4, and its softmax sums to more than 1 by as much.
#
# Versions: mlx 0.32.4, numpy 2.4.6, Linux, CPU.
# MLX adds float32 numbers one after another in a few running sums. If a few logits dominate, the small terms are lost
# in a large sum. NumPy uses pairwise summation: its float32 result is correct to 1e-6. A perplexity or a KL
# divergence is a mean of such numbers. The error has the same sign in every row, so the mean does not cancel it.
#
# Observed with 8 rows of 128,256 normal logits (standard deviation 5, seed 0), against float64:
#   mx.logsumexp: all rows low, by 6.6e-5 to 1.3e-4; mx.softmax: a row sums to 1 + 1.3e-4
#   float32 in NumPy: within 1e-5
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4" "numpy==2.4.6"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx
import numpy as np

logits = np.random.default_rng(0).normal(0, 5, (8, 128_256)).astype(np.float32)
wide = logits.astype(np.float64)
exact = np.log(np.exp(wide).sum(-1))
low = exact - np.array(mx.logsumexp(mx.array(logits), axis=-1))
sums = np.array(mx.softmax(mx.array(logits), axis=-1)).astype(np.float64).sum(-1)
top = logits.max(-1, keepdims=True)
numpy_misses = np.abs(np.log(np.exp(logits - top).sum(-1)) + top[:, 0] - exact)
print(f"mx.logsumexp is low by {low.min():.1e} to {low.max():.1e}")
print(f"mx.softmax sums to 1 + {sums.max() - 1:.1e}")
print(f"NumPy's float32 misses by at most {numpy_misses.max():.1e}")
sys.exit(0 if low.min() > 3e-5 and sums.max() > 1 + 6e-5 and numpy_misses.max() < 1e-5 else 1)
PY
