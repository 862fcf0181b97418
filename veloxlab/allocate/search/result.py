"""What a search found: all candidates in a frame, the Pareto front, and their plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import altair as alt
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import views
from veloxlab.allocate.search.candidates import Candidate, PlannedModel
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import Plan
from veloxlab.checks import FILE, checked, whole
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.store import read_parquet, reading, write_parquet

FORMAT = "veloxlab search 2"

SEARCHED: dict[str, type[pl.DataType] | pl.DataType] = {
    "row": pl.Int32,  # of the candidate, for `SearchResult.plan`
    "method": pl.String,
    "key_bits": pl.Int32,  # code bits per coordinate
    "value_bits": pl.Int32,
    "sinks": pl.Int32,  # tokens
    "window": pl.Int32,
    "protected": pl.List(pl.Int32),  # layers left exact
    "bytes_per_token": pl.Float64,  # held at the context's length, tables included
    "windows": pl.Int32,  # of text that it was measured on, before it was dropped or the text ended
    "kl": pl.Float64,  # mean KL(exact ‖ compressed) of the next token over those windows, nats; null if not measured
    "low": pl.Float64,  # ends of its interval, Student's t over the windows; null below two windows
    "high": pl.Float64,
    "top1_flips": pl.Float64,  # share of predictions whose most likely token changed
    "seconds": pl.Float64,  # that its measurements took
    "state": pl.String,  # "over budget", which was not run, or as `veloxlab.allocate.search.race.Entrant`
}
"""Columns of `SearchResult.frame`."""


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """What `search` found.

    Attributes
    ----------
    frame : all candidates, `SEARCHED`, by their bytes.
    shape : of the model.
    calibrations : identities of the calibrations that were used, by method.
    settings : arguments of `search` that the numbers depend on; of a text of one's own, sixteen hex digits.
    """

    frame: pl.DataFrame
    shape: PlannedModel
    calibrations: Mapping[str, str]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """A stable line."""
        return f"SearchResult(candidates={self.frame.height}, front={self.front.height})"

    @property
    def front(self) -> pl.DataFrame:
        """The measured Pareto front, from the fewest bytes up."""
        return self.frame.filter(state="front")

    def chart(self) -> alt.VConcatChart:
        """The front, and behind it all else that was measured; a point's tooltip says its settings."""
        return views.pareto_front(self.frame)

    @checked(row=whole(0))
    def plan(self, row: int) -> Plan:
        """The plan of a candidate, by its number in the column ``row``; raises `InputError` if there is none.

        If its method is calibrated, `veloxlab.make_cache` wants the `calibration` beside it.
        """
        found = self.frame.filter(row=row)
        if found.is_empty():
            raise InputError(f"This search has no row {row!r}: take a number of its frame's column 'row'.")
        candidate = Candidate(*found.select(f.name for f in fields(Candidate)).row(0))
        return candidate.plan(self.shape, self.calibrations.get(candidate.method))

    @checked()
    def calibration(
        self,
        model: Module,
        tokenizer: Any,  # noqa: ANN401
        method: str,
        *,
        folder: str | Path | None = None,
    ) -> Calibration:
        """The calibration that the plans of a ``method`` want: kept since the search, or made again."""
        rows = self.frame.filter(method=method)
        if method not in self.calibrations:
            raise InputError(f"{method} was not calibrated in this search: its plans need none.")
        widths = sorted({*rows["key_bits"].to_list(), *rows["value_bits"].to_list()})
        return calibrate(model, tokenizer, method, bits=widths, folder=folder)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write it as Parquet with a checksum, and return the path; raises `InputError` where it cannot be written."""
        path = Path(path)
        said = {"shape": asdict(self.shape), "calibrations": dict(self.calibrations), "settings": dict(self.settings)}
        write_parquet(path, self.frame, FORMAT, said)
        return path

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `InputError` for a file that is missing, damaged or no search."""
        with reading("search", Path(path), "make it again with vl.search"):
            frame, said = read_parquet(Path(path), FORMAT)
            return cls(
                frame.match_to_schema(SEARCHED), PlannedModel(**said["shape"]), said["calibrations"], said["settings"]
            )
