"""The exception for bad input: a sentence that names the thing, the value and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a user. Its message is one or two complete sentences.

    In a notebook IPython shows the sentence alone (``_render_traceback_``); the command line prints it and exits
    with status 2. Everywhere else it is an ordinary ``ValueError`` with its trace.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
