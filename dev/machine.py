"""Where and when a result was measured: for the head of every JSON file of results."""

import datetime
import os
import subprocess

import official


def _first_line(*command):
    try:
        done = subprocess.run(command, cwd=official.ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None


def facts():
    """device, driver, date, commit (with + where the tree differs from it; $COMMIT where there is no git).
    None where it is not known."""
    gpu = _first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    device, driver = gpu.split(", ") if gpu else (None, None)
    commit = _first_line("git", "rev-parse", "--short", "HEAD")
    if commit and _first_line("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "+"
    return dict(device=device, driver=driver, date=datetime.date.today().isoformat(), commit=os.environ.get("COMMIT") or commit)
