"""Controls for what an allocation is asked for: a kind of budget with its slider, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from veloxlab.allocate.budget import (
    MEGABYTE,
    AverageBits,
    Bounds,
    Budget,
    BytesPerToken,
    QualityFloor,
    Spans,
    TokensInMemory,
)
from veloxlab.errors import InputError
from veloxlab.runtime import device

KINDS = {
    "average bits": AverageBits,
    "bytes a token": BytesPerToken,
    "tokens in memory": TokensInMemory,
    "predicted loss": QualityFloor,
}
STYLE = {"description_width": "104px"}
WIDE = {"width": "352px"}
COLUMN = {"width": "362px"}  # two of them fit into an output of JupyterLab beside its file browser
MOST_TOKENS = 1_000_000


class BudgetControl(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Choose a kind of budget, and turn its one knob; of tokens in memory there are two.

    Parameters
    ----------
    asked : given each budget that a hand asks for; what `show` shows is not asked for again.
    converted : gives the budget of a kind that allows what is held now.
    tokens : of a text, to begin with.
    """

    def __init__(self, asked: Callable[[Budget], None], converted: Callable[[type], Budget], tokens: int) -> None:
        self._asked, self._showing = asked, False
        self.kind = ipywidgets.Dropdown(
            options=KINDS, description="budget", tooltip="What the budget is counted in", style=STYLE, layout=WIDE
        )
        self.bits = _float_slider("true bits", ".2f", "Stored bits for each packed value, scales included")
        self.nbytes = _float_slider(
            "bytes a token", ",.0f", "Bytes of one packed token's keys and values in all layers"
        )
        self.tokens = ipywidgets.BoundedIntText(
            tokens, min=1, max=MOST_TOKENS, step=256, description="tokens", style=STYLE, layout=WIDE,
            tooltip="Length of the text that has to fit",
        )  # fmt: skip
        self.megabytes = _float_slider("megabytes", ".3f", "All that the compressed layers then hold, exact tokens too")
        self.loss = ipywidgets.FloatLogSlider(
            description="nats a token", tooltip="The most that may be lost, as predicted: the fewest bytes are sought",
            readout_format=".3g", base=10, step=0.02, style=STYLE, layout=WIDE,
        )  # fmt: skip
        self._knobs: dict[type, list[ipywidgets.Widget]] = {
            AverageBits: [self.bits],
            BytesPerToken: [self.nbytes],
            TokensInMemory: [self.tokens, self.megabytes],
            QualityFloor: [self.loss],
        }
        self._slot = ipywidgets.VBox()
        self.kind.observe(lambda change: self._ask(lambda: converted(change["new"])), "value")
        for knobs in self._knobs.values():
            for knob in knobs:
                knob.observe(lambda _: self._ask(self._turned), "value")
        super().__init__([self.kind, self._slot], layout=COLUMN)

    def show(self, budget: Budget, spans: Spans) -> None:
        """Show a budget and how far each knob goes, and ask for nothing."""
        self._showing = True
        try:
            match budget:
                case AverageBits(bits):
                    _set(self.bits, bits, spans.bits, step=0.05)
                case BytesPerToken(nbytes):
                    _set(self.nbytes, nbytes, spans.nbytes, step=_hundredth(spans.nbytes))
                case TokensInMemory(tokens, megabytes):
                    self.tokens.value = tokens
                    least, most = spans.megabytes
                    span = least, max(least, min(most, device().memory_bytes / MEGABYTE))
                    _set(self.megabytes, megabytes, span, step=_hundredth(span))
                case QualityFloor(loss):
                    low, high = min(spans.predicted_loss[0], loss), max(spans.predicted_loss[1], loss)
                    _ends(self.loss, math.log10(low), math.log10(high))
                    self.loss.value = loss
            self.kind.value = type(budget)
            self._slot.children = self._knobs[type(budget)]
        finally:
            self._showing = False

    def _turned(self) -> Budget:
        kind = self.kind.value
        return kind(*(knob.value for knob in self._knobs[kind]))  # type: ignore[no-any-return]

    def _ask(self, budget: Callable[[], Budget]) -> None:
        if not self._showing:
            self._asked(budget())


