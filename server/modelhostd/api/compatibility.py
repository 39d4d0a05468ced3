"""CheckCompatibility: gathers what core's checks compare with."""

from collections.abc import Callable, Collection, Mapping

from modelhost.v1 import model_service_pb2 as pb
from modelhostd.api import convert_values
from modelhostd.core import compatibility as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Model
from modelhostd.host import Host

Installed = Callable[[str], str]
"""Returns the version of an installed package, or an empty text."""

Backends = Callable[[], Mapping[str, Collection[str]] | None]
"""Returns the tasks that each usable backend serves (``*`` = any), or None while that is not known."""

_OUTCOMES = {
    outcome: pb.CheckCompatibilityResponse.Check.Outcome.Value(outcome.name)
    for outcome in rules.Outcome
}


class Compatibility:
    """Checks models against the devices of this host."""

    def __init__(self, host: Host, installed: Installed | None, backends: Backends) -> None:
        self._host = host
        self._installed = installed
        self._backends = backends

    async def check(self, model: Model, device_id: str) -> pb.CheckCompatibilityResponse:
        """Return every check for a device; an empty id means the model's own, else the best."""
        state = self._host.registry.committed
        around = rules.Surroundings(
            capacity_bytes={
                key: self._host.occupancy.capacity_bytes(device)
                for key, device in state.devices.items()
            },
            free_disk_bytes=await self._free_disk_bytes(),
            packages=self._packages(model),
            backends=self._backends(),
        )
        if device_id:
            device = state.device(device_id)
        else:
            device = rules.best_device(model, list(state.devices.values()), around)
        checks = rules.check(model, device, around)
        return pb.CheckCompatibilityResponse(
            compatible=all(c.outcome is not rules.Outcome.FAILED for c in checks),
            device=convert_values.named("devices", device.id),
            checks=[
                pb.CheckCompatibilityResponse.Check(
                    id=c.id,
                    outcome=_OUTCOMES[c.outcome],
                    needed=c.needed,
                    available=c.available,
                    message=c.message,
                )
                for c in checks
            ],
        )

    def _packages(self, model: Model) -> Mapping[str, str]:
        if self._installed is None:
            return {}
        named = {rules.package_name(r) for r in model.requirements.packages}
        return {name: self._installed(name) for name in sorted(named - {""})}

    async def _free_disk_bytes(self) -> int | None:
        try:
            return (await self._host.storage.use()).room.available_bytes
        except ModelhostError:
            return None
