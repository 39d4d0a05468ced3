"""The figures of one moment: what GetStatistics answers."""

from collections.abc import Callable, Collection, Sequence

from modelhost.v1 import host_pb2
from modelhostd.api import convert, convert_values
from modelhostd.api.activity import Activity
from modelhostd.core.resources import FINAL_STATES, OperationKind
from modelhostd.core.values import dataclass
from modelhostd.host import Host

MODELS_MAX = 100


@dataclass(slots=True)
class Gauges:
    """Figures that other parts of the server know; each is set by whoever builds them."""

    daemon_bytes: Callable[[], int] = lambda: 0
    inference_bytes: Callable[[], int] = lambda: 0
    subscriber_count: Callable[[], int] = lambda: 0


class Statistics:
    """Takes the figures of the host."""

    def __init__(self, host: Host, gauges: Gauges) -> None:
        self._host = host
        self._gauges = gauges

    def take(self, models: Collection[str] = ()) -> host_pb2.Statistics:
        """Return the figures now; ``models`` (ids, at most MODELS_MAX) narrows instances and operations (empty =
        all).
        """
        host, state = self._host, self._host.registry.committed
        return host_pb2.Statistics(
            time=convert_values.timestamp(host.clock.time()),
            sequence=host.registry.journal.last_sequence,
            store_id=host.registry.store_id,
            uptime=convert_values.duration(max(0.0, host.clock.time() - host.start_time)),
            devices=self._devices(),
            instances=self._instances(models),
            operations=self._operations(models),
            model_count=len(state.models),
            in_flight=host.inference.in_flight,
            queued=sum(host.routes.queued(m) for m in state.models),
            request_count=host.inference.request_count,
            error_count=host.inference.error_count,
            inference_bytes=self._gauges.inference_bytes(),
            subscriber_count=self._gauges.subscriber_count(),
            download_bytes_per_second=sum(
                host.operations.live(o).progress.bytes_per_second
                for o in state.operations.values()
                if o.kind is OperationKind.DOWNLOAD and o.state not in FINAL_STATES
            ),
            daemon_bytes=self._gauges.daemon_bytes(),
            host_tier_bytes=host.occupancy.host.used_bytes,
            host_tier_budget_bytes=host.occupancy.host.budget_bytes,
        )

    def _devices(self) -> Sequence[host_pb2.Statistics.DeviceStatistics]:
        found = []
        views = self._host.occupancy.views()
        for stored in self._host.registry.committed.devices.values():
            device = self._host.live_device(stored)
            view = views.get(device.id)
            found.append(
                host_pb2.Statistics.DeviceStatistics(
                    device=convert_values.named("devices", device.id),
                    budget_bytes=device.budget_bytes,
                    reserved_bytes=device.reserved_bytes,
                    resident_bytes=device.resident_bytes,
                    foreign_bytes=device.foreign_bytes,
                    free_bytes=max(0, view.free_bytes) if view is not None else 0,
                )
            )
        return found

    def _instances(
        self, models: Collection[str]
    ) -> Sequence[host_pb2.Statistics.InstanceStatistics]:
        activity = Activity(self._host)
        return [
            host_pb2.Statistics.InstanceStatistics(
                instance=convert_values.instance_name(i.model, i.id),
                model=convert_values.named("models", i.model),
                device=convert_values.named("devices", i.device),
                state=convert.INSTANCE_STATES[i.state],
                tier=convert.TIERS[i.tier],
                device_bytes=self._host.occupancy.ledger.held(i.device, i.model),
                host_bytes=self._host.occupancy.host.held_bytes(i.model),
                activity=activity.of(i),
                predicted_bytes=i.predicted_bytes,
                health=convert.HEALTHS[i.health],
            )
            for i in self._host.registry.committed.instances.values()
            if not models or i.model in models
        ]

    def _operations(
        self, models: Collection[str]
    ) -> Sequence[host_pb2.Statistics.OperationStatistics]:
        return [
            host_pb2.Statistics.OperationStatistics(
                operation=convert_values.named("operations", o.id),
                kind=convert.OPERATION_KINDS[o.kind],
                model=convert_values.named("models", o.model),
                state=convert.OPERATION_STATES[o.state],
                progress=convert.progress(self._host.operations.live(o).progress),
            )
            for o in self._host.registry.committed.operations.values()
            if o.state not in FINAL_STATES and (not models or o.model in models)
        ]
