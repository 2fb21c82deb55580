"""Measurements, one file a question; `python -m bench` runs them all. Each file has run() -> dict of figures."""
