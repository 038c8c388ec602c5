"""Benchmarks of slimfit_fx: ``python -m bench.memory`` and ``python -m bench.time``."""
