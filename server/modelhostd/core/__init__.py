"""What modelhostd decides: pure, synchronous, without clock, IO, gRPC or torch."""
