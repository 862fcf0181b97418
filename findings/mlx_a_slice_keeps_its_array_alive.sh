#!/usr/bin/env bash
# A slice in MLX keeps its whole array in memory, but `nbytes` counts only the slice. `mx.concatenate` does not copy it.
#
# Versions: mlx 0.32.4, Linux, CPU.
# A slice is a view, as in NumPy, and `nbytes` counts only its own numbers. `mx.concatenate` of one slice, and `astype`
# to the same type, seem to make a copy, but they return the view. A cache that keeps four tokens of a prompt in this way
# holds the whole prompt, and reports four tokens. `mx.contiguous` and `mx.array` copy.
#
# Observed, with 10 of 25,000,000 float32 numbers kept and the array itself deleted (nbytes: 40):
#   slice, mx.concatenate([slice]), slice.astype(same type): 100,000,000 bytes live; mx.contiguous, mx.array: 40
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import gc
import sys

import mlx.core as mx

mx.set_default_device(mx.cpu)
ways = {
    "slice": lambda x: x,
    "concatenate": lambda x: mx.concatenate([x]),
    "astype": lambda x: x.astype(mx.float32),
    "contiguous": mx.contiguous,
    "array": mx.array,
}
live = {}
for name, way in ways.items():
    before = mx.get_active_memory()
    whole = mx.zeros(25_000_000)
    mx.eval(whole)
    kept = way(whole[:10])
    mx.eval(kept)
    del whole
    gc.collect()
    live[name] = mx.get_active_memory() - before
    print(f"{name:11} nbytes {kept.nbytes}, live {live[name]:,}")
    del kept
large = [name for name, nbytes in live.items() if nbytes >= 100_000_000]
sys.exit(0 if large == ["slice", "concatenate", "astype"] else 1)
PY
