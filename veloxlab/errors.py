"""The one exception that bad input raises: a sentence that names the thing, the value and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a person. Its message is one or two sentences, meant to be read as they are.

    In a notebook IPython shows the sentence alone (``_render_traceback_``); the command line prints it and exits
    with status 2. Everywhere else it is an ordinary ``ValueError`` with its trace.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
