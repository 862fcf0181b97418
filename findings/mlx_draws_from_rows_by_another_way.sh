#!/usr/bin/env bash
# mx.random.categorical draws different tokens from logits [1, V] and [V]; those from [1, V] change more easily.
#
# Versions: mlx 0.32.4, numpy 2.4.6, Linux, CPU.
# From a vector of logits, `mx.random.categorical` adds Gumbel noise and takes the largest sum. From rows, it draws one
# uniform number for each row, and finds it in the running sum of the probabilities. Both draws follow the logits, as
# they must. But a small change of the logits, as between two models or two caches, changes the token from the running
# sum far more often than the token from the noise. mlx-lm's sampler draws from rows.
#
# Observed with 500 keys and 49,152 logits: the two ways draw the same token 8 times (explicit Gumbel noise agrees with
# the vector 500 times). Noise of 0.1 in the logits changes 5 % of the tokens from a vector, and 69 % of those from a row.
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
