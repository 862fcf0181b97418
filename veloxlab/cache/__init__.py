"""The compressed cache: plan, layers, batches, attention over codes, files."""
