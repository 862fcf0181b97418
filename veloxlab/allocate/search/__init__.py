"""The search for a cache: candidates, runner, race, result."""
