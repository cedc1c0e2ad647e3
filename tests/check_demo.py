#!/usr/bin/env python3
"""Checks what `make demo` left in demo/: it trained, went on after a stop, and its checkpoint is the model that it last validated.

    python3 tests/check_demo.py         after `make demo`; needs no packages

Ends with "N passed, N failed".
"""

import json
import pathlib
import statistics
import tempfile

from checks import Checks

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN = ROOT / "demo" / "run"
LAST = 20  # steps that the loss at the end is a mean of
LEARNED = 2.5  # it falls from 5.59 to 2.24 in all of 320 steps, to 2.7 within 70


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_kind(records, kind):
    return [r for r in records if r["kind"] == kind]


def check_run(t):
    """The records of the run: its start, and the start that went on."""
    files = sorted(RUN.glob("metrics*.jsonl"))
    t.equal([path.name for path in files], ["metrics.jsonl"], "the second start goes on with the first one's file")
    records = [r for path in files for r in records_of(path)]
    starts, steps = of_kind(records, "run"), of_kind(records, "step")
    t.equal(len(starts), 2, "starts")
    t.check(starts[0]["step"] == 0 and 0 < starts[-1]["step"] < steps[-1]["step"], f"starts at {[r['step'] for r in starts]}")
    t.equal([r["step"] for r in steps], list(range(1, starts[-1]["settings"]["options"]["steps"] + 1)), "every step once")
    losses = [r["loss"] for r in steps]
    t.check(5.4 < losses[0] < 5.8, f"the first loss is a guess among 257 bytes: {losses[0]}")
    end = statistics.fmean(losses[-LAST:])
    t.check(1 < end < losses[0] - LEARNED, f"the loss falls by {LEARNED} at least: from {losses[0]} to {end}")
    t.check(all(r["applied"] and r["tokens_per_s"] > 0 for r in steps), "every step changed the weights")
    validation = of_kind(records, "validation")[-1]
    t.equal(validation["step"], steps[-1]["step"], "a validation at the end")
    t.check(1 < validation["loss"] < losses[0] - LEARNED, f"its loss: {validation['loss']}")
    return starts[-1]["settings"], validation


def check_checkpoint(t, settings, validation):
    """--eval of the one checkpoint that is left gives the run's last validation."""
    checkpoint = RUN / f"step_{validation['step']:08d}"
    t.equal([path.name for path in RUN.glob("step_*")], [checkpoint.name], "checkpoints")
    options = settings["options"]
    with tempfile.TemporaryDirectory(prefix="fox_demo_") as out:
        command = [ROOT / "train_fox", "-e", checkpoint, "-j", ROOT / "demo" / "data" / "*val*.bin", "--eval", "-o", out]
        command += ["-T", options["context"], "-b", options["micro_batch"], "--val-batches", options["val_batches"]]
        t.run([*command, "--device", settings["device"]], "--eval of the checkpoint")
        path = pathlib.Path(out, "eval.jsonl")
        found = of_kind(records_of(path), "validation")[-1] if path.exists() else dict(step=None, loss=float("nan"))
    t.equal(found["step"], validation["step"], "--eval: the checkpoint's step")
    exact = settings["device"] == "cpu"  # a GPU chooses its matrix products by their speed at each start
    t.close(found["loss"], validation["loss"], "--eval: the last validation's loss", 1e-12 if exact else 3e-3)


def main():
    t = Checks()
    if t.check((RUN / "metrics.jsonl").exists(), f"{RUN}/metrics.jsonl is missing: run `make demo` first"):
        check_checkpoint(t, *check_run(t))
    t.finish()


if __name__ == "__main__":
    main()
