"""A registered method works like ours until it is unregistered, and an invalid one is refused."""

import dataclasses
import importlib
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.allocate.ratequant import kept_rate_budget
from veloxlab.cache.saved import describe_codec
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.method import Method
from veloxlab.codecs.parts.packing import Row, pack, packed, unpack
from veloxlab.codecs.saving import find_class
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError
from veloxlab.measure.compare import compare
from veloxlab.views import theme
from veloxlab.widgets.selection import Fitting

IDS = [i * i % 90 for i in range(80)]


@dataclass(frozen=True)
class Absmax(Codec):
    """Round to the nearest of 2**bits - 1 steps between plus and minus a vector's largest magnitude."""

    head_dim: int
    bits: int

    @property
    def layout(self):
        return {"codes": packed(self.head_dim, self.bits), "step": Row(mx.float16, 1)}

    @property
    def top(self):
        return 2 ** (self.bits - 1) - 1

    def encode(self, x, start=0):
        check_vectors(x, self.head_dim)
        step = (mx.abs(x.astype(mx.float32)).max(axis=-1, keepdims=True) / self.top).astype(mx.float16)
        rounded = mx.round(x / mx.where(step == 0, 1.0, step.astype(mx.float32)))
        codes = mx.clip(rounded, -self.top, self.top) + self.top
        return Code({"codes": pack(codes.astype(mx.uint32), self.bits), "step": step}, start)

    def expand(self, code):
        return unpack(code.arrays["codes"], self.bits, self.head_dim).astype(mx.float32) - self.top

    def scales(self, code):
        return code.arrays["step"].astype(mx.float32)


@dataclass(frozen=True, eq=False)
class Centred(Absmax):
    """As `Absmax`, about a mean that is learned."""

    mean: mx.array | None = None

    def fit(self, sample):
        return replace(self, mean=sample.x.mean(axis=(0, 2), keepdims=True)[0])

    def encode(self, x, start=0):
        return super().encode(x - self.mean, start)

    def from_codes(self, y):
        raise NotImplementedError  # not used here


def method(**changes) -> Method:
    usual = Method(
        id="absmax",
        name="Absmax",
        paper="none",
        calibrated=False,
        bits=range(2, 9),
        stored="b bits a coordinate, one 16-bit step a vector",
        options=(),
        build=lambda head_dim, bits, role: Absmax(head_dim, bits),
        codecs=(Absmax,),
    )
    return dataclasses.replace(usual, **changes)


@pytest.fixture
def absmax():
    before = list(METHODS)
    yield vl.register(method())
    vl.codecs.unregister("absmax")
    assert list(METHODS) == before


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def test_a_method_is_listed_and_found_until_it_is_unregistered(model):
    before = vl.methods()
    vl.register(method())
    try:
        assert vl.methods()["id"].to_list() == [*before["id"], "absmax"]
    finally:
        vl.codecs.unregister("absmax")
    assert vl.methods().equals(before)
    with pytest.raises(InputError, match="Unknown method 'absmax'"):
        vl.make_cache(model, "absmax")


def test_an_array_without_the_values_it_scales_is_refused():
    @dataclass(frozen=True)
    class Silent(Absmax):
        scales = Codec.scales

    @dataclass(frozen=True)
    class Said(Silent):
        expand_scales = True

        def expand(self, code):
            return super().expand(code) * code.arrays["step"].astype(mx.float32)

    x = mx.random.normal((1, 2, 5, 16), key=mx.random.key(0))
    code = Absmax(16, 8).encode(x)
    with pytest.raises(
        InputError, match=r"Silent stores 'step' and does not say what it scales: define scales\(code\)"
    ):
        Silent(16, 8).decode(code)
    assert mx.allclose(Said(16, 8).decode(code), Absmax(16, 8).decode(code)).item()


def test_caches_plans_reports_and_measurements_accept_it(absmax, model, tmp_path):
    cache = vl.make_cache(model, "absmax", bits=4, sinks=2, window=8)
    for part in (IDS[:-1], IDS[-1:]):  # as mlx-lm's generator does
        model(mx.array([part]), cache=cache)
    mx.eval([layer.state for layer in cache])
    assert vl.report(cache)["key_bits"][0] == 4.25
    planned = vl.measure.plan_memory(model, "absmax", bits=4, sinks=2, window=8, context=len(IDS))
    assert planned.filter(cache="absmax K4 V4")["bytes"].sum() == sum(layer.nbytes for layer in cache)
    plan = vl.Plan.uniform(model, "absmax", bits=3)
    assert vl.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert theme.look_of("absmax K4 V4")[0] == theme.OTHER
    text = vl.measure.side_by_side(model, Plain(), IDS, "absmax", bits=8, tokens=4, window=4)
    assert text["kl"].max() < 1e-3


