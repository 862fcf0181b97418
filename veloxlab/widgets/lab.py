"""The laboratory: every view of one cache on pages of their own, which share what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ipywidgets
import polars as pl
import traitlets as t

from veloxlab.codecs import ROLES
from veloxlab.errors import InputError
from veloxlab.views.report import Section
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.pages.budget import BudgetTuner
from veloxlab.widgets.pages.cache import WIDTHS, Bits, CacheExplorer
from veloxlab.widgets.pages.compare import MeasuredPoints
from veloxlab.widgets.pages.errors import ErrorExplorer
from veloxlab.widgets.pages.generation import SideBySide
from veloxlab.widgets.pages.keys import KeyExplorer
from veloxlab.widgets.pages.memory import MemoryPlanner
from veloxlab.widgets.panel import Panel, ProgressBar, nearest
from veloxlab.widgets.traits import Whole, Words
from veloxlab.widgets.worker import Progress

NAMES = ("cache", "errors", "keys", "compare", "generation", "budget", "memory")
SELECTION = ("method", "layer", "head", *WIDTHS, "sinks", "window")  # a method before its widths


@dataclass(frozen=True)
class Page:
    """One page that is made when it is first opened.

    Attributes
    ----------
    title : on its tab.
    make : given what is chosen, by the names of its own traits; on the worker's thread.
    shares : traits that it and the laboratory have in common; ``bits`` are those of the keys or values that it shows.
    """

    title: str
    make: Callable[..., Panel]
    shares: tuple[str, ...]


class Lab(CacheExplorer):
    """See everything about one model's compressed cache, page by page, and take away what was found.

    The first page is that of a `CacheExplorer`, with its parameters. The others are made when they are first opened.
    Method, bits, layer and head are one choice for all pages. All work is done by one thread, with progress; each page
    can cancel it. Nothing here needs a network.

    Attributes
    ----------
    page : trait: the name of the open page, one of ``cache``, ``errors``, ``keys``, ``compare``, ``generation``,
        ``budget`` and ``memory``.
    head : trait: the chosen KV head.
    pages : the pages that were made, by name, each a widget of its own: `ErrorExplorer`, `KeyExplorer`, `SideBySide`,
        `BudgetTuner`, `MemoryPlanner`.
    method, key_bits, value_bits, sinks, window, layer, metric, measured, plan, errors, bits, memory, frontier : as
        `CacheExplorer` has them.

    Raises
    ------
    InputError : unknown method, bits out of range, a text that is too short.
    """

    NAME = "lab"
    WHERE = "The page Compare has every measured point."

    page = Words("cache", help="the open page")
    head = Whole(0, help="the chosen KV head")

    def _arrange(self) -> None:
        self._pages: dict[str, Panel] = {}  # never changed in place: the worker adds pages while others read them
        self._sharing = False
        given: dict[str, Any] = {"fitting": self._fitting, "worker": self.worker}
        both = self._model, self._tokenizer
        seen, whole = ("method", "layer", "head", "bits"), ("method", *WIDTHS, "sinks", "window")
        self._kinds = {
            "errors": Page("Errors", partial(ErrorExplorer, self._capture, **given), seen),
            "keys": Page("Keys and values", partial(KeyExplorer, self._capture, **given), seen),
            "generation": Page("Generation", partial(SideBySide, *both, **given), whole),
            "budget": Page("Budget", partial(BudgetTuner, *both, worker=self.worker), ("layer",)),
            "memory": Page("Memory", partial(MemoryPlanner, self._model, worker=self.worker), whole),
        }
        waiting = "<em>This page is made when what runs now is done.</em>"
        self._places = {
            name: ipywidgets.VBox([ipywidgets.HTML(waiting), ProgressBar(self.worker)]) for name in self._kinds
        }
        cache = [self._controls(), self._message, self.errors, self.bits, self.memory, self._code]
        places = {"cache": ipywidgets.VBox(cache), "compare": self._comparison(), **self._places}
        titles = {"cache": "Cache", "compare": "Compare"} | {name: kind.title for name, kind in self._kinds.items()}
        self._tabs = ipywidgets.Tab([places[name] for name in NAMES], titles=[titles[name] for name in NAMES])
        t.link((self, "page"), (self._tabs, "selected_index"), transform=(NAMES.index, lambda i: NAMES[i or 0]))
        self.observe(lambda _: self._open(), "page")
        self.observe(lambda _: self._bring(), SELECTION)
        self.children = [self._tabs]

    # pages ----------------------------------------------------------------------------------------------------------

    @property
    def pages(self) -> dict[str, Panel]:
        """The pages that were made and are not closed, by name."""
        return {name: panel for name, panel in self._pages.items() if panel.comm is not None}

    def turn_to(self, page: str) -> Panel:
        """Open a page and wait until it is there; give it, or the laboratory itself for ``cache`` and ``compare``.

        Raises
        ------
        InputError : there is no such page, or it could not be made.
        """
        self.page = page
        self.worker.wait()
        if page in self._kinds and page not in self.pages:
            raise InputError(f"The page {page!r} could not be made: {self.worker.last_error}")
        return self.pages.get(page, self)

    def compare(self) -> None:
        """Ask for the fidelity of every method that needs no fitting, at the present bits or those next to them."""
        here, fitting = self.state, self._fitting
        nearby = {
            method: [nearest(fitting.widths(method), width) for width in self._base] for method in fitting.methods
        }
        ready = {m: bits for m, bits in nearby.items() if all(fitting.is_ready(m, width) for width in bits)}
        plans = {
            method: self._uniform(method, *bits) for method, bits in ready.items()
        }  # knobs may be turned meanwhile

        def job(progress: Progress) -> None:
            for done, (method, bits) in enumerate(ready.items()):
                progress(done, len(ready), f"measuring {method}")
                name = f"{method} K{bits[0]} V{bits[1]}"
                row = self._fidelity(plans[method], name, method, bits, lambda *_: progress.check())
                self._add_measured(row, {**here, "method": method, "bits": bits, "layers": {}})

        self._submit("comparison", job)

    def _open(self) -> None:
        """Make the page if it is new, and bring it to what is chosen."""
        name = self.page
        if name not in self._kinds or name in self.pages:
            self._bring()
            return
        kind, chosen = self._kinds[name], self._chosen(name)

        def make(progress: Progress) -> Panel:
            progress(0, 1, "measuring what the page shows first")
            return kind.make(**chosen)

        self._submit(f"page {name}", make, on_done=lambda panel: self._show_page(name, panel))

    def _show_page(self, name: str, panel: Panel) -> None:
        self._pages = self._pages | {name: panel}
        panel.observe(lambda change: self._take(name, change), self._kinds[name].shares)
        self._places[name].children = [panel]
        self._bring()  # to what was chosen while it was made

    # one choice for all ---------------------------------------------------------------------------------------------

    def _ours(self, page: str) -> dict[str, str]:
        """Names of the laboratory's traits by those of the page, a method before its widths."""
        shows_values = getattr(self.pages.get(page), "tensor", "keys") == "values"
        return {name: WIDTHS[shows_values] if name == "bits" else name for name in self._kinds[page].shares}

    def _chosen(self, page: str) -> dict[str, Any]:
        """What is chosen, by the page's names; bits are those of the layer that the page shows, or of all layers."""
        panel, chosen = self.pages.get(page), {}
        for theirs, ours in self._ours(page).items():
            if ours in WIDTHS:
                shown = getattr(panel, "layer", self.layer) if self.layer is None else self.layer
                own = self._overrides.get(shown) if "layer" in self._kinds[page].shares and shown is not None else None
                widths = own or self._base
                chosen[theirs] = widths[WIDTHS.index(ours)]
            elif getattr(self, ours) is not None or (panel is not None and panel.traits()[theirs].allow_none):
                chosen[theirs] = getattr(self, ours)
        return chosen

    def _bring(self) -> None:
        """Bring the open page to what is chosen; what it cannot follow it says."""
        panel = self.pages.get(self.page)
        if panel is None or self._sharing:
            return
        self._sharing = True
        try:
            for name, value in self._chosen(self.page).items():
                setattr(panel, name, value)
        except InputError as error:
            panel.say(str(error))
        finally:
            self._sharing = False

    def _take(self, page: str, change: dict[str, Any]) -> None:
        """Choose what was chosen on a page; the page says what cannot be, and goes back."""
        if self._sharing:
            return
        panel, ours = self.pages[page], self._ours(page)[change["name"]]
        self._sharing = True
        try:
            if "method" in self._kinds[page].shares:
                self.method = panel.method  # its widths may be news of the same move
            if ours in WIDTHS:
                layer = panel.layer if "layer" in self._kinds[page].shares else None
                panel.say(self._set_width(ours, change["new"], layer))
            else:
                setattr(self, ours, change["new"])
        except InputError as error:
            panel.say(str(error))
        finally:
            self._sharing = False
        self._bring()

    def _set_width(self, side: str, width: int, layer: int | None) -> str:
        """Set bits of one layer if it has bits of its own, or else of all; give a sentence that says which."""
        place, words = WIDTHS.index(side), "K" if side == "key_bits" else "V"
        self._check_width(width, ROLES[place], self.method)
        if layer in self._overrides:
            own = list(self._overrides[layer])
            own[place] = width
            self._overrides = self._overrides | {layer: (own[0], own[1])}
            said = f"{words}{width} for layer {layer}, which has bits of its own."
        else:
            base = list(self._base)
            base[place] = width
            self._base = (base[0], base[1])
            alone = f" but {', '.join(map(str, sorted(self._overrides)))}" if self._overrides else ""
            said = f"{words}{width} for all layers{alone}."
        self._layer_picked()
        self._redraw()
        return said

    @t.validate("page")
    def _page_is_there(self, proposal: dict[str, Any]) -> str:
        if proposal["value"] not in NAMES:
            raise InputError(f"There is no page {proposal['value']!r}: open one of {', '.join(NAMES)}.")
        return str(proposal["value"])

    @t.validate("head")
    def _head_is_there(self, proposal: dict[str, Any]) -> int:
        heads = min(c.keys.shape[1] for c in self._capture.layers)
        if not 0 <= proposal["value"] < heads:
            raise InputError(f"There is no KV head {proposal['value']}: choose one from 0 to {heads - 1}.")
        return int(proposal["value"])

    # the page that compares -----------------------------------------------------------------------------------------

    def _comparison(self) -> ipywidgets.Widget:
        self._points = MeasuredPoints(self.restore)
        one = ipywidgets.Button(description="Measure this cache", tooltip="Its predictions beside the exact cache's")
        one.on_click(lambda _: self.measure())
        every = ipywidgets.Button(
            description="Measure all methods",
            tooltip="At these bits, each method that needs no fitting",
            layout={"width": "auto"},
        )
        every.on_click(lambda _: self.compare())
        buttons = ipywidgets.HBox([one, every, ProgressBar(self.worker, flex="1 1 auto")])
        return ipywidgets.VBox([buttons, self._message, self._slot, self._points])

    def _add_measured(self, row: pl.DataFrame, state: dict[str, Any]) -> None:
        super()._add_measured(row, state)
        self._points.show(self.measured["name"].to_list(), self._settings_measured)

    # what is taken away ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """The choices as plain words and numbers: what `restore` takes, and JSON holds."""
        return super().state | {"head": self.head, "page": self.page}

    def _turn_to(self, state: Mapping[str, Any], overrides: Bits) -> None:
        super()._turn_to(state, overrides)
        self.head, self.page = state["head"], state["page"]

    @property
    def named(self) -> dict[str, ChartView]:
        """The charts of every page that was made; those of the first page by their names alone."""
        pages = {f"{page}_{name}": view for page, panel in self.pages.items() for name, view in panel.named.items()}
        return super().named | pages

    @property
    def sections(self) -> list[Section]:
        """What a report says: the charts of every page that was made, what was measured, the plan and its use."""
        words = f"{len(self._capture.tokens)} tokens of text, sinks={self.sinks}, window={self.window}."
        charts = [Section(chart=view.to_dict()) for view in self._charts.named.values()]
        for name, panel in self.pages.items():
            charts += [Section(self._kinds[name].title, str(panel)), *panel.sections]
        measured = [Section("Fidelity", table=self.measured)] if len(self.measured) else []
        plan = Section("The plan", "Save it as plan.json.", code=self.plan.to_json())
        use = Section("To use it", code="\n".join(self.lines('vl.Plan.load("plan.json")')))
        return [Section(self.name, words), *charts, *measured, plan, use]

    @property
    def views(self) -> tuple[ChartView, ...]:
        """The charts of the open page."""
        if self.page in self._kinds:
            return self.pages[self.page].views if self.page in self.pages else ()
        charts = self._charts.named
        return tuple(view for name, view in charts.items() if (name == "frontier") == (self.page == "compare"))
