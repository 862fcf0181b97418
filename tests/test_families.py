"""Models of every kind take the path that is expected of them, and keep their logits."""

import polars as pl
import pytest

from tests import families
from tests.families import FAMILIES, measure  # type: ignore[attr-defined]

CODES = {
    "qwen3_next": "3 × own, codes",  # linear attention in three layers of four
    "gemma3_text": "3 × codes",
    "gemma3n": "2 × codes",  # two layers of four have caches, the others read theirs
    "gemma4_text": "4 × codes",
    "falcon_h1": "own, codes, own, codes",  # a state-space cache and one of keys and values in each layer
    "gpt_oss": "4 × codes",
    "deepseek_v3": "2 × latents",
    "olmo3": "4 × codes",
    "lfm2": "codes, own, codes, own",
    "mamba2": "2 × own",
}
# 8 bits in every layer lose 0.5 % of each vector (papers.md 0.1: relative MSE 2.6e-5), and a model of random weights
# does not dampen it; gemma4's attention has a scale of 1 and not 1/√D, so the same error of a score weighs 8 times more
EIGHT_BITS = {"gemma4_text": 0.3}
# Codes read against codes decoded. A sum in another order moves a key over the edge of a code in some families, and
# which they are depends on the processor; later layers then differ by a step of 8 bits. A wrong reader differs by more.
STEP, STEPS = 0.01, {"gemma4_text": 0.1}


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_takes_its_path_and_keeps_its_logits(family, kernels, monkeypatch):
    monkeypatch.setenv("VELOXLAB_KERNELS", kernels)
    found = measure(family)
    assert found.path == CODES.get(family, "2 × codes")
    assert found.exact_error < 1e-4  # float32, in another order
    assert found.codes_error < STEPS.get(family, STEP)
    assert found.eight_bit_error < EIGHT_BITS.get(family, 0.06)


def test_the_table_in_data_is_of_these_families():
    frame = pl.read_parquet(families.RESULTS / "families.parquet")
    assert frame["family"].to_list() == list(FAMILIES)
    assert (families.RESULTS / "families.md").read_text() == families.table(frame) + "\n"