class BoundsControl(ipywidgets.VBox):  # type: ignore[misc]
    """Choose what an allocation may do, and how much keys count against values.

    Parameters
    ----------
    asked : given the bounds and the weight of keys that a hand asks for.
    refused : given the sentence of bounds that cannot be.
    widths : that were measured.
    layers : how many there are to protect.
    """

    def __init__(
        self,
        asked: Callable[[Bounds, float], None],
        refused: Callable[[str], None],
        widths: Sequence[int],
        layers: int,
    ) -> None:
        self._asked, self._refused, self._showing = asked, refused, False
        self.widths = ipywidgets.SelectionRangeSlider(
            options=list(widths), index=(0, len(widths) - 1), description="bits allowed",
            tooltip="Least and most code bits that a head may get", style=STYLE, layout=WIDE,
        )  # fmt: skip
        self.first = _layers("first layers", "So many first layers are left out of the allocation", layers)
        self.last = _layers("last layers", "So many last layers are left out of the allocation", layers)
        self.protection = ipywidgets.Dropdown(
            options={"the most bits": "widest", "no codes: kept exact": "exact"}, description="these get",
            tooltip="What first and last layers that are left out get", style=STYLE, layout=WIDE,
        )  # fmt: skip
        self.keys_first = ipywidgets.Checkbox(
            description="keys no fewer than values", indent=False,
            layout={"margin": "0 0 0 112px", "width": "244px"},
            tooltip="A layer's keys get as many bits as its values at least, on average over its heads",
        )  # fmt: skip
        self.key_weight = ipywidgets.FloatLogSlider(
            1.0, base=2, min=-4, max=4, step=0.25, description="weight of keys", readout_format=".2f", style=STYLE,
            layout=WIDE, tooltip="How many times as much an error in keys counts in the choice",
        )  # fmt: skip
        knobs = [self.widths, self.first, self.last, self.protection, self.keys_first, self.key_weight]
        for knob in knobs:
            knob.observe(lambda _: self._turned(), "value")
        super().__init__(knobs, layout=COLUMN)

    def show(self, bounds: Bounds, key_weight: float) -> None:
        """Show bounds, and ask for nothing."""
        self._showing = True
        try:
            inside = [w for w in self.widths.options if bounds.least_bits <= w <= bounds.most_bits]
            if inside:
                self.widths.value = inside[0], inside[-1]
            self.first.value, self.last.value = bounds.protected_first, bounds.protected_last
            self.protection.value, self.keys_first.value = bounds.protection, bounds.keys_over_values
            self.key_weight.value = key_weight
        finally:
            self._showing = False

    def _turned(self) -> None:
        if self._showing:
            return
        least, most = self.widths.value
        try:
            bounds = Bounds(
                least, most, self.first.value, self.last.value, self.protection.value, bool(self.keys_first.value)
            )
        except InputError as error:
            self._refused(str(error))
        else:
            self._asked(bounds, self.key_weight.value)


def _float_slider(description: str, readout: str, tip: str) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        description=description, readout_format=readout, tooltip=tip, style=STYLE, layout=WIDE
    )


def _hundredth(span: tuple[float, float]) -> float:
    return (span[1] - span[0]) / 100 or 1.0


def _layers(description: str, tip: str, layers: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(
        0, min=0, max=layers // 2, description=description, tooltip=tip, style=STYLE, layout=WIDE
    )


def _set(slider: ipywidgets.FloatSlider, value: float, span: tuple[float, float], step: float) -> None:
    """Move a slider and its ends; an end is widened for a value that lies beyond it."""
    _ends(slider, min(span[0], value), max(span[1], value))
    slider.step = step
    slider.value = value


def _ends(slider: Any, low: float, high: float) -> None:  # noqa: ANN401
    slider.max = max(high, slider.max)  # no end may ever cross the other
    slider.min, slider.max = low, high
