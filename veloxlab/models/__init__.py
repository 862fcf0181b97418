"""Models: loading, GGUF files, and shapes of models without weights."""
