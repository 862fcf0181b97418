"""Bad input of every public chart and caption gives one sentence. The table comes from their signatures."""

import inspect
from typing import Any

import polars as pl
import pytest

import veloxlab as vl
from veloxlab.allocate.search import SEARCHED
from veloxlab.errors import InputError
from veloxlab.views.given import guarded

NAN = float("nan")
WORDS: list[Any] = [5, None, ["x"], b"x", True]
NUMBERS: list[Any] = ["x", NAN, [4], {}, True]
PAIRS: list[Any] = [5, "ab", (1,), (1, 2, 3), (2, 1), (1, NAN), ("a", "b"), {1: 2, 3: 4}]
FRAMES: list[Any] = [5, "x", None, {}, [1], {"layer": [1]}, pl.Series([1]), pl.DataFrame(), pl.DataFrame({"a": [1.0]})]
BAD: dict[str, list[Any]] = {
    "pl.DataFrame": [*FRAMES, pl.DataFrame({"layer": ["x"]}), pl.LazyFrame({"layer": [1]})],
    "str": WORDS,
    "int": [*NUMBERS, 5.5],
    "float": [*NUMBERS, float("inf")],
    "columns.Domain": PAIRS,
    "tuple[float, float]": PAIRS,
    "Literal['bits', 'held_bytes']": [*WORDS, "tokens"],
}
"""By annotations; None is another bad value if it is not the default."""


def complaint(call: Any, name: str, value: object, begin: str = "") -> str:
    """Return the fault in a call's reaction to a value; empty if it raises one sentence with this begin."""
    try:
        call()
    except InputError as error:
        said = str(error)
        one = "\n" not in said and said.endswith(".") and len(said) <= 500 and said.startswith(begin)
        return "" if one else f"{name}={value!r} says {said!r}"
    except Exception as error:  # noqa: BLE001 - any other is what this test is about
        return f"{name}={value!r} raises {type(error).__name__}: {error}"[:200]
    return f"{name}={value!r} is accepted"


@pytest.mark.parametrize("name", vl.views.__all__)
def test_bad_input_gets_one_sentence(name):
    function, wrong = getattr(vl.views, name), []
    parameters = inspect.signature(function).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty]
    good = dict.fromkeys(required, pl.DataFrame({"layer": [1]}))
    for p in parameters.values():
        kind = p.annotation.removesuffix(" | None")
        for value in BAD[kind]:
            if value is not None or p.annotation == kind:
                begin = "" if kind == "pl.DataFrame" else p.name
                call = lambda p=p, value=value: function(**good | {p.name: value})  # noqa: E731
                wrong.append(complaint(call, p.name, value, begin))
    wrong = [said for said in wrong if said]
    assert not wrong, f"{len(wrong)} of {name}:\n" + "\n".join(wrong)


def test_an_empty_frame_of_the_right_columns_is_refused():
    for function in (vl.views.pareto_caption, vl.views.pareto_front):
        with pytest.raises(InputError, match="needs at least one row: the frame is empty"):
            function(pl.DataFrame(schema=SEARCHED))


def test_every_type_of_argument_has_a_check():
    def chart(frame: "pl.DataFrame", spin: "complex" = 1j) -> str:
        return ""

    with pytest.raises(KeyError, match="complex"):
        guarded(chart)
