"""The page of one token: how its prediction changed, in which heads, and through which keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import altair as alt
import ipywidgets
import polars as pl

from veloxlab import views
from veloxlab.measure import Capture, LayerCapture
from veloxlab.measure.activations import capture_layers
from veloxlab.measure.tokens import (
    Predictions,
    as_held,
    attended_keys,
    errors_of_token,
    token_predictions,
    worst_of_blocks,
)
from veloxlab.progress import Progress as Tell
from veloxlab.views.tokens import alternatives_data, attended_data
from veloxlab.widgets.chart_view import ChartView
from veloxlab.widgets.chosen import Chosen, OfLayers
from veloxlab.widgets.layout import button, controls
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look, Measure, Request
from veloxlab.widgets.pages.experiment import Experiment, OfExperiment
from veloxlab.widgets.selection import Choice, Selection
from veloxlab.widgets.worker import Worker

BLOCKS = 200  # of the whole text in the chart along it
SHOWN = 160  # tokens in the chart of text, around the picked one
LINES = 9  # that this text usually takes
FIRST = 1  # position of the first predicted token: nothing predicts the token at 0
STRIP = "The text around the token, with the KL divergence of each prediction: click a token"
NO_QUERIES = "This model does not show its queries, so the keys that a token attends to are not known."


def _predictions_of(look: Look) -> list[Request]:
    return [("predictions", look.ids, look.cache)]


def _place(found: Predictions, token: int | None) -> int:
    """The shown position: of the picked token, or of the token that lost most."""
    return found.worst if token is None else max(token, FIRST)


def _along_rows(found: Sequence[Predictions], _: Look) -> pl.DataFrame:
    return worst_of_blocks(found[0].tokens, BLOCKS)


def _strip_rows(found: Sequence[Predictions], look: Look) -> pl.DataFrame:
    rows = found[0].tokens.slice(_first_row(found[0], look.token), SHOWN)
    return rows.with_columns(side=pl.lit("compressed"))


def _first_row(found: Predictions, token: int | None) -> int:
    """The first row in the chart of text: equal for near tokens, so that a pick only moves the mark."""
    return min((_place(found, token) - FIRST) // SHOWN * SHOWN, max(0, found.tokens.height - SHOWN))


def _strip(rows: pl.DataFrame) -> alt.TopLevelMixin:
    said = views.losses_caption(rows)
    return views.token_strip(rows, lines=LINES, heading=STRIP, caption=said)


def _choice(cache: tuple[Any, ...]) -> Choice:
    method, key_bits, value_bits, own, sinks, window, seed = cache
    return Choice(method, key_bits, value_bits, sinks, window, own_bits=dict(own), seed=seed)


def _capture(page: TokenPage, progress: Tell, ids: tuple[int, ...]) -> Capture:
    """The capture of the model's own run over a text; the page keeps that of one generated text."""
    if not ids:
        return page.experiment.capture
    if page._generated is None or page._generated.tokens != ids:
        page._generated = Capture(tuple(capture_layers(page.experiment.model, ids, progress)), ids)
    return page._generated


def _predictions(page: TokenPage, progress: Tell, ids: tuple[int, ...], cache: tuple[Any, ...]) -> Predictions:
    choice, experiment = _choice(cache), page.experiment
    given = page.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
    text = ids or experiment.capture.tokens
    plan = choice.plan(experiment.model)
    settings: dict[str, Any] = {"calibration": given, "progress": progress}
    return token_predictions(experiment.model, experiment.tokenizer, text, plan, **settings)


def _layers(
    page: TokenPage, progress: Tell, ids: tuple[int, ...], cache: tuple[Any, ...]
) -> list[tuple[LayerCapture, LayerCapture]]:
    """Each layer as captured, and as the cache holds it; the page keeps them until another cache is chosen."""
    choice, before = _choice(cache), page._held
    given = page.selection.fitting.calibration(choice.method, choice.widths, progress, choice.seed)
    page._held = {}
    seen = _capture(page, progress, ids).layers
    for done, layer in enumerate(seen):
        bits = choice.bits_of(layer.layer)
        key = ids, layer.layer, choice.method, bits, choice.sinks, choice.window, choice.seed
        if key not in before:
            progress(done, len(seen), f"coding layer {layer.layer}")
            settings: dict[str, Any] = {"sinks": choice.sinks, "window": choice.window, **choice.options}
            held = as_held(layer, choice.method, bits, calibration=given, **settings)
            before[key] = layer, held
        page._held[key] = before[key]
    return [*page._held.values()]