def test_a_saved_cache_is_restored_while_its_method_is_registered(model, tmp_path):
    vl.register(method())
    try:
        cache = vl.make_cache(model, "absmax", bits=4, sinks=2, window=8)
        model(mx.array([IDS]), cache=cache)
        file = tmp_path / "prompt.safetensors"
        save_prompt_cache(str(file), cache)
        again = load_prompt_cache(str(file))
        logits = [model(mx.array([[7]]), cache=one) for one in (cache, again)]
        assert mx.array_equal(*logits)
    finally:
        vl.codecs.unregister("absmax")
    with pytest.raises(
        InputError, match="No method here has a codec called 'absmax.Absmax': register its method first"
    ):
        load_prompt_cache(str(file))


def cell() -> Method:
    """Return the method of a notebook's cell: a class that is new at each run, with the same name and fields."""

    @dataclass(frozen=True)
    class Rounded(Absmax):
        pass

    return method(build=lambda head_dim, bits, role: Rounded(head_dim, bits), codecs=(Rounded,))


ELEVENTH = """
from dataclasses import dataclass

import mlx.core as mx

from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.method import Method
from veloxlab.codecs.parts.packing import Row


@dataclass(frozen=True)
class Halves(Codec):
    head_dim: int

    @property
    def layout(self):
        return {"halves": Row(mx.float16, self.head_dim)}

    def encode(self, x, start=0):
        check_vectors(x, self.head_dim)
        return Code({"halves": x.astype(mx.float16)}, start)

    def expand(self, code):
        return code.arrays["halves"].astype(mx.float32)


METHOD = Method(
    id="halves",
    name="Halves",
    paper="none",
    calibrated=False,
    bits=range(16, 17),
    stored="16 bits a coordinate",
    options=(),
    build=lambda head_dim, bits, tensor: Halves(head_dim),
    codecs=(Halves,),
    colour="#708238",
    mark="cross",
)
"""


def test_an_eleventh_method_is_one_file_and_one_line(model, tmp_path, monkeypatch):
    """Its declarations are enough for caches, plans, the laboratory's list, charts and comparisons."""
    (tmp_path / "halves.py").write_text(ELEVENTH)
    monkeypatch.syspath_prepend(tmp_path)
    vl.register(importlib.import_module("halves").METHOD)
    try:
        cache = vl.make_cache(model, "halves", bits=16)
        model(mx.array([IDS]), cache=cache)
        assert vl.report(cache)["key_bits"][0] == 16
        plan = vl.Plan.load(vl.Plan.uniform(model, "halves", bits=16).save(tmp_path / "plan.json"))
        assert {type(layer.key_codec).__name__ for layer in vl.make_cache(model, plan)} == {"Halves"}
        planned = vl.measure.plan_memory(model, "halves", bits=16, context=len(IDS))
        assert planned.filter(cache="halves K16 V16")["bytes"].sum() > 0
        assert "halves" in Fitting(model, Plain()).methods
        assert (theme.look_of("halves K16 V16")[0], theme.look_of("halves K16 V16")[1]) == ("#708238", "cross")
        compared = compare(model, Letters(), bits=(16,), text=TEXT, tokens=64, windows=1)
        assert "halves 16 bit" in compared["name"].to_list()
    finally:
        vl.codecs.unregister("halves")


@pytest.mark.parametrize("meanwhile", ["replaced", "taken back"])
def test_a_cache_of_an_unregistered_method_is_saved_under_its_id_and_read_again(meanwhile, model, tmp_path):
    vl.register(cell())
    try:
        cache = vl.make_cache(model, "absmax", bits=4, sinks=2, window=8)
        model(mx.array([IDS]), cache=cache)
        file = tmp_path / "prompt.safetensors"
        if meanwhile == "replaced":
            vl.register(cell(), replace=True)
            save_prompt_cache(str(file), cache)
        else:
            vl.codecs.unregister("absmax")
            save_prompt_cache(str(file), cache)
            with pytest.raises(InputError, match="No method here has a codec called 'absmax.Rounded'"):
                load_prompt_cache(str(file))
            vl.register(cell())
        again = load_prompt_cache(str(file))
        assert type(again[0].key_codec) is METHODS["absmax"].codecs[0] is not type(cache[0].key_codec)
        logits = [model(mx.array([[7]]), cache=one) for one in (cache, again)]
        assert mx.array_equal(*logits)
    finally:
        vl.codecs.unregister("absmax")


