"""A widget ends when it is closed, when nothing refers to it any more, or when its cell is run again.

ipywidgets keeps each widget until it is closed: in a table, and by the callback of its comm. Here both refer weakly to
the widgets of this package, so that Python's garbage collection closes unused ones. A widget in the output of a cell
is kept until that cell shows something else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakMethod, WeakSet, WeakValueDictionary

import ipywidgets
from IPython import get_ipython
from ipywidgets.widgets import widget as registry

from veloxlab.views import picture


class Table(WeakValueDictionary[str, ipywidgets.Widget]):
    """The table of open widgets by model id, for ipywidgets. It keeps those in ``kept`` and in ``shown`` alive.

    A loop over it runs over a copy, because any thread may make or end widgets at the same time.
    """

    def __init__(self, widgets: Mapping[str, ipywidgets.Widget]) -> None:
        super().__init__(widgets)
        self.kept, self.shown = dict(widgets), dict[str, ipywidgets.Widget]()

    def __setitem__(self, name: str, widget: ipywidgets.Widget) -> None:
        super().__setitem__(name, widget)
        self.kept[name] = widget

    def pop(self, name: str, *default: Any) -> Any:  # noqa: ANN401
        for held in (self.kept, self.shown):
            held.pop(name, None)
        return super().pop(name, *default)

    def items(self) -> Any:  # noqa: ANN401 - a list, where the base class has a view
        return [(found.key, widget) for found in self.valuerefs() if (widget := found()) is not None]

    def values(self) -> Any:  # noqa: ANN401
        return [widget for _, widget in self.items()]


TABLE = Table(registry._instances)
registry._instances = TABLE


class Ending(ipywidgets.Widget):  # type: ignore[misc]  # ipywidgets has no types
    """A widget that ends together with its parts: when it is closed, or when nothing refers to it any more."""

    def close(self) -> None:
        """Take the widget and all its parts off the page. It cannot be shown again."""
        if self.comm is not None:
            super().close()
            for part in parts(self):
                part.close()

    @property
    def views(self) -> tuple[Any, ...]:
        """The `ChartView` of each visible chart, from top to bottom; for a `ChartView`, itself."""
        return (self,)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live widget; and for places without a kernel a picture and a line of text, also its alternative text."""
        keep_shown(self)
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        data["text/plain"] = repr(self)
        if self.views:
            still = picture.stacked([view.to_dict() for view in self.views])
            data["image/png"] = base64.b64encode(still).decode()
            metadata = metadata | {"image/png": {"alt": data["text/plain"]}}
        return data, metadata


def loosen(whole: ipywidgets.Widget) -> None:
    """Let a widget and its parts end when nothing else refers to ``whole`` any more."""
    for part in parts(whole):
        if part.comm is not None and TABLE.kept.pop(part.model_id, None) is not None:
            part.comm.on_msg(weakly(part._handle_msg))


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a bound method while its object exists, and does not keep the object alive."""
    reference = WeakMethod(method)
    return lambda *given: call(*given) if (call := reference()) is not None else None


_PLAIN = {str, int, float, bool, bytes, type(None)}  # skipped: rows of charts have very many of these


def parts(whole: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """The widget itself and all widgets that it consists of, visible or not; without those marked ``SHARED``."""
    found: dict[int, ipywidgets.Widget] = {}
    waiting: list[object] = [whole]
    while waiting:
        value = waiting.pop()
        if type(value) in (list, tuple):
            waiting += [each for each in value if type(each) not in _PLAIN]  # type: ignore[attr-defined]  # see above
        elif type(value) is dict:
            waiting += [each for each in value.copy().values() if type(each) not in _PLAIN]
        elif isinstance(value, ipywidgets.Widget) and id(value) not in found and not hasattr(value, "SHARED"):
            found[id(value)] = value
            if not isinstance(value, ipywidgets.widget_link.Link):  # the ends of a link are not its parts
                waiting += [vars(value), value._trait_values]
    return list(found.values())


Shown = WeakSet[ipywidgets.Widget]
# by the cell's id, or by its code where the page sends no id: its newest run, and the widgets shown by that run
_cells: dict[str, tuple[str, Shown]] = {}


def keep_shown(widget: ipywidgets.Widget) -> None:
    """Keep a shown widget alive. The widgets that an older run of the same cell showed end after this run.

    A widget stays open if a variable of the user refers to it, or if it is a part of another widget.
    """
    shell = get_ipython()
    if widget.comm is None or not hasattr(shell, "get_parent"):
        return  # no page
    TABLE.shown[widget.model_id] = widget
    parent = shell.get_parent()
    cell = parent.get("metadata", {}).get("cellId") or parent.get("content", {}).get("code")
    if not cell:
        return  # shown by a callback: kept until it is closed
    run = parent["header"]["msg_id"]
    before, shown = _cells.get(cell, ("", Shown()))
    if before != run:
        last, shown = shown, Shown()
        _cells[cell] = run, shown

        def end(_: object) -> None:
            shell.events.unregister("post_run_cell", end)
            _end(last, shell.user_ns)

        if before:
            shell.events.register("post_run_cell", end)
    shown.add(widget)


def _end(last: Shown, variables: dict[str, Any]) -> None:
    """Close widgets that were shown, except those that are shown again, in a box, or in a variable of the user."""
    still = [widget for _, shown in _cells.values() for widget in shown]
    named = [value for name, value in variables.items() if not name.startswith("_") and name not in ("In", "Out")]
    inside = [value.values() if isinstance(value, dict) else value for value in named]
    held = [each for values in inside if isinstance(values, (list, tuple, type({}.values()))) for each in values]
    boxed = [child for box in TABLE.values() if isinstance(box, ipywidgets.Box) for child in box.children]
    used = {id(widget) for widget in (*named, *held, *boxed)}
    for old in [widget for widget in last if widget.comm is not None and widget not in still]:
        TABLE.shown.pop(old.model_id, None)
        if id(old) not in used:
            old.close()
