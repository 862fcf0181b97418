"""Notebook widgets: live charts, and long work with progress and cancel."""

from veloxlab.widgets.chart_view import ChartView, VegaRuntime, link
from veloxlab.widgets.panel import ProgressBar
from veloxlab.widgets.worker import Cancelled, Progress, Status, Worker

__all__ = ["Cancelled", "ChartView", "Progress", "ProgressBar", "Status", "VegaRuntime", "Worker", "link"]