def _at(page: TokenPage, progress: Tell, ids: Any, cache: Any, token: int | None) -> tuple[Predictions, int]:  # noqa: ANN401
    found = page._measured(("predictions", ids, cache), progress)
    return found, _place(found, token)


def _heads(page: TokenPage, progress: Tell, *of: Any) -> pl.DataFrame:
    ids, cache, _ = of
    return errors_of_token(_layers(page, progress, ids, cache), _at(page, progress, *of)[1])


def _keys(page: TokenPage, progress: Tell, *of: Any) -> pl.DataFrame:
    *text, layer, head = of
    found, place = _at(page, progress, *text)
    (pair,) = [each for each in _layers(page, progress, *text[:2]) if each[0].layer == layer]
    texts = [page.experiment.tokenizer.decode([found.ids[0]]), *found.tokens["text"]]
    return attended_keys(*pair, place, head).with_columns(text=pl.Series(texts[: place + 1]))


def _alternatives(page: TokenPage, progress: Tell, *of: Any) -> pl.DataFrame:
    found, place = _at(page, progress, *of)
    return found.alternatives(page.experiment.tokenizer, place)


def _of_text(
    name: str,
    why: str,
    rows: Callable[[Sequence[Any], Look], pl.DataFrame],
    draw: Callable[[pl.DataFrame], alt.TopLevelMixin],
    *depends: str,
) -> Chart:
    """A chart of a whole text, from its predictions."""
    return Chart(name, ("ids", "cache", *depends), rows, lambda own, _: draw(own), asks=_predictions_of, why=why)


def _of_token(
    name: str,
    why: str,
    draw: Callable[[pl.DataFrame], alt.TopLevelMixin],
    caption: Callable[[pl.DataFrame], str],
    *depends: str,
    data: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows,
) -> Chart:
    """A chart of one token, from a measurement with the chart's name; another token changes only its rows."""
    depends = ("ids", "cache", "token", *depends)
    return Chart(
        name,
        depends,
        lambda found, _: found[0],
        lambda own, _: draw(own),
        lambda own, _: caption(own),
        lambda _, look: look.ids,
        lambda look: [(name, *(getattr(look, setting) for setting in depends))],
        why,
        data=data,
    )


CHARTS = (
    _of_text("text", "Which words the cache predicts worse.", _strip_rows, _strip, "first"),
    _of_text("along", "Where in the text these words are.", _along_rows, views.losses_along),
    _of_token(
        "alternatives",
        "Whether the model would choose another token.",
        views.alternatives,
        views.alternatives_caption,
        data=alternatives_data,
    ),
    _of_token(
        "heads", "Which layers and heads have the largest errors at this token.", views.token_heads, views.heads_caption
    ),
    _of_token(
        "keys",
        "Whether this token still attends to the same tokens.",
        views.attended_keys,
        views.attended_caption,
        "layer",
        "head",
        data=attended_data,
    ),
)


