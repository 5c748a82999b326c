"""Arms the crash points in every Python process of a pipeline; loaded from PYTHONPATH, for tests only."""

from tests.hard.crash.points import arm

arm()
