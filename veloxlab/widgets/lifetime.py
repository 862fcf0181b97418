"""How a widget ends: it is closed, nothing refers to it any more, or its cell is run again.

ipywidgets keeps every widget until it is closed: in a table, and by the callback of its comm. Here both refer weakly to
the widgets of this package, so that Python's garbage collection closes those that nobody uses. What a page shows is
kept until its cell shows something else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import ipywidgets
from IPython import get_ipython
from ipywidgets.widgets import widget as registry


class Table(MutableMapping[str, ipywidgets.Widget]):
    """The table of open widgets by model id, as ipywidgets uses it; some are held weakly.

    Every loop runs over a copy: any thread may make or end widgets meanwhile.
    """

    def __init__(self, widgets: MutableMapping[str, ipywidgets.Widget]) -> None:
        self._holds: dict[str, Callable[[], ipywidgets.Widget | None]] = {}
        for name, widget in widgets.items():
            self[name] = widget

    def loosen(self, name: str) -> None:
        """Hold a widget weakly from now on; nothing if it is closed."""
        widget = self.get(name)
        if widget is not None:
            self._holds[name] = weakref.ref(widget, lambda _: self._holds.pop(name, None))

    def is_loose(self, name: str) -> bool:
        """Whether a widget is held weakly."""
        return isinstance(self._holds.get(name), weakref.ref)

    def __getitem__(self, name: str) -> ipywidgets.Widget:
        widget = self._holds[name]()
        if widget is None:
            raise KeyError(name)
        return widget

    def __setitem__(self, name: str, widget: ipywidgets.Widget) -> None:
        self._holds[name] = lambda: widget

    def __delitem__(self, name: str) -> None:
        del self._holds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    def values(self) -> Any:  # noqa: ANN401 - a view of a copy
        """The open widgets."""
        return self._open().values()

    def items(self) -> Any:  # noqa: ANN401
        """Model ids and open widgets."""
        return self._open().items()

    def _open(self) -> dict[str, ipywidgets.Widget]:
        held = {name: hold() for name, hold in self._holds.copy().items()}
        return {name: widget for name, widget in held.items() if widget is not None}


TABLE = Table(registry._instances)
registry._instances = TABLE


class Ending(ipywidgets.Widget):  # type: ignore[misc]  # ipywidgets has no types
    """A widget that ends with all its parts: when it is closed, or when nothing refers to it any more."""

    def close(self) -> None:
        """Take the widget and all its parts off the page. It cannot be shown again."""
        if self.comm is not None:
            super().close()
            for part in parts(self):
                part.close()


def loosen(whole: ipywidgets.Widget) -> None:
    """Let a widget and its parts end when nothing refers to ``whole`` any more."""
    for part in parts(whole):
        if part.comm is not None and not TABLE.is_loose(part.model_id):
            part.comm.on_msg(weakly(part._handle_msg))
            TABLE.loosen(part.model_id)


def weakly(method: Callable[..., Any]) -> Callable[..., None]:
    """A function that calls a bound method as long as its object is there, and does not keep the object."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return call


def parts(whole: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """The widget itself and every widget that it is made of, shown or not; none that is shared by all."""
    found: dict[int, ipywidgets.Widget] = {}
    waiting: list[object] = [whole]
    while waiting:
        value = waiting.pop()
        if type(value) in (list, tuple):
            waiting += value  # type: ignore[arg-type]  # narrowed by the line above
        elif type(value) is dict:
            waiting += value.copy().values()
        elif isinstance(value, ipywidgets.Widget) and id(value) not in found and not hasattr(value, "SHARED"):
            found[id(value)] = value
            if not isinstance(value, ipywidgets.widget_link.Link):  # its ends are no parts of it
                waiting += [vars(value), value._trait_values]
    return list(found.values())


# what cells show --------------------------------------------------------------------------------------------------


Shown = weakref.WeakSet[ipywidgets.Widget]
# by the cell's id, or by its code where the page sends no id: its newest run, and what that shows
_cells: dict[str, tuple[str, Shown]] = {}


def keep_shown(widget: ipywidgets.Widget) -> None:
    """Keep a widget that is shown. What an older run of the same cell showed ends after this run.

    A widget stays open if a variable of the user still holds it, or if it is a part of another one.
    """
    shell = get_ipython()
    if widget.comm is None or not hasattr(shell, "get_parent"):
        return  # no page
    TABLE[widget.model_id] = widget
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
    still = [widget for _, shown in _cells.values() for widget in shown]
    for old in [widget for widget in last if widget.comm is not None and widget not in still]:
        TABLE.loosen(old.model_id)
        if not _is_named(old, variables) and not _is_part(old):
            old.close()


def _is_named(widget: ipywidgets.Widget, variables: dict[str, Any]) -> bool:
    """Whether a variable of the user, or a list, tuple or dictionary in one, holds the widget."""
    named = [value for name, value in variables.items() if not name.startswith("_") and name not in ("In", "Out")]
    inside = [value.values() if isinstance(value, dict) else value for value in named]
    held = [each for values in inside if isinstance(values, (list, tuple, type({}.values()))) for each in values]
    return any(each is widget for each in named + held)


def _is_part(widget: ipywidgets.Widget) -> bool:
    boxes = [each for each in TABLE.values() if isinstance(each, ipywidgets.Box)]
    return any(child is widget for box in boxes for child in box.children)
