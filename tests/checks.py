"""The checker of the Python tests: counts, and ends with "N passed, N failed"."""

import math
import subprocess
import sys


class Checks:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, ok, what):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
            print(f"FAILED: {what}", flush=True)
        return bool(ok)

    def equal(self, found, expected, what):
        return self.check(found == expected, f"{what}: expected {expected}, found {found}")

    def close(self, found, expected, what, tolerance=1e-9):
        """Numbers or sequences of them; NaN is close to nothing."""
        if hasattr(expected, "__len__"):
            ok = len(found) == len(expected)
            for a, b in zip(found, expected):
                ok = ok and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        else:
            ok = math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
        return self.check(ok, f"{what}: expected {expected}, found {found}")

    def run(self, command, what, code=0, **settings):
        """Runs a program and checks its exit code; its output, stderr after stdout."""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
        self.check(
            done.returncode == code, f"{what}: exit code {done.returncode}, expected {code}: {done.stdout[-500:]} {done.stderr[-1000:]}"
        )
        return done.stdout + done.stderr

    def fails(self, command, words, what, **settings):
        """Checks that a program ends with code 1 and one line on stderr that has these words."""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
        lines = done.stderr.strip().splitlines()
        self.check(
            done.returncode == 1 and len(lines) == 1 and words in lines[0],
            f"{what}: expected code 1 and one line with '{words}', found {done.returncode}: {done.stderr[-800:]}",
        )

    def finish(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(self.failed > 0)
