"""Benchmarks of slimfit_fx: ``python -m bench`` lists them."""
