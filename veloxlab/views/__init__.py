"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's."""

from veloxlab.views import theme

theme.enable()
