"""The native engine: continuous batching over one decoder in the caller's event loop."""
