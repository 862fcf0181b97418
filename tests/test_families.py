"""Models of every kind take the expected path, and keep their logits."""

import copy
import json
import subprocess
from types import SimpleNamespace

import polars as pl
import pytest

import veloxlab as vl
from tests import every_family
from tests.families import ALL_CODED, Subject, as_arrays, codes, in_chunks, paths, rope
from tests.tiny_models import FAMILIES

CODES = {
    "qwen3_next": "3 × own, codes",  # linear attention in three layers of four
    "gemma3_text": "3 × codes",
    "gemma3n": "2 × codes",  # two layers of four have caches, which the others read
    "gemma4_text": "4 × codes",
    "falcon_h1": "own, codes, own, codes",  # a state-space cache and one of keys and values in each layer
    "gpt_oss": "4 × codes",
    "deepseek_v3": "2 × latents",
    "olmo3": "4 × codes",
    "lfm2": "codes, own, codes, own",
    "mamba2": "2 × own",
    "deepseek_v32": "latents, own, latents, own",  # an indexer's keys are not compressed
    "minimax_m3_vl": "2 × codes, own",
    "plamo2": "own, codes",
    "longcat_flash": "4 × latents",  # two in each layer
    "llama4": "4 × codes",  # three of them see a chunk
}
OF_THEIR_OWN = ("deepseek_v32", "minimax_m3_vl", "phi3small", "plamo2")  # attention; the first two with an indexer
WITH_CACHES_OF_THEIR_OWN = ("longcat_flash", "llama4")
# 8 bits in every layer lose 0.5 % of each vector (papers.md 0.1: relative MSE 2.6e-5), and a random model
# does not dampen it; gemma4's attention has a scale of 1 and not 1/√D, so the same error of a score counts 8 times
EIGHT_BITS = {"gemma4_text": 0.3}
# Codes that are read against decoded codes. In some families a sum in another order moves a key to another code;
# which families depends on the processor. Later layers then differ by a step of 8 bits. A wrong reader differs by more.
STEP, STEPS = 0.01, {"gemma4_text": 0.1}


def codes_of_one_layer(subject: Subject) -> float:
    """Compare codes that are read with decoded codes, with one layer in codes and the others exact: the worst layer."""
    worst = 0.0
    for layer, coded in enumerate(vl.make_cache(subject.model, bits=8, **ALL_CODED)):
        runs = []
        for read in (list, as_arrays):
            exact = vl.make_cache(subject.model, "none", **ALL_CODED)
            runs.append(subject.run(read([*exact[:layer], copy.deepcopy(coded), *exact[layer + 1 :]])))
        worst = max(worst, subject.off(*runs))
    return worst


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("family", [*FAMILIES, *OF_THEIR_OWN, *WITH_CACHES_OF_THEIR_OWN])
def test_each_family_takes_its_path_and_keeps_its_logits(family, kernels, monkeypatch):
    monkeypatch.setenv("VELOXLAB_KERNELS", kernels)
    subject = Subject(family)
    assert paths(subject)["path"] == CODES.get(family, "2 × codes")
    assert in_chunks(subject)["chunked_error"] < 1e-4  # float32 sums in another order
    found = codes(subject)
    assert found["codes_error"] < STEPS.get(family, STEP)
    assert codes_of_one_layer(subject) < 1e-4  # no code of an earlier layer differs: float32 sums in another order
    assert found["eight_bit_error"] < EIGHT_BITS.get(family, 0.06)
    assert found["eight_bit_error"] <= found["four_bit_error"]
    assert rope(subject)["rope_error"] < 1e-5  # float32, at angles below 100 radians


def test_the_table_in_data_has_every_family_and_only_mlx_lms_own_errors():
    frame = pl.read_parquet(every_family.RESULTS / "families.parquet")
    assert frame["family"].to_list() == every_family.families()
    assert (every_family.RESULTS / "families.md").read_text() == every_family.page(frame)
    assert {*frame.filter(pl.col("raised").is_not_null())["family"]} == {"olmo"}
    rows = [*frame.iter_rows(named=True)]
    assert {row["family"]: every_family.wrong(row) for row in rows if every_family.wrong(row)} == {}
    readme = " ".join((every_family.RESULTS.parents[1] / "README.md").read_text().split())
    count = every_family.counts(frame)["codes"]
    assert f"{count} of mlx-lm's {frame.height} [families](data/results/families.md) are read from codes" in readme


def test_a_family_that_fails_is_a_row(tmp_path):
    every_family.measured("no_such_family", tmp_path)
    said = "ModuleNotFoundError: No module named 'mlx_lm.models.no_such_family'"
    assert every_family.row_in(tmp_path, "no_such_family") == {"family": "no_such_family", "raised": said}


def test_a_family_that_ends_the_process_is_a_row_and_the_next_ones_get_a_new_process(tmp_path, monkeypatch):
    starts = []

    def run(command, **_):
        starts.append(command[command.index("--here") + 1 : command.index("--into")])
        for name in starts[-1]:
            (tmp_path / f"{name}.json").write_text(
                json.dumps({"family": name} | ({"doing": name} if "in" in name else {}))
            )
            if "in" in name:
                return SimpleNamespace(returncode=-6)
        return SimpleNamespace(returncode=0)

    (tmp_path / "kept.json").write_text("{}")
    monkeypatch.setattr(subprocess, "run", run)
    every_family.measure_all(["kept", "one", "in own", "in codes", "two"], tmp_path)
    assert starts == [["one", "in own", "in codes", "two"], ["in codes", "two"], ["two"]]
    assert every_family.unmeasured(["kept", "one", "in own", "in codes", "two"], tmp_path) == []
    assert every_family.row_in(tmp_path, "in codes")["faults"] == "in codes: it ends the process (SIGABRT)"
