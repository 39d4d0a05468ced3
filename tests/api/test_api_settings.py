"""Settings on the wire: what is a value of one, and what is its default."""

from pathlib import Path
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import host_service_pb2 as pb
from modelhost.v1 import settings_pb2
from tests.api.support import CALL_S, failure, served


async def test_zero_is_a_value_of_a_setting_or_refused(tmp_path: Path) -> None:
    """Never the default, which is the field in the mask without a value."""
    numbers = ("max_concurrent_downloads", "max_concurrent_loads", "queue_limit")
    async with served(tmp_path) as it:

        def update(name: str, **value: int) -> Any:
            settings = settings_pb2.Settings(**value)  # type: ignore[arg-type]
            mask = FieldMask(paths=[name])
            request = pb.UpdateSettingsRequest(settings=settings, update_mask=mask)
            return it.admin.host.UpdateSettings(request, timeout=CALL_S)

        before = await it.user.host.GetSettings(pb.GetSettingsRequest(), timeout=CALL_S)
        for name, value in (*((n, 7) for n in numbers), ("verify_rate_bytes_per_second", 2**21)):
            assert getattr(await update(name, **{name: value}), name) == value
            error = await failure(update(name, **{name: 0}))
            assert error.reason == "INVALID_ARGUMENT", name
            assert error.metadata["field"] == f"settings.{name}"
            assert getattr(await update(name), name) == getattr(before, name)
        for name in ("download_rate_limit_bytes_per_second", "disk_budget_bytes"):
            assert getattr(await update(name, **{name: 2**30}), name) == 2**30
            assert getattr(await update(name, **{name: 0}), name) == 0
