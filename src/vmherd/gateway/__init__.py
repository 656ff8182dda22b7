"""The gateway: the controller's gRPC API as HTTP and JSON."""
