"""veloxlab."""
