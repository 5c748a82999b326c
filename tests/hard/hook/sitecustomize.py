"""On PYTHONPATH of a chain that is to be killed: every Python process of it counts its points. Tests only."""

from tests.hard.points import arm

arm()