class TokenPage(OfExperiment, OfLayers, ChartPage):
    """See why one token's prediction changed: errors in each layer and head, attended keys, and alternative tokens.

    The text is the laboratory's, or one that was generated. A click on a token picks it; a click on a cell of the map
    picks a layer and a head. Without a picked token the page shows the token that lost most. Keys are as the cache has
    them after it has read the text: all in codes except sinks and window.
    """

    NAME = "tokens"
    SETTINGS = ("token", "ids", "layer", "head")
    HELP = "00_tour.ipynb#3. Where are the errors?"
    MEASURES: ClassVar[dict[str, Measure]] = {
        "predictions": _predictions,
        "heads": _heads,
        "keys": _keys,
        "alternatives": _alternatives,
    }

    token = Chosen("token", help="the picked token, by its position in the text")
    ids = Chosen("ids", help="token ids of the text; empty for the captured text")
    layer = Chosen("layer", read="shown_layer", help="layer of the shown attention")
    head = Chosen("head", help="KV head of the shown attention")

    def __init__(
        self, experiment: Experiment, *, selection: Selection | None = None, worker: Worker | None = None
    ) -> None:
        super().__init__(selection or experiment.selection, worker, experiment.capture)
        self.experiment, self.points = experiment, experiment.points
        self._generated: Capture | None = None
        self._held: dict[tuple[object, ...], tuple[LayerCapture, LayerCapture]] = {}  # layers of the present cache
        shown = all(layer.queries is not None for layer in experiment.capture.layers)
        self._missing = "" if shown else NO_QUERIES
        self._draw(chart for chart in CHARTS if shown or chart.name != "keys")
        tip = "Position of the shown token in the text, 1 to the last"
        self._steps = ipywidgets.IntSlider(description="token", min=FIRST, max=FIRST, value=FIRST, tooltip=tip)
        self._steps.observe(self._token_picked, "value")
        self._back = button("Captured text", "Show the text of the laboratory again", self._leave, width="auto")
        self._laid_out([self._controls()], self._grid)
        self.follow()

    def _added(self, name: str, view: ChartView) -> None:
        if name == "heads":
            for trait in ("picked", "picked_head"):
                self._watch(view, trait, self._head_picked)

    @property
    def place(self) -> int:
        """Position of the shown token in its text."""
        look = self._look()
        found = self.found.get(_predictions_of(look)[0])
        return _place(found, look.token) if found is not None else max(self.token or 0, FIRST)

    @property
    def summary(self) -> str:
        return f"{self.name}: {' '.join(map(self._caption, ('alternatives', 'heads')))}"

    @property
    def notes(self) -> list[str]:
        other = "This text is a prompt and the answer generated for it." if self.ids else ""
        coded = self.selection.choice.in_codes(len(self.ids or self.experiment.capture.tokens))
        return [coded, *super().notes, other, self._missing]

    def _look(self, **changed: Any) -> Look:
        look, choice = super()._look(**changed), self.selection.choice
        own = tuple(sorted(choice.own_bits.items()))
        look.cache = (choice.method, choice.key_bits, choice.value_bits, own, choice.sinks, choice.window, choice.seed)
        found = self.found.get(_predictions_of(look)[0])
        look.first = None if found is None else _first_row(found, look.token)
        return look

    @property
    def _token(self) -> int | None:
        return self.place

    def _pick_token(self, place: int | None) -> None:
        self.selection.choose(token=place)

    def _leave(self) -> None:
        self.selection.choose(token=None, ids=())

    def _head_picked(self, _: object) -> None:
        heads = self.charts["heads"]
        layer = self.layer if heads.picked is None else heads.picked
        head = self.head if heads.picked_head is None else heads.picked_head
        if (layer, head) != (self.layer, self.head):
            self.selection.choose(layer=layer, head=head)
        else:
            self._mark()  # a chart in which a pick was cleared

    def _mark(self) -> None:
        super()._mark()
        if heads := self.charts.get("heads"):
            with heads.hold_trait_notifications():  # between the two, the old head would be chosen again
                heads.picked, heads.picked_head = self.layer, self.head

    def _show(self) -> None:
        super()._show()
        if self._complete:  # then it is known which token lost most
            self._mark()
            last = len(self.ids or self.experiment.capture.tokens) - 1
            with self._steps.hold_trait_notifications():
                self._steps.max, self._steps.value = last, self.place
            self._back.disabled = not self.ids

    def _controls(self) -> ipywidgets.Widget:
        steps = ipywidgets.SelectionSlider
        worst = button("Worst token", "Show the token whose prediction changed most", lambda: self._pick_token(None))
        return controls(
            self._steps,
            self._control(steps, "layer", options=self.selection.layers),
            self._control(steps, "head", options=range(self.selection.heads)),
            self._of_cache(step=16),
            worst,
            self._back,
            self._all_codes(),
        )
