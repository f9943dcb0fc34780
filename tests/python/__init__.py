"""Tests of the Python face: configuration, switching on and off, statistics, tensors."""
