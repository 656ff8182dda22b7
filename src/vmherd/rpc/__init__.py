"""What every gRPC server and client of vmherd shares."""
