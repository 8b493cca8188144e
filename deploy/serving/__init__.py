"""The server: the champion answers over HTTP and gRPC, batched, reloaded and rolled back without a lost request."""
