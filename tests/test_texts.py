"""The shipped texts: their content, and the folders where they are searched."""

from __future__ import annotations

import re

import pytest

from veloxlab import texts
from veloxlab.errors import InputError
from veloxlab.texts import excerpt

TITLE = re.compile(r"^ = [^=]+ = $", re.MULTILINE)


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [
        ("test", "Robert <unk>", "1933 Treasure Coast hurricane"),
        ("validation", "Homarus gammarus", "Papa <unk>"),
    ],
)
def test_excerpt_is_six_whole_articles(split, first, last):
    text = excerpt(split)
    titles = TITLE.findall(text)
    assert text.startswith(f" = {first} = \n")
    assert (len(titles), titles[-1]) == (6, f" = {last} = ")
    assert text.endswith(" . \n")
    assert 95_000 < len(text) < 115_000


def test_test_split_is_the_default():
    assert excerpt() == excerpt("test")


def test_splits_share_no_paragraph():
    paragraphs = [{line for line in excerpt(split).splitlines() if len(line) > 100} for split in ("test", "validation")]
    assert paragraphs[0].isdisjoint(paragraphs[1])


def test_text_has_the_documented_number_of_tokens(smollm2):
    _, tokenizer = smollm2
    assert [len(tokenizer.encode(excerpt(split))) // 1000 for split in ("test", "validation")] == [25, 28]


def test_unknown_split_is_refused():
    with pytest.raises(InputError, match="split='train' cannot be used: give 'test', 'validation' or 'calibration'"):
        excerpt("train")


def test_files_inside_the_package_come_before_those_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "veloxlab"
    (package / "data").mkdir(parents=True)
    (tmp_path / "site" / "data").mkdir()
    monkeypatch.setattr(texts, "PACKAGE", package)
    assert texts.shipped_folder("data") == package / "data"


def test_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PACKAGE", tmp_path / "veloxlab")
    with pytest.raises(InputError, match="The folder data of veloxlab is missing"):
        excerpt()


def test_missing_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "veloxlab" / "data").mkdir(parents=True)
    monkeypatch.setattr(texts, "PACKAGE", tmp_path / "veloxlab")
    with pytest.raises(InputError, match=r"wikitext2_test_excerpt\.txt is missing"):
        excerpt()
