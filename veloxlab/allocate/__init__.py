"""Allocation of bits, and the portable `Plan` that it ends in."""
