"""mlx-lm's own tests of its caches, run on ours.

They come from mlx-lm's source distribution, because wheels have no tests. Its caches are replaced by ours, with some
additions for these tests beyond the contract: a constructor without codecs, the arrays ``keys`` and ``values``,
conversion to mlx-lm's quantized cache (ours must not have it: ``--kv-bits`` would empty it), and, for a sliding cache,
masks of one query in the order of mlx-lm's ring buffer, where ours keep tokens in order.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
import unittest
from importlib.metadata import version

import mlx.core as mx
import mlx_lm.models.cache
import mlx_lm.utils
import platformdirs
import pytest

from veloxlab.cache.batch import BatchCompressedKVCache
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import find_method
from veloxlab.codecs.none import Exact

EXACT = mlx_lm.models.cache.KVCache
DIFFERS = {
    "test_batch_rotating_kv_cache": (
        "self.assertTrue(mx.array_equal(mask.squeeze(), expected))",
        "its last line: of 5 tokens in a window of 8, mlx-lm's mask for the next two hides the oldest; ours shows it",
    )
}
"""Tests for which ours gives another result, with the line and the reason."""
LEAST_DIM = 4  # for a lossy codec

LOSSY = {
    "test_cache_with_generate": "logits are compared with those of the exact cache",
    "test_cache_copying": "stored keys are compared with what was given",
}


class _Adapted:
    """Additions to both kinds of cache, so that they are made like mlx-lm's own."""

    method = ("none", 32)

    @classmethod
    def codecs(cls, keys: mx.array, values: mx.array):
        name, bits = cls.method
        for x, role in ((keys, "keys"), (values, "values")):
            dim = x.shape[-1]
            yield find_method(name).codec(dim, bits, role) if dim >= LEAST_DIM else Exact(dim)

    @property
    def keys(self):
        return None if self.empty() else self.keys_and_values()[0]  # type: ignore[attr-defined]

    @property
    def values(self):
        return None if self.empty() else self.keys_and_values()[1]  # type: ignore[attr-defined]

    def to_quantized(self, **settings):
        own = EXACT()
        own.update_and_fetch(self.keys, self.values)
        return own.to_quantized(**settings)


class KVCache(_Adapted, CompressedKVCache):
    step = 256

    def __init__(self, key_codec=None, value_codec=None, **settings):
        unknown = Exact(1)
        usual = {"sinks": 0, "window": 0, "path": "arrays"}
        super().__init__(key_codec or unknown, value_codec or unknown, **{**usual, **settings})

    def _coming(self, keys, values):
        if self.empty():
            self.key_codec, self.value_codec = self.codecs(keys, values)
            self._exact = Exact(keys.shape[-1]), Exact(values.shape[-1])
        return super()._coming(keys, values)

    @staticmethod
    def merge(caches):
        return BatchKVCache(rows=CompressedKVCache.merge(caches).rows)


class _Ring:
    """Reorders masks of one query from the order of the text to that of a ring buffer."""

    turned = 0  # single tokens since the last call with several

    def update_and_fetch(self, keys, values):
        self.turned = self.turned + 1 if keys.shape[2] == 1 else 0
        return super().update_and_fetch(keys, values)

    def make_mask(self, N, return_array=False, window_size=None):
        mask = super().make_mask(N, return_array, window_size)
        return mask if mask is None or N > 1 else mx.roll(mask, self.turned + 1, axis=-1)  # type: ignore[call-arg]


class RotatingKVCache(_Ring, KVCache):
    def __init__(self, key_codec=None, value_codec=None, *, max_size=None, keep=0, **settings):
        if isinstance(key_codec, int):  # mlx-lm's first argument is the size
            key_codec, max_size = None, key_codec
        super().__init__(key_codec, value_codec, **{"max_size": max_size, "sinks": keep, **settings})

    keep = property(lambda self: self.max_sinks)


class BatchKVCache(_Adapted, BatchCompressedKVCache):
    row = KVCache

    def __init__(self, left_padding=None, rows=None, **settings):
        if rows is None and left_padding and isinstance(left_padding[0], CompressedKVCache):
            left_padding, rows = None, left_padding  # argument order of `BatchCompressedKVCache.from_state`
        super().__init__(rows or [self.row(**settings) for _ in left_padding])
        if left_padding:
            self.prepare(left_padding=left_padding)

    @classmethod
    def merge(cls, caches):
        return cls(rows=CompressedKVCache.merge(caches).rows)


class BatchRotatingKVCache(_Ring, BatchKVCache):
    row = RotatingKVCache
    rotated = False  # ours are never rotated


OURS = (KVCache, RotatingKVCache, BatchKVCache, BatchRotatingKVCache)


@pytest.fixture(scope="module")
def source():
    """Return the folder of tests of the installed version of mlx-lm."""
    found = version("mlx-lm")
    folder = platformdirs.user_cache_path("veloxlab") / "sdists"
    archive = folder / f"mlx_lm-{found}.tar.gz"
    if not archive.exists():
        command = ["tool", "run", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", f"mlx-lm=={found}"]
        subprocess.run([shutil.which("uv") or "uv", *command, "--dest", str(folder)], check=True)
    return archive


@pytest.fixture(params=[("none", 32), ("turboquant", 8)], ids=["none", "turboquant"])
def theirs(request, source, tmp_path, monkeypatch, smollm2):
    """Return their test case, with our caches of one method in place of theirs."""
    monkeypatch.setattr(_Adapted, "method", request.param)
    for ours in OURS:
        monkeypatch.setattr(mlx_lm.models.cache, ours.__name__, ours)
    monkeypatch.setattr(mlx_lm.utils, "load", lambda _: smollm2)
    with tarfile.open(source) as archive:
        (name,) = (n for n in archive.getnames() if n.endswith("tests/test_prompt_cache.py"))
        archive.extract(name, tmp_path, filter="data")
    spec = importlib.util.spec_from_file_location("theirs", tmp_path / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param[0], module.TestPromptCache


def test_their_tests_of_a_prompt_cache_pass_on_ours(theirs):
    method, case = theirs
    exempt = set(LOSSY) if method != "none" else set()
    names = unittest.TestLoader().getTestCaseNames(case)
    assert exempt <= set(names)  # mlx-lm still has the exempt tests
    suite = unittest.TestSuite(case(name) for name in names if name not in exempt)
    result = unittest.TestResult()
    suite.run(result)
    failed = {test.id().rpartition(".")[2]: trace for test, trace in result.errors + result.failures}
    ((name, (line, _)),) = DIFFERS.items()
    assert line in failed.pop(name)
    assert not failed, next(iter(failed.values()))
    assert result.testsRun == len(names) - len(exempt) >= 20
