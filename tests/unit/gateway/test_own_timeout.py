from __future__ import annotations

from google.protobuf.message_factory import GetMessageClass

from vmherd.gateway.descriptors import Api
from vmherd.gateway.routes import MAX_TIMEOUT_S, own_timeout_s


def test_a_call_lasts_as_long_as_its_request_allows(api: Api) -> None:
    run = GetMessageClass(api.pool.FindMessageTypeByName("vmherd.api.v1.RunRequest"))()
    assert own_timeout_s(run) == 0
    run.timeout.seconds = 3600
    assert own_timeout_s(run) == 3600
    run.timeout.seconds = 1 << 60
    assert own_timeout_s(run) == MAX_TIMEOUT_S
    run.timeout.seconds = -5
    assert own_timeout_s(run) == 0


def test_a_request_without_a_timeout_has_none_to_give(api: Api) -> None:
    assert own_timeout_s(GetMessageClass(api.pool.FindMessageTypeByName("vmherd.api.v1.StartRequest"))()) == 0
