"""Questions about a text that a cache holds, and small question sets that are made from a seed without any data set.

A context is read first, and the question after it in another call, so the question sees the context through the
cache. The facts are at the beginning of the context, followed by unrelated text, so that a window
does not hold the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from veloxlab.checks import WORDS, check_fields, checked, instance, many
from veloxlab.errors import InputError
from veloxlab.measure.generation import DEPTHS, DIGITS, PLAIN, QUESTION, hidden
from veloxlab.texts import Tokenizer

ASKED = 4  # questions for each context
CHOICES = 4
EXAMPLE = (
    '{"context": "Ann lives in Rome.", "question": "Ann lives in", "answer": "Rome", "choices": ["Rome", "Paris"]}'
)
FIELDS = ("context", "question", "answer")  # required in a line
SHOWN = 24  # sums that are shown before the question

_NAMES = (
    "Anna Boris Clara David Emma Felix Grace Henry Irene James Karen Lucas Maria Nora Oscar Paula Robert Sarah Thomas "
    "Victor"
)
_COLOURS = "red blue green yellow black white brown pink orange purple grey gold"
_WORDS = (
    "river stone apple window garden bridge candle silver market doctor winter pencil island basket thunder mirror "
    "carpet button forest hammer ladder needle orange pillow rocket saddle tunnel valley wagon anchor blanket camera "
    "desert engine flower guitar helmet jacket kitchen lemon"
)


@dataclass(frozen=True)
class Question:
    """A question about a context.

    ``context``: the text in the cache when ``question`` is read. ``answer``: the text that should come next, with its
    space. With ``choices``, which contain ``answer``, the most probable one is the model's answer; otherwise it
    generates.
    """

    context: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, context=WORDS, question=WORDS, answer=WORDS, choices=many(WORDS, empty=True))
        for name in ("context", "question", "answer"):
            if not getattr(self, name).strip():
                raise InputError(f"The {name} of a question is empty: give some words.")
        if self.choices and self.answer not in self.choices:
            raise InputError(f"The answer {self.answer!r} is none of the choices: name it among them.")


@dataclass(frozen=True)
class Task:
    """Questions of one kind. Neighbouring questions with the same context share it: it is read once for all of them."""

    name: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        check_fields(self, name=WORDS, questions=many(instance(Question, "a vl.measure.Question")))

    @classmethod
    @checked(text=WORDS, name=WORDS)
    def of_lines(cls, text: str, name: str = "own") -> Self:
        """Return a task from your own questions, one line of JSON each, with fields of `Question`, such as `EXAMPLE`.

        ``choices`` may be missing. An answer or choice that begins without a space gets one, unless the question ends
        with a space or a line break. Raises `InputError` that names the line.
        """
        questions = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                questions += [_of_line(line)] if line.strip() else []
            except InputError as error:
                raise InputError(f"Line {number} is no question. {error}") from None
        if not questions:
            raise InputError(f"There are no questions: give a line of JSON for each, such as {EXAMPLE}.")
        return cls(name, tuple(questions))

    @property
    def chance(self) -> float:
        """Share of right answers by guessing; 0 if the answer is generated."""
        return float(np.mean([1 / len(each.choices) if each.choices else 0.0 for each in self.questions]))


def _of_line(line: str) -> Question:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"It is not JSON ({error}): give a line such as {EXAMPLE}.") from None
    if not isinstance(given, dict) or not {*FIELDS} <= {*given} <= {*FIELDS, "choices"}:
        raise InputError(f"It needs {', '.join(FIELDS)}, and may have choices: give a line such as {EXAMPLE}.")
    found = Question(**given)

    def spaced(words: str) -> str:
        return words if found.question[-1].isspace() or words[:1].isspace() else f" {words}"

    return replace(found, answer=spaced(found.answer), choices=tuple(map(spaced, found.choices)))


Asked = tuple[str, str, list[str]]  # question, answer, and all possible answers
Items = Callable[[np.random.Generator], tuple[str, list[Asked]]]  # makes the beginning of a context, and its questions


def _copy(random: np.random.Generator) -> tuple[str, list[Asked]]:
    words = [str(word) for word in random.permutation(_WORDS.split())]
    places = random.choice(np.arange(2, len(words) - 1), ASKED, replace=False)
    asked = [(f"\n\nThe list again: {words[i - 2]}, {words[i - 1]}, {words[i]},", words[i + 1], words) for i in places]
    return f"A list of words: {', '.join(words)}.\n\n", asked


def _lookup(random: np.random.Generator) -> tuple[str, list[Asked]]:
    colours = _COLOURS.split()
    doors = {str(name): str(random.choice(colours)) for name in random.permutation(_NAMES.split())}
    facts = [f"The door of {name}'s house is {colour}." for name, colour in doors.items()]
    names = [str(name) for name in random.choice(list(doors), ASKED, replace=False)]
    asked = [(f"\n\nTo repeat: The door of {name}'s house is", doors[name], colours) for name in names]
    return f"{' '.join(facts)}\n\n", asked


def _arithmetic(random: np.random.Generator) -> tuple[str, list[Asked]]:
    pairs = [divmod(int(pair), 10) for pair in random.permutation(100)][: ASKED + SHOWN]
    shown = "".join(f"{one} + {other} = {one + other}\n" for one, other in pairs[ASKED:])
    near = {one + other: [str(n) for n in range(max(0, one + other - 3), one + other + 4)] for one, other in pairs}
    asked = [(f"\n\n{one} + {other} =", str(one + other), near[one + other]) for one, other in pairs[:ASKED]]
    return f"{shown}\n", asked


_ITEMS: dict[str, Items] = {"copy": _copy, "lookup": _lookup, "arithmetic": _arithmetic}
BUILT_IN = (*_ITEMS, "passkey")
"""Tasks by name: the next word of a list, the colour of a person's door, sums of two digits, a number in a text."""


def build(name: str, tokenizer: Tokenizer, filler: list[int], *, questions: int, context: int, seed: int) -> Task:
    """Make a task of `BUILT_IN` with contexts of ``context`` tokens, filled up with ``filler``.

    Raises `InputError` if a context is too short for the questions, or longer than the filler.
    """
    random = np.random.default_rng([seed, *name.encode()])
    build = _passkeys if name == "passkey" else _asked
    return Task(name, tuple(build(name, random, tokenizer, filler, questions, context)))


def _asked(
    name: str, random: np.random.Generator, tokenizer: Tokenizer, filler: list[int], count: int, context: int
) -> Iterator[Question]:
    while count > 0:
        first, asked = _ITEMS[name](random)
        room = context - len(tokenizer.encode(first, **PLAIN))
        if room < 1:
            raise InputError(f"context={context} has no room for the task {name!r}: give {context - room + 1} or more.")
        if room > len(filler):
            raise InputError(f"context={context} is longer than the text: give a longer text or less.")
        whole = first + str(tokenizer.decode(filler[:room]))
        for words, answer, answers in asked[:count]:
            others = random.choice([each for each in answers if each != answer], CHOICES - 1, replace=False)
            choices = random.permutation([answer, *map(str, others)])
            yield Question(whole, words, f" {answer}", tuple(f" {choice}" for choice in choices))
        count -= ASKED


def _passkeys(
    name: str, random: np.random.Generator, tokenizer: Tokenizer, filler: list[int], count: int, context: int
) -> Iterator[Question]:
    for i in range(count):
        number = str(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
        ids = hidden(tokenizer, filler, context, DEPTHS[i % len(DEPTHS)], number)
        yield Question(str(tokenizer.decode(ids)), QUESTION, f" {number}")
