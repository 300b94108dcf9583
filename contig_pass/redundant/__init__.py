"""Copies in the user's own program that change nothing, or that the plan makes unnecessary."""
