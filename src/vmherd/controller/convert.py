"""Between the model and the messages of the public API."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from vmherd.api.v1 import controller_pb2, instance_pb2
from vmherd.controller.views import InstanceChange, Progress, Snapshot
from vmherd.model.errors import FieldViolation, InvalidArgument
from vmherd.model.instance import Exit, Instance, LaunchSpec, NetworkInterface
from vmherd.model.machine import PortForward, Protocol
from vmherd.model.network import Network
from vmherd.model.readiness import Rung

WAIT_TIMEOUT_DEFAULT_S = 120.0
TIMEOUT_MAX_S = 24 * 3600.0
DEFAULT_IMAGE = "builtin"


def fingerprint(request: Message) -> str:
    """Tells whether two requests ask for the same, whatever their request ids."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    text = f"{copy.DESCRIPTOR.full_name}\n".encode() + copy.SerializeToString(deterministic=True)
    return hashlib.sha256(text).hexdigest()


PROTOCOLS = {
    instance_pb2.PortForward.PROTOCOL_UNSPECIFIED: Protocol.TCP,
    instance_pb2.PortForward.TCP: Protocol.TCP,
    instance_pb2.PortForward.UDP: Protocol.UDP,
}


def launch_spec(request: controller_pb2.LaunchRequest) -> LaunchSpec:
    """What a user asks for.

    Raises:
        InvalidArgument: there is no such protocol; protobuf lets any number pass.
    """
    unknown = [
        FieldViolation(f"nics[{i}].forwards[{j}].protocol", f"must be TCP or UDP, is {forward.protocol}")
        for i, nic in enumerate(request.nics)
        for j, forward in enumerate(nic.forwards)
        if forward.protocol not in PROTOCOLS
    ]
    if unknown:
        raise InvalidArgument.of(unknown)
    hardware = request.hardware
    return LaunchSpec(
        name=request.name,
        image=request.image or DEFAULT_IMAGE,
        cpus=hardware.cpus if hardware.HasField("cpus") else None,
        memory_mib=hardware.memory_mib if hardware.HasField("memory_mib") else None,
        start=request.start if request.HasField("start") else True,
        labels=dict(request.labels),
        request_id=request.request_id,
        nics=tuple(map(_asked, request.nics)),
        autostart=request.autostart,
    )


def _asked(nic: instance_pb2.Nic) -> NetworkInterface:
    return NetworkInterface(
        network=nic.network,
        mac=nic.mac.lower(),
        ipv4_address=nic.ipv4_address,
        ipv6_address=nic.ipv6_address,
        forwards=tuple(
            PortForward(PROTOCOLS[forward.protocol], forward.guest_port, forward.host_port) for forward in nic.forwards
        ),
    )


def seconds(
    request: Message, field: str, *, default_s: float, minimum_s: float = 0.0, maximum_s: float = TIMEOUT_MAX_S
) -> float:
    """A duration of a request in seconds, within bounds.

    Raises:
        InvalidArgument: it is out of bounds.
    """
    if not request.HasField(field):
        return default_s
    duration: Duration = getattr(request, field)
    value_s = duration.seconds + duration.nanos / 1e9
    if not minimum_s <= value_s <= maximum_s:
        raise InvalidArgument.of(
            [FieldViolation(field, f"must be from {minimum_s:g} s to {maximum_s:g} s, is {value_s:g} s")]
        )
    return value_s


def rung_of(condition: controller_pb2.WaitRequest.Condition.ValueType) -> Rung | None:
    """The rung that a wait is for; None when it is for the end.

    Raises:
        InvalidArgument: there is no such condition; protobuf lets any number pass.
    """
    conditions = controller_pb2.WaitRequest.Condition
    if condition not in conditions.values():
        known = ", ".join(conditions.keys()[1:])
        raise InvalidArgument.of([FieldViolation("until", f"must be one of {known}, is {condition}")])
    match conditions.Name(condition):
        case "STOPPED":
            return None
        case "CONDITION_UNSPECIFIED":
            return Rung.AGENT
        case name:
            return Rung[name]


def instance_message(snapshot: Snapshot) -> instance_pb2.Instance:
    """An instance."""
    return _instance(snapshot.instance, snapshot.revision)


