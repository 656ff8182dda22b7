"""The controller: owns the instances, supervises each in one task, and answers for them over gRPC."""