def test_a_cache_of_another_version_of_a_registered_method_is_refused(model, tmp_path):
    file = tmp_path / "prompt.safetensors"
    vl.register(cell())
    try:
        cache = vl.make_cache(model, "absmax", bits=4)
        vl.register(replace(cell(), version=2), replace=True)
        save_prompt_cache(str(file), cache)
        with pytest.raises(InputError, match="codes of absmax of version 1, and here they are of version 2"):
            load_prompt_cache(str(file))
    finally:
        vl.codecs.unregister("absmax")


def test_a_class_of_ours_is_always_found_by_its_file():
    codec = vl.register(method(build=METHODS["turboquant"].build, codecs=(TurboQuant,))).codec(64, 4, "keys")
    said, _ = describe_codec(codec)
    assert said["class"] == "turboquant.TurboQuant"
    vl.codecs.unregister("absmax")
    assert find_class(describe_codec(codec)[0]["class"]) is TurboQuant


class Plain:
    def encode(self, text):
        return [ord(c) % 90 for c in text]

    def decode(self, ids):
        return "".join(chr(32 + i) for i in ids)


def test_a_registered_method_is_fitted_each_time(model, tmp_path):
    """A file of an older calibration could not record a change of the cell."""
    learned = method(calibrated=True, build=lambda head_dim, bits, role: Centred(head_dim, bits), codecs=(Centred,))
    vl.register(learned)
    try:
        text = "".join(chr(32 + i * i % 90) for i in range(400))
        calibration = vl.calibrate(model, Plain(), "absmax", text, bits=4, tokens=100, folder=tmp_path)
        assert calibration.codec("absmax", 0, "keys", 4).mean.shape == (2, 1, 64)  # type: ignore[attr-defined]
        assert list(tmp_path.iterdir()) == []
    finally:
        vl.codecs.unregister("absmax")


def test_a_cell_that_runs_again_replaces_its_method(absmax):
    with pytest.raises(InputError, match=r"'absmax' is registered already: vl.codecs.unregister"):
        vl.register(method())
    assert vl.register(method(name="Absmax again"), replace=True) is METHODS["absmax"]
    assert vl.methods()["name"].to_list()[-1] == "Absmax again"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id": "turboquant"}, "The method 'turboquant' comes with veloxlab and stays as it is"),
        ({"id": "Abs max"}, "'Abs max' is no id of a method"),
        ({"id": ""}, "'' is no id of a method"),
        ({"codecs": ()}, "'absmax' names no classes"),
        ({"codecs": (int,)}, "<class 'int'> is no frozen dataclass"),
        ({"bits": range(0)}, "'absmax' takes no bits"),
    ],
)
def test_an_invalid_method_is_refused(changes, sentence):
    before = list(METHODS)
    for replaced in (False, True):
        with pytest.raises(InputError, match=sentence):
            vl.register(method(**changes), replace=replaced)
    assert list(METHODS) == before


def test_a_method_that_was_not_registered_cannot_be_unregistered():
    with pytest.raises(InputError, match="Unknown method 'absmax'"):
        vl.codecs.unregister("absmax")
    with pytest.raises(InputError, match="'none' comes with veloxlab and stays"):
        vl.codecs.unregister("none")


def test_its_measurements_are_repeated_because_its_code_can_change(absmax, model, tmp_path):
    measured = {"methods": ["absmax"], "text": TEXT, "sequences": 1, "tokens": 32, "bits": (3,), "folder": tmp_path}
    first = kept_rate_budget(model, Letters(), **measured)
    vl.register(method(build=lambda head_dim, bits, role: Absmax(head_dim, bits + 1)), replace=True)
    again = kept_rate_budget(model, Letters(), **measured)
    assert (again.curves["distortion"] < first.curves["distortion"]).all()
