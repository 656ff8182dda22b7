"""FileService: files and folders of a guest."""

from __future__ import annotations

from vmherd.api.v1 import file_pb2_grpc
from vmherd.controller.herd import Herd


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """See protos/vmherd/api/v1/file.proto."""

    def __init__(self, herd: Herd) -> None:
        self._herd = herd
