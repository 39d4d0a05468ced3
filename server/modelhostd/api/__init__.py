"""gRPC servicers: each method parses, makes one call into the host, and converts."""
