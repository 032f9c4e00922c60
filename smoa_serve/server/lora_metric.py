"""`vllm:lora_requests_info` as routers read it: one series, with the names that users know."""

from collections.abc import Callable
from typing import Any

from prometheus_client import Gauge

from smoa_serve.registry.revisions import visible_name


class OneSeries:
    """In the place of vLLM's gauge. In stock vLLM every combination of names that ever ran together stays as a series
    of its own.

    Args:
        gauge: vLLM's.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._shown: tuple[str, ...] | None = None

    def labels(self, **labels: Any) -> Gauge:
        """The series of these labels, after the one before was taken away."""
        values = tuple(_visible(str(labels[name])) for name in self._gauge._labelnames)
        if self._shown is not None and self._shown != values:
            self._gauge.remove(*self._shown)
        self._shown = values
        return self._gauge.labels(*values)


def _visible(names: str) -> str:
    """Each name once: two revisions of an adapter are one to its users."""
    return ",".join(dict.fromkeys(visible_name(name) for name in names.split(",")))


def keep_one_series(wrapped: Callable[..., None], logger: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A wrapper of `PrometheusStatLogger.__init__`."""
    wrapped(*args, **kwargs)
    gauge = getattr(logger, "gauge_lora_info", None)
    if isinstance(gauge, Gauge):  # Ray has a gauge of its own
        logger.gauge_lora_info = OneSeries(gauge)
