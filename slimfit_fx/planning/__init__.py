"""Deciding what happens to each saved value, and the plan as data and as a table."""
