"""Data sets, expert trajectories and distilled sets, and their files."""
