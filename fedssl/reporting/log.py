"""What the log of a deployed run holds of a round."""

import logging

from fedssl.runs.metrics import RoundMetrics, Where


def log_round(log: logging.Logger, metrics: RoundMetrics) -> None:
    """Write a round's numbers, failures and warnings."""
    numbers = metrics.texts(Where.LOG).items()
    told = ", ".join(f"{label} {text}" for label, text in numbers if text is not None)
    log.info("round %d: %s", metrics.round, told)
    for failure in metrics.failures:
        log.warning("  without client %d: %s", failure.partition, failure.reason)
    for warning in metrics.warnings:
        log.warning("  %s", warning)
