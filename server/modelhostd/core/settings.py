"""Settings: their ranges."""

from modelhostd.core.errors import invalid
from modelhostd.core.eviction import POLICIES
from modelhostd.core.resources import Settings


def check_settings(settings: Settings) -> None:
    """Raise INVALID_ARGUMENT for a setting out of its range."""
    for name, low, high in (
        ("max_concurrent_downloads", 1, 64),
        ("max_concurrent_loads", 1, 64),
        ("queue_limit", 1, 65_536),
        ("drain_timeout_s", 0.0, 3600.0),
        ("min_residency_s", 0.0, 86_400.0),
        ("download_rate_limit_bytes_per_second", 0, 1 << 50),
    ):
        value = getattr(settings, name)
        if not low <= value <= high:
            raise invalid(f"settings.{name.removesuffix('_s')}", f"{low} to {high}", value)
    if settings.keep_alive_s is not None and not 0.0 <= settings.keep_alive_s <= 1e9:
        raise invalid("settings.keep_alive", "0 s or more", settings.keep_alive_s)
    if settings.eviction_policy not in POLICIES:
        expected = " or ".join(POLICIES)
        raise invalid("settings.eviction_policy", expected, settings.eviction_policy)
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise invalid("settings.log_level", "debug, info, warning or error", settings.log_level)
