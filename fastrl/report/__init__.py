"""What a run leaves for people: metrics and completions logs, a live panel, an HTML report, other trackers."""

from fastrl.report.completions import CompletionSample, CompletionsLog, read_completions, samples_of
from fastrl.report.html import write_report
from fastrl.report.log import (
    COMPLETIONS_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    ERRORS_FILE,
    METRICS_FILE,
    JsonLines,
    MetricsLog,
    log_errors,
    read_log,
)
from fastrl.report.panel import Panel
from fastrl.report.trackers import Tracker, open_tracker
from fastrl.report.verl_names import VERL_NAMES, with_verl_names

__all__ = [
    "COMPLETIONS_FILE",
    "CONFIG_FILE",
    "ENVIRONMENT_FILE",
    "ERRORS_FILE",
    "METRICS_FILE",
    "VERL_NAMES",
    "CompletionSample",
    "CompletionsLog",
    "JsonLines",
    "MetricsLog",
    "Panel",
    "Tracker",
    "log_errors",
    "open_tracker",
    "read_completions",
    "read_log",
    "samples_of",
    "with_verl_names",
    "write_report",
]
