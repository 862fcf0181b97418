"""The Vega ES module, made once on this machine so that charts need no network and no third-party file is shipped."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import platformdirs
import vl_convert

from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically

SNIPPET = "export { vegaEmbed };"  # vl-convert binds vega and vegaLite too, but to null


def bundle_name() -> str:
    """Name the bundle's file after everything that decides its text.

    Returns
    -------
    str
        For instance ``"vega-vlc1.9.0.post1-vl6.4.js"``.
    """
    return f"vega-vlc{version('vl-convert-python')}-vl{_newest_vegalite()}.js"


def ensure_bundle() -> Path:
    """Make the Vega bundle if this machine has none yet.

    The file goes to the user's cache folder, or to a private temporary one where that cannot be written.

    Returns
    -------
    pathlib.Path
        An ES module that exports ``vegaEmbed``.
    """
    name = bundle_name()
    cache = platformdirs.user_cache_path("veloxlab")
    if (cache / name).is_file():
        return cache / name
    code = vl_convert.javascript_bundle(SNIPPET, vl_version=_newest_vegalite())
    try:
        return _write(cache, name, code)
    except InputError:  # a read-only home, as containers have it
        return _write(Path(tempfile.mkdtemp(prefix="veloxlab-")), name, code)


def _newest_vegalite() -> str:
    newest: str = max(vl_convert.get_vegalite_versions(), key=lambda v: tuple(map(int, v.split("."))))
    return newest


def _write(folder: Path, name: str, text: str) -> Path:
    path = make_folder(folder) / name
    write_atomically(path, text.encode())
    return path
