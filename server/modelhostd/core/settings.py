"""Settings: their ranges."""

from modelhostd.core.errors import invalid
from modelhostd.core.eviction import POLICIES
from modelhostd.core.resources import Settings
from modelhostd.core.storage import POLICIES as STORAGE_POLICIES

HOUR_S = 3600.0
YEARS_S = 3650 * 86_400.0

HOST_BUDGET_MAX = 1 << 50


def check_settings(settings: Settings) -> None:
    """Raise INVALID_ARGUMENT for a setting out of its range."""
    for name, low, high in (
        ("max_concurrent_downloads", 1, 64),
        ("max_concurrent_loads", 1, 64),
        ("queue_limit", 1, 65_536),
        ("drain_timeout_s", 0.0, 3600.0),
        ("min_residency_s", 0.0, 86_400.0),
        ("download_rate_limit_bytes_per_second", 0, 1 << 50),
        ("disk_budget_bytes", 0, 1 << 60),
        ("storage_ttl_s", HOUR_S, YEARS_S),
        ("verify_rate_bytes_per_second", 1 << 20, 1 << 50),
    ):
        value = getattr(settings, name)
        if not low <= value <= high:
            raise invalid(f"settings.{name.removesuffix('_s')}", f"{low} to {high}", value)
    for name in ("keep_alive", "host_keep_alive"):
        kept = getattr(settings, f"{name}_s")
        if kept is not None and not 0.0 <= kept <= 1e9:
            raise invalid(f"settings.{name}", "0 s or more", kept)
    budget = settings.host_budget_bytes
    if budget is not None and not 0 <= budget <= HOST_BUDGET_MAX:
        raise invalid("settings.host_budget_bytes", f"0 to {HOST_BUDGET_MAX}", budget)
    if settings.verify_interval_s and not HOUR_S <= settings.verify_interval_s <= YEARS_S:
        expected = f"0 (never) or {HOUR_S:g} to {YEARS_S:g} seconds"
        raise invalid("settings.verify_interval", expected, settings.verify_interval_s)
    if settings.storage_policy not in STORAGE_POLICIES:
        expected = " or ".join(STORAGE_POLICIES)
        raise invalid("settings.storage_policy", expected, settings.storage_policy)
    if settings.eviction_policy not in POLICIES:
        expected = " or ".join(POLICIES)
        raise invalid("settings.eviction_policy", expected, settings.eviction_policy)
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise invalid("settings.log_level", "debug, info, warning or error", settings.log_level)
