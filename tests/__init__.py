"""Tests of egm_alloc; most run on the simulated device of ``tests.simulator`` (``make test``)."""
