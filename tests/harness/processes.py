"""Every process that was started for a test and is still there, by a variable in its environment.

    started_for(MARK, folder)       # MARK is set to the folder for all that a test starts, and children inherit it

Trainers and servers too, which nobody else would name.
"""

from pathlib import Path

import psutil


def started_for(mark: str, folder: Path) -> list[psutil.Process]:
    """Those whose variable `mark` is the folder; what has ended and waits for its parent is left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(mark) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found
