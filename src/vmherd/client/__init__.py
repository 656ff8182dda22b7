"""A synchronous client of the controller, for programs on the same host.

::

    with Client(find_controller()) as client:
        instance = client.instances.Launch(LaunchRequest(name="web"))
"""

from vmherd.client._client import Client
from vmherd.client._find import find_controller, named_run_directory, own_run_directory, own_state_directory

__all__ = ["Client", "find_controller", "named_run_directory", "own_run_directory", "own_state_directory"]
