"""Notebook widgets: live charts, and long work with progress and cancel."""

from veloxlab.widgets.chart_view import ChartView, VegaRuntime, link

__all__ = ["ChartView", "VegaRuntime", "link"]
