"""ResidencyService: parse, one call of the host, convert."""

from dataclasses import replace

from google.protobuf.empty_pb2 import Empty

from modelhost.v1 import instances_pb2, models_pb2, operations_pb2, options_pb2, slots_pb2
from modelhost.v1 import residency_service_pb2 as pb
from modelhostd.api import (
    convert,
    convert_from,
    convert_models,
    convert_tier,
    convert_values,
    lists,
)
from modelhostd.api.activity import Activity
from modelhostd.api.addressing import instance, model_id
from modelhostd.api.calls import Call
from modelhostd.api.methods import Service
from modelhostd.api.slots import SlotMethods
from modelhostd.core import names
from modelhostd.core import operations as op_rules
from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import Instance, InstanceState, Lease, Tier
from modelhostd.core.state import instance_key
from modelhostd.host import Host
from modelhostd.host.load_plans import Preview


def residency_service(host: Host) -> Service:
    """Return the service to offer."""
    descriptor = pb.DESCRIPTOR.services_by_name["ResidencyService"]
    return Service(descriptor, ResidencyService(host))


class ResidencyService(SlotMethods):
    """What is in memory."""

    # --- loading --------------------------------------------------------------------------------

    async def load_model(
        self, request: pb.LoadModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See LoadModel in the contract."""
        low, high = op_rules.PRIORITY_MIN, op_rules.PRIORITY_MAX
        if not low <= request.priority <= high:
            raise invalid("priority", f"{low} to {high}", request.priority)
        load = self._host.fetched_loads.load if request.download else self._host.residency.load
        operation = await load(
            model_id(self._state, "name", request.name),
            device=convert_from.optional_id("devices", "device", request.device),
            priority=request.priority or None,
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def unload_model(
        self, request: pb.UnloadModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See UnloadModel in the contract."""
        operation = await self._host.residency.unload(
            model_id(self._state, "name", request.name),
            call.principal,
            convert_from.request(call.method, request),
            keep_warm=request.keep_warm,
            force=request.force,
        )
        return convert.operation(operation)

    async def reload_model(
        self, request: pb.ReloadModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See ReloadModel in the contract."""
        if request.version < 0:
            raise invalid("version", "0 (the newest) or a version of the model", request.version)
        operation = await self._host.reloads.reload(
            model_id(self._state, "name", request.name),
            version=request.version,
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def plan_load(self, request: pb.PlanLoadRequest, call: Call) -> pb.PlanLoadResponse:
        """See PlanLoad in the contract."""
        key = model_id(self._state, "model", request.model)
        device = convert_from.optional_id("devices", "device", request.device)
        model = self._state.model(key)
        if device:
            self._state.device(device)
        views = self._host.occupancy.views()
        answer = pb.PlanLoadResponse(
            needed_bytes=self._host.occupancy.learned.needed_bytes(model, device),
            host_tier=convert_tier.host_tier(self._host.occupancy.host),
        )
        route = self._host.routes.get(key)
        if route is not None and route.open:
            answer.placement.CopyFrom(
                pb.PlanLoadResponse.Placement(
                    device=convert_values.named("devices", route.device),
                    loaded=True,
                    source_tier=instances_pb2.Instance.DEVICE,
                )
            )
            self._put_figures(answer, views[route.device])
            return answer
        try:
            preview = self._host.residency.loads.preview(key, device)
        except ModelhostError as error:
            if error.reason is Reason.DEVICE_NOT_FOUND:
                raise
            preview = Preview(rules.Refuse(error), 0)
        plan = preview.plan
        place = device or model.config.device
        if isinstance(plan, rules.Refuse):
            answer.refusal.CopyFrom(convert_values.error(op_rules.stored(plan.error)))
            place = plan.error.metadata.get("device", place)
        else:
            place = plan.device
            answer.placement.CopyFrom(self._placement(plan, preview, views[plan.device]))
        if place in views:
            self._put_figures(answer, views[place])
        return answer

    def _placement(
        self,
        plan: rules.Fits | rules.Evict | rules.Wait,
        preview: Preview,
        view: rules.DeviceView,
    ) -> pb.PlanLoadResponse.Placement:
        victims: tuple[str, ...] = ()
        if isinstance(plan, rules.Evict):
            victims = plan.victims
        elif isinstance(plan, rules.Wait):
            victims = plan.drain
        return pb.PlanLoadResponse.Placement(
            device=convert_values.named("devices", plan.device),
            victims=[
                self._victim(m, view, Tier.HOST if m in preview.stays_warm else Tier.DISK)
                for m in victims
            ],
            source_tier=convert.TIERS[preview.source],
            host_bytes=preview.host_bytes,
            dropped=[
                self._victim(
                    m,
                    self._host.occupancy.host.view(),
                    Tier.DISK if m in victims or self._host.routes.get(m) is None else Tier.DEVICE,
                )
                for m in preview.dropped
            ],
        )

    def _victim(
        self, model: str, view: rules.DeviceView, tier_after: Tier
    ) -> pb.PlanLoadResponse.Victim:
        holding = next(h for h in view.holdings if h.model == model)
        found = self._host.registry.decided.instance_of(model)
        used = Activity(self._host).last_used_times().get(model, 0.0)
        return pb.PlanLoadResponse.Victim(
            instance=convert_values.instance_name(model, found.id) if found is not None else "",
            model=convert_values.named("models", model),
            freed_bytes=holding.bytes,
            last_used_time=convert_values.timestamp(used or (found.ready_time if found else 0.0)),
            busy=not holding.idle,
            tier_after=convert.TIERS[tier_after],
        )

    @staticmethod
    def _put_figures(answer: pb.PlanLoadResponse, view: rules.DeviceView) -> None:
        answer.free_bytes = max(0, view.free_bytes)
        answer.evictable_bytes = sum(h.bytes for h in view.holdings if h.idle)
        answer.budget_bytes = view.capacity_bytes

    # --- instances ------------------------------------------------------------------------------

    async def get_instance(
        self, request: pb.GetInstanceRequest, call: Call
    ) -> instances_pb2.Instance:
        """See GetInstance in the contract."""
        return self._shown(instance(self._state, "name", request.name), Activity(self._host))

    async def list_instances(
        self, request: pb.ListInstancesRequest, call: Call
    ) -> pb.ListInstancesResponse:
        """See ListInstances in the contract."""
        model = model_id(self._state, "model", request.model) if request.model else ""
        device = convert_from.optional_id("devices", "device", request.device)
        kind = instances_pb2.Instance.State
        states = {InstanceState[n] for n in convert_from.enums("states", kind, request.states)}
        found = [
            i
            for i in self._state.instances.values()
            if model in ("", i.model)
            and device in ("", i.device)
            and (not states or i.state in states)
        ]
        activity = Activity(self._host)

        def key(item: Instance) -> str:
            return instance_key(item.model, item.id)

        instances, token = lists.page(
            request, sorted(found, key=key), key, lambda i: self._shown(i, activity)
        )
        return pb.ListInstancesResponse(
            instances=instances,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def check_instance(
        self, request: pb.CheckInstanceRequest, call: Call
    ) -> instances_pb2.Instance:
        """See CheckInstance in the contract."""
        found = instance(self._state, "name", request.name)
        if found.state is not InstanceState.READY:
            return self._shown(found, Activity(self._host))
        health, why = await self._host.health.check(found.model)
        await self._host.registry.flush()
        now = self._host.clock.time()
        checked = instance(self._state, "name", request.name)
        checked = replace(checked, health=health, health_message=why, health_time=now)
        return self._shown(checked, Activity(self._host))

    def _shown(self, found: Instance, activity: Activity) -> instances_pb2.Instance:
        return convert.instance(found, activity.of(found))

    # --- leases ---------------------------------------------------------------------------------

    async def acquire_lease(self, request: pb.AcquireLeaseRequest, call: Call) -> slots_pb2.Lease:
        """See AcquireLease in the contract."""
        lease = await self._host.leases.acquire(
            model_id(self._state, "model", request.model),
            _ttl(request),
            call.principal,
            convert_from.request(call.method, request),
        )
        return convert.lease(lease)

    async def renew_lease(self, request: pb.RenewLeaseRequest, call: Call) -> slots_pb2.Lease:
        """See RenewLease in the contract."""
        key = names.parse("leases", "name", request.name)
        self._own(self._host.leases.get(key), call)
        return convert.lease(await self._host.leases.renew(key, _ttl(request), call.principal))

    async def release_lease(self, request: pb.ReleaseLeaseRequest, call: Call) -> Empty:
        """See ReleaseLease in the contract."""
        key = names.parse("leases", "name", request.name)
        lease = self._state.leases.get(key)
        if lease is not None:
            self._own(lease, call)
        await self._host.leases.release(key, call.principal)
        return Empty()

    @staticmethod
    def _own(lease: Lease, call: Call) -> None:
        if lease.principal != call.principal:
            call.require(options_pb2.OPERATE, f"the lease of '{lease.principal}'")

    # --- pins and blocks ------------------------------------------------------------------------

    async def pin_model(self, request: pb.PinModelRequest, call: Call) -> models_pb2.Model:
        """See PinModel in the contract."""
        key = model_id(self._state, "name", request.name)
        return convert_models.model(await self._host.models.pin(key, True, call.principal))

    async def unpin_model(self, request: pb.UnpinModelRequest, call: Call) -> models_pb2.Model:
        """See UnpinModel in the contract."""
        key = model_id(self._state, "name", request.name)
        return convert_models.model(await self._host.models.pin(key, False, call.principal))

    async def unblock_model(self, request: pb.UnblockModelRequest, call: Call) -> models_pb2.Model:
        """See UnblockModel in the contract."""
        key = model_id(self._state, "name", request.name)
        await self._host.residency.unblock(key)
        return convert_models.model(self._state.model(key))


def _ttl(request: pb.AcquireLeaseRequest | pb.RenewLeaseRequest) -> float | None:
    if not request.HasField("time_to_live"):
        return None
    return convert_from.seconds("time_to_live", request.time_to_live)
