"""One live chart, and the Vega module that draws it: built once on this machine, so that charts need no network."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import altair as alt
import anywidget
import ipywidgets
import platformdirs
import polars as pl
import traitlets as t
import vl_convert
from polars import selectors

from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically, write_parquet
from veloxlab.views import picture, theme
from veloxlab.views.spec import Rows, Spec, compact, data_names, describe, finite, join, split
from veloxlab.widgets.lifetime import Ending, loosen

STATIC = Path(__file__).parent / "static"
VEGALITE: str = max(vl_convert.get_vegalite_versions(), key=lambda newest: tuple(map(int, newest.split("."))))
PATIENCE = 1.0  # seconds that the output of a cell waits for measurements; a file waits longer
# params of a chart in which something can be picked, and the traits that hold the pick
PICKS = {"picked_layer": "picked"} | {name: name for name in ("picked_head", "picked_token", "picked_point")}
Frames = pl.DataFrame | Mapping[str, pl.DataFrame]


def bundle_name() -> str:
    """The bundle's file name, with all versions that its text depends on: ``"vega-vlc1.9.0.post1-vl6.4.js"``."""
    return f"vega-vlc{version('vl-convert-python')}-vl{VEGALITE}.js"


def ensure_bundle() -> Path:
    """Path of an ES module that exports ``vegaEmbed``, built if missing: in the user's cache, or a temporary folder."""
    name = bundle_name()
    cache = platformdirs.user_cache_path("veloxlab")
    if (cache / name).is_file():
        return cache / name
    # vl-convert also binds vega and vegaLite, but to null
    code = vl_convert.javascript_bundle("export { vegaEmbed };", vl_version=VEGALITE).encode()
    try:
        make_folder(cache)
    except InputError:  # a read-only home folder, usual in containers
        cache = Path(tempfile.mkdtemp(prefix="veloxlab-"))
    return write_atomically(cache / name, code)


class VegaRuntime(anywidget.AnyWidget):
    """The Vega bundle and the themes, sent once per kernel and shared by all charts."""

    SHARED = True  # not a part of one widget: see `lifetime.parts`
    _esm = "export default {};"
    _shared: ClassVar[VegaRuntime | None] = None
    _making: ClassVar[threading.Lock] = threading.Lock()

    version = t.Unicode().tag(sync=True)
    code = t.Unicode().tag(sync=True)
    themes = t.Dict().tag(sync=True)

    @classmethod
    def shared(cls) -> VegaRuntime:
        """Return the one runtime of this kernel, created at first use or after it was closed."""
        with cls._making:
            if cls._shared is None or cls._shared.comm is None:
                bundle = ensure_bundle()
                themes = {mode: theme.colours(mode) for mode in theme.INK}
                cls._shared = cls(version=bundle.stem, code=bundle.read_text("utf-8"), themes=themes)
            return cls._shared


