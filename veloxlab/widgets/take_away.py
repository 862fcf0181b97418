"""A plan taken away: a box for its file, and the lines of code that use it."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import ipywidgets

from veloxlab.allocate.plan import Plan
from veloxlab.errors import InputError


class TakeAway(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Save a plan, and show how to use it.

    Parameters
    ----------
    plan : gives the plan as it is now.
    path : of the file to begin with.
    """

    def __init__(self, plan: Callable[[], Plan], path: str = "budget_plan.json") -> None:
        self._plan = plan
        self.path = ipywidgets.Text(
            path, description="file", tooltip="Where to save the plan", style={"description_width": "104px"},
            layout={"width": "352px"},
        )  # fmt: skip
        self.button = ipywidgets.Button(description="Save plan", tooltip="Write the plan as JSON, whole or not at all")
        self.said = ipywidgets.HTML()
        self.code = ipywidgets.HTML()
        self.button.on_click(lambda _: self._clicked())
        self.path.observe(lambda _: self._tell_code(), "value")
        self._tell_code()
        super().__init__([ipywidgets.HBox([self.path, self.button]), self.said, self.code])

    def save(self, path: str | Path | None = None) -> Path:
        """Write the plan and give the file's full path.

        Raises
        ------
        InputError : there is no such folder, it is no place for a file, or it cannot be written.
        """
        return self._plan().save(Path(self.path.value.strip() if path is None else path).expanduser().absolute())

    def _clicked(self) -> None:
        try:
            said = f"Saved to {self.save()}"
        except InputError as error:
            said = str(error)
        self.said.value = f"<em>{html.escape(said)}</em>"

    def _tell_code(self) -> None:
        lines = [
            f"plan = vl.Plan.load({json.dumps(self.path.value.strip(), ensure_ascii=False)})",
            "cache = vl.make_cache(model, plan)",
            "mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)",
        ]
        self.code.value = f"<pre style='line-height: 1.4; margin: 4px 0'>{html.escape(chr(10).join(lines))}</pre>"
