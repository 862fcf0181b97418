"""The Vega bundle is made once, completely or not at all, in a folder with write access."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
import vl_convert

from veloxlab.widgets.chart_view import bundle_name, ensure_bundle


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Replace the slow bundler, and return the list of requested versions."""
    versions: list[str] = []

    def bundle(snippet: str, vl_version: str) -> str:
        versions.append(vl_version)
        return f"// {snippet}"

    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    return versions


def cache_at(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda app: folder / app)


def test_the_bundle_is_made_once_and_leaves_no_partial_file(monkeypatch, tmp_path, made):
    cache_at(monkeypatch, tmp_path)
    first, second = ensure_bundle(), ensure_bundle()
    assert first == second == tmp_path / "veloxlab" / bundle_name()
    assert made == [max(vl_convert.get_vegalite_versions(), key=lambda v: tuple(map(int, v.split("."))))]
    assert "vegaEmbed" in first.read_text()
    assert list(first.parent.iterdir()) == [first]


def test_without_a_writable_cache_the_bundle_is_in_a_temporary_folder(monkeypatch, tmp_path, made):
    (tmp_path / "veloxlab").write_text("a file where the folder should be")
    cache_at(monkeypatch, tmp_path)
    path = ensure_bundle()
    assert path.name == bundle_name()
    assert tmp_path not in path.parents
    assert "vegaEmbed" in path.read_text()
    path.unlink()
    path.parent.rmdir()


def test_a_failed_bundler_leaves_nothing_behind(monkeypatch, tmp_path):
    def refuse(snippet: str, vl_version: str) -> str:
        raise RuntimeError(vl_version)

    cache_at(monkeypatch, tmp_path)
    monkeypatch.setattr(vl_convert, "javascript_bundle", refuse)
    with pytest.raises(RuntimeError):
        ensure_bundle()
    assert not list(tmp_path.rglob("*.js"))


def test_the_name_changes_with_the_version_of_the_bundler(monkeypatch):
    before = bundle_name()
    monkeypatch.setattr("veloxlab.widgets.chart_view.version", lambda package: "99.0")
    assert bundle_name() != before