class ChartView(Ending, anywidget.AnyWidget):
    """Show a chart, and change its numbers without drawing it again.

    ``chart``: an Altair chart of fixed width. If it has a param ``picked_layer``, a click on a mark picks its
    ``layer``; the same with ``picked_head`` (``head``), ``picked_token`` (``position``), ``picked_point`` (``point``).
    ``summary``: a line of text for outputs without a picture; by default the title and the number of rows.
    ``picked``: the layer marked at first. ``settle``, for a chart of a page: a function that waits until the chart
    shows the present settings. Files wait for it, and a cell shows a copy of the chart that does not change later.

    >>> view = ChartView(error_map(frame))
    >>> view.put(other_frame, caption="4 bits")  # same chart, other numbers: about a millisecond
    >>> link(view, ChartView(bit_allocation(bits)))  # a layer picked in one is marked in the other
    """

    # text, not a path: anywidget watches a path, and its signal would keep every chart alive
    _esm = (STATIC / "chart_view.js").read_text("utf-8")
    _css = (STATIC / "chart_view.css").read_text("utf-8")

    runtime = t.Instance(VegaRuntime).tag(sync=True, **ipywidgets.widget_serialization)
    spec = t.Dict().tag(sync=True)
    content = t.Dict().tag(sync=True)
    picked = t.Int(None, allow_none=True, help="the picked layer; set it from Python or by a click").tag(sync=True)
    picked_head = t.Int(None, allow_none=True, help="the picked KV head").tag(sync=True)
    picked_token = t.Int(None, allow_none=True, help="the picked token, by its position").tag(sync=True)
    picked_point = t.Int(None, allow_none=True, help="the picked cache, by its number").tag(sync=True)
    note = t.Dict(help="the line above the chart: its purpose, and the kind of its numbers").tag(sync=True)

    _numbers: ClassVar[itertools.count[int]] = itertools.count(1)

    def __init__(
        self,
        chart: alt.TopLevelMixin | Spec,
        *,
        summary: str = "",
        picked: int | None = None,
        settle: Callable[..., object] | None = None,
    ) -> None:
        self.summary, self._settle = summary, settle
        self._changing = threading.RLock()
        self._links: list[ipywidgets.Widget] = []
        self._bare: Spec = {}
        self._data: dict[str, Rows | pl.DataFrame] = {}  # by dataset name, in the chart's order
        self._columns: dict[str, set[str]] = {}  # of the chart's first rows, by dataset name
        super().__init__(runtime=VegaRuntime.shared(), picked=picked, **self._state_of(chart, revision=1))
        self.on_msg(self._answer)
        loosen(self)

    @property
    def revision(self) -> int:
        """The number of the newest content."""
        return int(self.content["revision"])

    def show(self, chart: alt.TopLevelMixin, *, summary: str | None = None) -> None:
        """Show another chart, and a ``summary`` if given. If only numbers differ, the page patches the old chart."""
        with self._changing:
            state = self._state_of(chart, revision=self.revision + 1)
            self.summary = self.summary if summary is None else summary
            self.spec, self.content = state["spec"], state["content"]

    def put(self, frames: Frames | None = None, /, *, summary: str | None = None, **params: Any) -> None:
        """Change rows and params of the present chart, for instance ``caption="3 bits"``.

        ``frames`` are rows for the chart's first dataset, or frames by dataset name, with the columns of the chart's
        own frame. Without a ``summary`` the old line of text stays.
        """
        with self._changing:
            if isinstance(frames, pl.DataFrame):
                frames = {next(iter(self._data), None) or next(data_names(self._bare), "data-0"): frames}
            changed = dict(frames or {})
            known = {"dataset": {*data_names(self._bare)}, "param": {*self.content["params"]}}
            for kind, given in (("dataset", changed), ("param", params)):
                for name in sorted({*given} - known[kind]):
                    names = ", ".join(sorted(known[kind])) or "none"
                    raise InputError(f"This chart has no {kind} {name!r}: it has {names}.")
            payloads = {name: _payload(rows, self._columns.get(name, ())) for name, rows in changed.items()}
            self._data |= changed
            self.summary = self.summary if summary is None else summary
            self.content = {
                **self.content,
                "datasets": self.content["datasets"] | payloads,
                "params": self.content["params"] | {name: finite(value) for name, value in params.items()},
                "revision": self.revision + 1,
            }

    def to_dict(self) -> Spec:
        """The present chart: a Vega-Lite spec with its rows, params and picks."""
        with self._changing:
            picked = {param: getattr(self, trait) for param, trait in PICKS.items()}
            return join(self._bare, self._rows(), self.content["params"] | picked)

    @property
    def frame(self) -> pl.DataFrame:
        """The present rows of the chart's first dataset."""
        with self._changing:
            if not self._data:
                raise InputError("This chart has no rows yet: give it some with put(frame).")
            return pl.DataFrame(next(iter(self._data.values())), infer_schema_length=None)

    def still(self) -> ChartView:
        """A copy that does not change with the page, for a cell: the text beside it stays true."""
        self._settled(PATIENCE)
        copy = ChartView(self.to_dict(), summary=self.summary, picked=self.picked)
        for trait in PICKS.values():
            setattr(copy, trait, getattr(self, trait))
        return copy

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV, and return the file's path."""
        self._settled()
        return write_atomically(path, self.frame.write_csv().encode())

    def to_parquet(self, path: str | Path) -> Path:
        """Write the rows as Parquet, and return the file's path."""
        self._settled()
        return write_parquet(path, self.frame)

    def to_png(self, path: str | Path, *, width: int = 2 * picture.WIDTH) -> Path:
        """Write the picture as PNG with ``width`` in pixels, and return the file's path."""
        self._settled()
        return write_atomically(path, picture.png(self.to_dict(), width=width))

    def to_svg(self, path: str | Path) -> Path:
        """Write the picture as SVG, and return the file's path."""
        self._settled()
        return write_atomically(path, picture.svg(self.to_dict()).encode())

    def __repr__(self) -> str:
        with self._changing:
            return self.summary or describe(self._bare, self._rows())

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return super()._repr_mimebundle_(**kwargs) if self._settle is None else self.still()._repr_mimebundle_(**kwargs)

    def _settled(self, *timeout: float) -> None:
        if self._settle is not None:
            self._settle(*timeout)

    def _rows(self) -> dict[str, Rows]:
        return {name: _rows_of(payload) for name, payload in self.content["datasets"].items()}

    def _state_of(self, chart: alt.TopLevelMixin | Spec, *, revision: int) -> dict[str, Any]:
        spec = chart if isinstance(chart, dict) else chart.to_dict(validate=False)  # valid parts; a slider waits
        bare, rows, params = split(spec)
        if bare != self._bare:
            self._bare, self._id = bare, next(self._numbers)
        self._data = {**rows}
        self._columns = {name: {*table[0]} for name, table in rows.items() if table}
        datasets = {name: _payload(table) for name, table in rows.items()}
        params = {name: value for name, value in params.items() if name not in PICKS}
        return {
            "spec": {"id": self._id, "json": compact(bare)},
            "content": {"spec": self._id, "datasets": datasets, "params": params, "revision": revision},
        }

    def _answer(self, _: object, message: object, __: object) -> None:
        """Send the bundle to a page that has no access to the shared runtime (marimo, Colab)."""
        if message == {"wants": "runtime"}:
            self.send({"runtime": {name: getattr(self.runtime, name) for name in ("version", "code", "themes")}})


def link(*views: ipywidgets.Widget) -> None:
    """Share the trait ``picked`` of views in the page itself: this works while the kernel is busy or has ended."""
    for view in views[1:]:
        joined = ipywidgets.jslink((views[0], "picked"), (view, "picked"))
        for end in (views[0], view):
            end._links = [*getattr(end, "_links", ()), joined]  # the link ends when one of the two views ends
        loosen(joined)


def _payload(table: Rows | pl.DataFrame, columns: Iterable[str] = ()) -> bytes:
    """Rows as JSON: a frame by columns, which takes a third of the bytes, and only ``columns`` if they are given.

    Polars writes NaN and infinities as null, in Rust.
    """
    if not isinstance(table, pl.DataFrame):
        return compact(table).encode()
    wanted = table.select(name for name in table.columns if name in columns) if columns else table
    digits = selectors.float().round_sig_figs(picture.DIGITS)
    return wanted.with_columns(digits).select(pl.all().implode()).write_json()[1:-1].encode()


def _rows_of(payload: bytes) -> Rows:
    """Read what `_payload` wrote."""
    found = json.loads(payload)
    return pl.DataFrame(found).to_dicts() if isinstance(found, dict) else found
