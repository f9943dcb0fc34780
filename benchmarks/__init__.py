"""Speed against native torch and the plain malloc/free pair: ``python -m benchmarks``."""
