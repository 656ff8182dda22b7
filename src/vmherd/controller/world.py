"""What every part of the controller that acts works with."""

from __future__ import annotations

from dataclasses import dataclass

from vmherd.controller.helper import Helper
from vmherd.controller.store import Store
from vmherd.image.registry import ImageRegistry
from vmherd.model.layout import RunDirectory, StateDirectory


@dataclass(frozen=True)
class World:
    """What an instance has around it."""

    store: Store
    helper: Helper
    images: ImageRegistry
    run: RunDirectory
    state: StateDirectory
    stop_grace_s: float
