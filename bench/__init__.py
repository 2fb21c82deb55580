"""Measurements, one file a question; `python -m bench` runs them all.

Each file has run() -> dict of figures, and summary(figures) -> rows (what was measured, the figure, the goal).
"""
