"""Pages of one KV head: what a method does to it, and its keys and values in the spaces in which methods code them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import altair as alt
import ipywidgets
import polars as pl

from veloxlab import views
from veloxlab.cache.calibration import Calibration
from veloxlab.checks import checked, choice
from veloxlab.codecs import TENSORS
from veloxlab.measure import Capture, code_bits, token_errors
from veloxlab.measure.distributions import SPACES, channel_distributions, densities
from veloxlab.measure.errors import attention_map, error_densities, errors_along_position, errors_by_bits
from veloxlab.measure.levels import level_densities
from veloxlab.measure.scores import score_errors
from veloxlab.measure.spectra import rope_pairs, spectra
from veloxlab.progress import Progress
from veloxlab.views.distributions import MARKS, SHARES_SHOWN, SPACE_WORDS
from veloxlab.views.marks import bits_said
from veloxlab.widgets.chosen import Checked, Chosen, ChosenBits
from veloxlab.widgets.layout import columns, controls, status
from veloxlab.widgets.pages.charts import Chart, ChartPage, Look, Measure, coded
from veloxlab.widgets.selection import Fitting, Selection
from veloxlab.widgets.worker import Worker

BLOCKS = 32  # of positions: a tenth and nine tenths need some vectors each
MAP = 20  # blocks of a side of an attention map: three triangles of 210 cells, which a page draws at once
CODED = ("layer", "method", "bits")
SEEN = ("layer", "tensor", "space")
TOKEN_ERRORS = coded(token_errors)


def head_chart(
    name: str,
    depends: tuple[str, ...],
    draw: Callable[..., alt.TopLevelMixin],
    caption: Callable[..., str],
    shape: Callable[[pl.DataFrame, Look], object] = lambda rows, look: None,
    more: Callable[[Look], dict[str, Any]] = lambda look: {},
    why: str = "",
) -> Chart:
    """A chart of one KV head, from a frame of all heads that depends on some settings.

    ``draw`` and ``caption`` take the rows, and what ``more`` gives.
    """
    return Chart(
        name,
        ("head", *depends),
        lambda frames, look: frames[0].filter(head=look.head),
        lambda rows, look: draw(rows, **more(look)),
        lambda rows, look: caption(rows, **more(look)),
        shape,
        lambda look: [(name, *(getattr(look, setting) for setting in depends))],
        why,
    )


class HeadPage(ChartPage):
    """Charts of one KV head of one layer, under a method at a number of bits, measured on a capture.

    A subclass has ``CHARTS``, and ``RARE``: those that not every model has, the part of a layer's capture that they
    need, and a sentence for where that is missing.
    """

    CHARTS: ClassVar[Sequence[Chart]]
    RARE: ClassVar[tuple[tuple[str, ...], str, str]]

    tensor: Any = "keys"
    layer = Chosen("layer", read="shown_layer", help="layer that is seen, by its index in the prompt cache")
    head = Chosen("head", help="KV head of the layer that is seen")
    method = Chosen("method", help="a method's id")
    bits = ChosenBits(
        "", "shown_layer", help="code bits of each coordinate, 1 to 8 by the method; the label says of which layers"
    )

    @checked()
    def __init__(
        self,
        capture: Capture,
        *,
        layer: int | None = None,
        head: int = 0,
        method: str = "turboquant",
        bits: int = 2,
        calibration: Calibration | None = None,
        selection: Selection | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        chosen: dict[str, Any] = {"layer": layer, "head": head, "method": method, "key_bits": bits, "value_bits": bits}
        selection = selection or Selection.of(capture, Fitting(given=calibration), **chosen)
        super().__init__(selection, worker, capture, **settings)
        self._width = self._bits("bits")
        rare, needs, self._missing = self.RARE
        if all(getattr(layer, needs) is not None for layer in capture.layers):
            rare, self._missing = (), ""
        self._draw(chart for chart in self.CHARTS if chart.name not in rare)
        self._laid_out(
            [self._controls(), status([self._banner, self._message], self.progress())], columns(self.charts.values())
        )
        self.follow()

    def _likely(self) -> Iterable[Look]:
        chosen, fitting = self.selection, self.selection.fitting
        looks = [self._look(layer=self.layer + step) for step in (1, -1) if self.layer + step in chosen.layers]
        ready = [b for b in chosen.widths if abs(b - self.bits) == 1 and fitting.is_ready(self.method, b)]
        looks += [self._look(bits=bits) for bits in ready]
        others = [m for m in chosen.methods if self.bits in fitting.widths(m) and fitting.is_ready(m, self.bits)]
        return looks + [self._look(method=method) for method in others if method != self.method]

    @property
    def notes(self) -> list[str]:
        """Which chart is missing, and what the bits are of."""
        own, note = self.selection.choice.own_bits, ""
        if self.layer in own:
            note = f"These are bits of layer {self.layer} alone."
        elif own:
            note = f"These are bits of all layers but {', '.join(map(str, sorted(own)))}."
        return [*super().notes, self._missing, note]

    def _redraw(self) -> None:
        super()._redraw()
        scope = f"layer {self.layer}" if self.layer in self.selection.choice.own_bits else "all"
        self._width.description = f"{self.tensor[0].upper()} bits ({scope})"

    def _controls(self, *own: ipywidgets.Widget) -> ipywidgets.Widget:
        layers, heads = self.selection.layers, range(self.selection.heads)
        steps = ipywidgets.SelectionSlider
        return controls(
            self._control(steps, "layer", options=layers),
            self._control(steps, "head", options=heads),
            *own,
            self._methods(),
            self._width,
        )


def _attention(seen: Capture, **given: Any) -> pl.DataFrame:
    (layer,) = seen.layers
    kv_heads = layer.keys.shape[1]
    group = 1 if layer.queries is None else layer.queries.shape[1] // kv_heads
    maps = [attention_map(layer, head * group, blocks=MAP, **given) for head in range(kv_heads)]
    return pl.concat(own.with_columns(head=pl.lit(head)) for head, own in enumerate(maps))


def _by_head(errors: pl.DataFrame, pool: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    heads = errors["head"].unique().sort()
    return pl.concat(pool(errors.filter(head=head)).with_columns(head=pl.lit(head)) for head in heads)


def _by_bits(page: ChartPage, progress: Progress, layer: int, method: str, widths: Sequence[float]) -> pl.DataFrame:
    tokens, taken = [], []
    for done, bits in enumerate(widths):
        progress(done, len(widths), f"measuring {bits_said(bits)}")
        of = page, progress, layer, method, bits
        tokens.append(TOKEN_ERRORS(*of))
        taken.append(coded(code_bits)(*of).with_columns(bits=pl.lit(bits, pl.Float64)))
    return _by_head(pl.concat(tokens), lambda own: errors_by_bits(own, pl.concat(taken)))


def _attention_caption(frame: pl.DataFrame, where: str) -> str:
    return f"{where}: {views.attention_caption(frame)}"


class ErrorExplorer(HeadPage):
    """See what a method at a number of bits does to one KV head: its attention map, and where errors come from.

    Every token is seen through its codes. ``method``, ``bits``: what codes the keys and values. The attention map is
    that of the first query head of ``head``. All else is as `KeyExplorer` has it; the ``charts`` are ``attention``,
    ``positions``, ``distribution``, ``logits`` and ``by_bits``.
    """

    NAME = "errors"
    HELP = "00_tour.ipynb#3. Where are the errors?"
    SETTINGS = ("layer", "head", "method", "bits")
    TALL = ("attention",)
    MEASURES: ClassVar[dict[str, Measure]] = {
        "attention": coded(_attention),
        "positions": lambda *of: _by_head(TOKEN_ERRORS(*of), lambda own: errors_along_position(own, blocks=BLOCKS)),
        "distribution": lambda *of: _by_head(TOKEN_ERRORS(*of), error_densities),
        "by_bits": _by_bits,
        "logits": coded(score_errors),
    }
    CHARTS = (
        head_chart(
            "attention",
            CODED,
            lambda frame, where: views.attention_maps(frame, caption=_attention_caption(frame, where)),
            _attention_caption,
            why="Whether queries still look at the same keys.",
            more=lambda at: {"where": f"{at.method} at {bits_said(at.bits)}, layer {at.layer}, KV head {at.head}"},
        ),
        head_chart(
            "positions",
            CODED,
            views.errors_along_position,
            views.profile_caption,
            why="Whether early or late tokens lose more.",
        ),
        head_chart(
            "distribution",
            CODED,
            views.error_distribution,
            views.distribution_caption,
            why="Whether a few vectors lose far more than most.",
        ),
        head_chart(
            "logits",
            CODED,
            views.logit_errors,
            views.logits_caption,
            why="What hurts this head: bits are needed there.",
        ),
        head_chart(
            "by_bits",
            ("layer", "method", "widths"),
            views.errors_by_bits,
            views.by_bits_caption,
            why="What one more bit is worth.",
        ),
    )
    RARE = ("attention", "logits"), "queries", "Not every layer shows its queries, so there are no attention maps."

    @property
    def summary(self) -> str:
        said = self.charts["positions"].content["params"]["caption"]
        return f"layer {self.layer}, KV head {self.head}, {self.method}: {said}"

    @property
    def notes(self) -> list[str]:
        key_bits, value_bits = self.selection.choice.bits_of(self.layer)
        both = f"Values are seen at {bits_said(key_bits)} too; in the cache they have {value_bits}."
        return [*super().notes, both if key_bits != value_bits else ""]

    def _look(self, **changed: Any) -> Look:
        look, fitting = super()._look(**changed), self.selection.fitting
        widths = fitting.widths(look.method)
        whole = [w for w in widths if isinstance(w, int) and fitting.is_ready(look.method, w)]
        look.widths = tuple(sorted({look.bits, *whole}))
        return look


class KeyExplorer(HeadPage):
    """See one KV head's keys or values in the spaces in which methods code them.

    Everything is measured on the capture, once. Nothing here needs the model or a network.

    ``capture``: what `veloxlab.capture` gave. ``layer``: index in the prompt cache to begin with; the capture's first
    by default. ``head``: KV head. ``method``, ``bits``: whose levels are drawn; the bits are those of what is shown,
    the keys or the values. ``calibration``: what `veloxlab.calibrate` gave, for a method that has to be fitted.
    ``settings``: ``tensor="values"``, ``space="rotated"`` or another of `veloxlab.measure.distributions.SPACES`. Raises
    `InputError` for a choice that there is not, or that cannot be measured.

    All of them but the capture and the calibration are traits: set them and the ``charts`` follow, each a `ChartView`,
    by name: ``channels``, ``density``, ``levels``, ``spectrum`` and, where every layer has a known RoPE, ``pairs``.
    """

    NAME = "keys"
    HELP = "12_key_distributions.ipynb#1. Outlier channels"
    SETTINGS = ("layer", "head", "tensor", "space", "method", "bits")
    MEASURES: ClassVar[dict[str, Measure]] = {
        "channels": lambda page, _, layer, tensor, space: channel_distributions(
            page.of_layer(layer), space, tensors=(tensor,)
        ),
        "density": lambda page, _, layer, tensor, space: densities(page.of_layer(layer), space, tensors=(tensor,)),
        "levels": coded(lambda seen, tensor, **of: level_densities(seen, tensors=(tensor,), **of), "tensor"),
        "spectrum": lambda page, _, layer, tensor: spectra(page.of_layer(layer), tensors=(tensor,)),
        "pairs": lambda page, _, layer: rope_pairs(page.of_layer(layer)),
    }
    CHARTS = (
        head_chart(
            "channels",
            SEEN,
            views.channel_ranges,
            views.channel_caption,
            # channels that are drawn in groups are no rows of the frame
            lambda frame, look: (look.tensor, look.space, frame.height if 3 * frame.height > MARKS else 0),
            why="Channels far larger than others waste the levels of all.",
        ),
        head_chart(
            "density",
            SEEN,
            views.density,
            views.density_caption,
            lambda _, look: look.space,
            why="What one table of levels has to fit.",
        ),
        head_chart(
            "levels",
            (*CODED, "tensor"),
            views.levels_on_density,
            views.levels_caption,
            lambda frame, look: (look.tensor, frame.filter(kind="level").height <= SHARES_SHOWN),
            more=lambda look: {"method": look.method},
            why="How well the method's levels fit what it quantizes.",
        ),
        head_chart(
            "spectrum",
            ("layer", "tensor"),
            views.spectrum,
            views.spectrum_caption,
            why="How many directions hold the energy: few can get most bits.",
        ),
        head_chart(
            "pairs",
            ("layer",),
            views.pair_energy,
            views.pair_caption,
            lambda frame, _: tuple(frame["wavelength"]),
            why="Which of the pairs that RoPE turns carry the keys.",
        ),
    )
    RARE = (
        ("pairs",),
        "rope",
        "Not every layer has a rotary embedding that is known, so there is no chart of its pairs.",
    )

    tensor = Checked(choice(*TENSORS), "keys", help="whether keys or values are seen")
    space = Checked(
        choice(*SPACES), "raw", help="space in which they are seen, such as that in which a method codes them"
    )

    @property
    def summary(self) -> str:
        said = self.charts["channels"].content["params"]["caption"]
        return f"{self.tensor}, {SPACE_WORDS[self.space]}, {self.method} at {bits_said(self.bits)}: {said}"

    def _likely(self) -> Iterable[Look]:
        spaces = [self._look(space=space) for space in SPACES]
        return [*super()._likely(), *spaces, *(self._look(tensor=tensor) for tensor in TENSORS)]

    def _controls(self, *own: ipywidgets.Widget) -> ipywidgets.Widget:
        spaces = [(SPACE_WORDS[space], space) for space in SPACES]
        tensor = self._control(ipywidgets.Dropdown, "tensor", options=TENSORS)
        return super()._controls(tensor, self._control(ipywidgets.Dropdown, "space", options=spaces), *own)