def wait_message(progress: Progress) -> controller_pb2.WaitResponse:
    """Where a wait stands."""
    return controller_pb2.WaitResponse(instance=instance_message(progress.snapshot), waiting_for=progress.waiting_for)


def watch_message(change: InstanceChange) -> controller_pb2.WatchResponse:
    """One change."""
    return controller_pb2.WatchResponse(
        kind=controller_pb2.WatchResponse.Kind.Value(change.kind),
        revision=change.revision,
        instance=_instance(change.instance, change.revision) if change.instance else None,
    )


def plan_instance(instance: Instance) -> instance_pb2.Instance:
    """An instance that is only planned."""
    return _instance(instance, 0)


def network_message(network: Network) -> controller_pb2.Network:
    """A network of the host."""
    return controller_pb2.Network(
        name=network.name,
        bridge=network.bridge,
        subnet=str(network.subnet or ""),
        gateway=str(network.gateway or ""),
        ipv6_subnet=str(network.ipv6_subnet or ""),
        isolated=network.isolated,
    )


def _instance(instance: Instance, revision: int) -> instance_pb2.Instance:
    return instance_pb2.Instance(
        name=instance.name,
        uid=instance.uid,
        state=instance_pb2.Instance.State.Value(instance.state),
        generation=instance.generation,
        readiness=_readiness(instance),
        addresses=[
            instance_pb2.Address(
                address=address.address,
                prefix_length=address.prefix_length,
                mac=address.mac,
                interface=address.interface,
                source=instance_pb2.Address.Source.Value(address.source.name),
            )
            for address in instance.addresses
        ],
        labels=instance.labels,
        image=instance.image,
        hardware=instance_pb2.Hardware(cpus=instance.hardware.cpus, memory_mib=instance.hardware.memory_mib),
        create_time=_timestamp(instance.created_at_s),
        last_exit=_exit(instance.last_exit) if instance.last_exit else None,
        revision=revision,
        frozen_until=_timestamp(instance.frozen_until_s) if instance.frozen_until_s is not None else None,
        nics=[_nic(nic) for nic in instance.nics],
        autostart=instance.autostart,
    )


def _nic(nic: NetworkInterface) -> instance_pb2.Nic:
    host_ports = nic.bound_ports or [forward.host_port for forward in nic.forwards]
    return instance_pb2.Nic(
        network=nic.network,
        mac=nic.mac,
        ipv4_address=nic.ipv4_address,
        ipv6_address=nic.ipv6_address,
        forwards=[
            instance_pb2.PortForward(
                protocol=instance_pb2.PortForward.Protocol.Value(forward.protocol.name),
                guest_port=forward.guest_port,
                host_port=host_port,
            )
            for forward, host_port in zip(nic.forwards, host_ports, strict=True)
        ],
    )


def _readiness(instance: Instance) -> instance_pb2.Readiness:
    reached = instance.readiness.reached
    steps = [
        instance_pb2.Readiness.Step(
            rung=instance_pb2.Readiness.Rung.Value(step.rung.name),
            reach_time=_timestamp(step.reached_at_s),
            elapsed=_duration(step.elapsed_s),
        )
        for step in instance.readiness.steps
    ]
    return instance_pb2.Readiness(
        reached=instance_pb2.Readiness.Rung.Value(reached.name if reached else "RUNG_UNSPECIFIED"), steps=steps
    )


def _exit(exit_: Exit) -> instance_pb2.Exit:
    return instance_pb2.Exit(
        cause=instance_pb2.Exit.Cause.Value(exit_.cause),
        detail=exit_.detail,
        stop_step=instance_pb2.Exit.StopStep.Value(
            exit_.stop_step.name if exit_.stop_step else "STOP_STEP_UNSPECIFIED"
        ),
        exit_code=exit_.exit_code,
        signal=exit_.signal,
        stderr_tail=exit_.stderr_tail,
        end_time=_timestamp(exit_.ended_at_s),
    )


def _timestamp(epoch_s: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(epoch_s, UTC))
    return message


def _duration(value_s: float) -> Duration:
    message = Duration()
    # Whole milliseconds read well; the clock of a busy host tells no more anyway.
    message.FromTimedelta(timedelta(milliseconds=round(value_s * 1000)))
    return message
