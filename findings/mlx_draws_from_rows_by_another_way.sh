#!/usr/bin/env bash
# A key draws another token from logits [1, V] than from the same logits [V], and one that changes sooner.
#
# Versions: mlx 0.32.4, numpy 2.4.6, Linux, CPU.
# `mx.random.categorical` adds Gumbel noise to a vector of logits and takes the largest sum. Of rows it takes one uniform
# number each, and finds it in the running sum of the probabilities. Both draw by the logits, as they have to. But where
# two models, or a model with two caches, differ a little, one number in a running sum of a whole vocabulary ends at
# another token more often than the same noise does. mlx-lm's sampler draws from rows.
#
# Seen, of 500 keys and 49,152 logits: both ways draw the same token 8 times (that of Gumbel noise 500 times from a
# vector). After noise of 0.1 in the logits 5 % of the tokens from a vector are others, and 69 % of those from a row.
# Exits 0 while that is so, 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4" "numpy==2.4.6"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
KEYS, VOCABULARY = [mx.random.key(i) for i in range(500)], 49_152
logits = 3 * mx.random.normal((VOCABULARY,), key=mx.random.key(1000))
changed = logits + 0.1 * mx.random.normal((VOCABULARY,), key=mx.random.key(1001))


def drawn(x: mx.array) -> np.ndarray:
    return np.array([mx.random.categorical(x, key=key).item() for key in KEYS])


gumbel = np.array([(logits + mx.random.gumbel(logits.shape, key=key)).argmax().item() for key in KEYS])
vector, row = drawn(logits), drawn(logits[None])
same, by_gumbel = int((vector == row).sum()), int((vector == gumbel).sum())
others = {"a vector": float((drawn(changed) != vector).mean()), "a row": float((drawn(changed[None]) != row).mean())}
print(f"mlx {mx.__version__}: of {len(KEYS)} keys {same} draw the same token from both, {by_gumbel} that of Gumbel noise from a vector")
print("other tokens after small noise:", {name: f"{share:.0%}" for name, share in others.items()})
sys.exit(0 if same < 50 and by_gumbel == len(KEYS) and others["a row"] > 2 * others["a vector"] else 1)
PY
