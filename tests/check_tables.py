#!/usr/bin/env python3
"""Tests of scripts/throughput_table.sh and scripts/run_quality_125m.sh on the CPU, with models and runs so small that their figures
mean nothing: what they measure is put where it belongs.

    python3 tests/check_tables.py       needs numpy, matplotlib, safetensors (scripts/requirements.txt) and a built program

Ends with "N passed, N failed".
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import struct
import sys
import tempfile

from checks import Checks

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import profile_step  # noqa: E402
import throughput  # noqa: E402
from impose_gates import impose_gates  # noqa: E402
from official import TINY_RATE, newest_checkpoint, options, run_ours  # noqa: E402

ENVIRONMENT = dict(os.environ, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")


def is_picture(t, path, what):
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    t.check(data[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 200 and len(data) > 5000, f"{what}: {width} x {height}")


def check_layout(t):
    """The table and the picture of made-up rows."""

    def row(program, T, acp, speed, **more):
        return dict(
            program=program,
            model="fox-pro-125m",
            context=T,
            acp=acp,
            weights="gates",
            tokens_per_s=speed,
            device="chip",
            date="day",
            commit="abc",
            **more,
        )

    rows = [
        row("ours", 4096, "off", 100000.0, attention_share=0.305, saved=0.0, memory_bytes=20.26e9),
        row("ours", 4096, "paper", 150000.0, attention_share=0.21, saved=0.456),
        row("ours", 4096, "tight", 160000.0, attention_share=0.18, saved=0.512),
        row("official", 4096, "off", 80000.0, memory_bytes=30e9),
        row("official", 4096, "paper", 75000.0),
        dict(row("ours", 65536, "off", 0), out_of_memory=True),
    ]
    del rows[-1]["tokens_per_s"]
    lines = throughput.table(dict(rows=rows)).splitlines()
    cells = [line.split() for line in lines if line.startswith(("fox-pro", "  official"))]
    t.equal(
        cells[0],
        [
            "fox-pro-125m",
            "4,096",
            "100,000",
            "150,000",
            "160,000",
            "1.50",
            "1.60",
            "30%",
            "21%",
            "18%",
            "46%",
            "51%",
            "20.3",
            "1.25",
            "2.00",
        ],
        "table: ours",
    )
    t.equal(cells[1][:8], ["official", "PyTorch", "4,096", "80,000", "75,000", "-", "0.94", "-"], "table: official")
    t.equal(cells[2][:3], ["fox-pro-125m", "65,536", "memory"], "table: what did not fit")
    t.check("spread as in a trained model" in lines[0] and "chip, day, commit abc" in lines[0], f"table: its head: {lines[0]}")
    axis = throughput.draw(dict(rows=rows)).axes[0]
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers}
    t.equal(
        bars,
        {"official": [80000], "official, ACP": [75000], "ours, off": [100000], "ours, paper": [150000], "ours, tight": [160000]},
        "picture: bars",
    )
    t.equal([label.get_text() for label in axis.get_xticklabels()], ["4k"], "picture: contexts")


def check_official_rows(t, folder):
    """What dev/bench_official.py writes becomes rows: contexts whose step has the same tokens in one process."""
    calls = []

    def command(args, start, model, contexts, tokens, modes, steps, warmup):
        calls.append((model, contexts, tokens, modes, steps, warmup))
        runs = [
            dict(program="official", model=model, context=T, acp=acp, tokens_per_s=10.0 * T, step_ms=1.0, memory_bytes=5, extra=1)
            for T in contexts
            for acp in modes
        ]
        runs[-1] = dict(program="official", model=model, context=contexts[-1], acp=modes[-1], out_of_memory=True)
        return [sys.executable, "-c", f"import json, sys; json.dump(dict(runs={runs}), open(sys.argv[2], 'w'))"]

    args = argparse.Namespace(
        context=[4096, 65536, 16384], acp=["off", "paper", "tight"], batch_tokens=32768, official_steps=5, official_warmup=3
    )
    real, throughput.official_command = throughput.official_command, command
    rows = list(throughput.time_official(args, folder, "fox-llama-125m"))
    throughput.official_command = real
    t.equal(
        calls,
        [("fox-llama-125m", contexts, tokens, ["off", "paper"], 5, 3) for contexts, tokens in (([4096, 16384], 32768), ([65536], 65536))],
        "official: processes",
    )
    t.equal(
        [(r["context"], r["acp"], r["batch_tokens"], r.get("tokens_per_s")) for r in rows],
        [
            (4096, "off", 32768, 40960),
            (4096, "paper", 32768, 40960),
            (16384, "off", 32768, 163840),
            (16384, "paper", 32768, None),
            (65536, "off", 65536, 655360),
            (65536, "paper", 65536, None),
        ],
        "official: rows",
    )


# In the place of train_fox and of the tracer within it: its first 6 steps take 10, 1, 2, 3, 4 and 5 ms by its records, all later ones
# 1000, because they are traced. {device} is where it computes, {answer} what it does when it is to trace.
FAKE_RUN = """
import json, os, pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
out, switch = pathlib.Path(sys.argv[sys.argv.index("-o") + 1]), pathlib.Path(os.environ["CUPTI_TRACE_SWITCH"])
steps, begun = int(sys.argv[sys.argv.index("-x") + 1]), None
out.mkdir()
with open(out / "metrics.jsonl", "w") as metrics:
    print(json.dumps(dict(kind="run", step=0, settings=dict(device="{device}"))), file=metrics, flush=True)
    for step in range(1, steps + 1):
        if stopped:
            break
        time.sleep(0.02)
        if switch.exists():
            assert step > 6
            {answer}
        ms = [10, 1, 2, 3, 4, 5][step - 1] if step <= 6 else 1000
        record = dict(kind="step", step=step, step_ms=ms, pruned=0.5, gpu_mem_bytes=step, mfu=0.5, loss=float(step))
        print(json.dumps(record), file=metrics, flush=True)
if begun:
    seen = step - begun - int(os.environ["CUPTI_TRACE_SKIP"])
    kernels = [dict(name=name, calls=1, ms=ms * seen, bytes=0) for name, ms in (("acp_forward", 1), ("acp_dq", 2), ("gemm", 5))]
    trace = dict(steps=seen, span_ms=10 * seen, busy_ms=8 * seen, dropped=0, kernels=kernels)
    pathlib.Path(os.environ["CUPTI_TRACE_OUT"]).write_text(json.dumps(trace))
print("stopped")
"""


def check_traced_run(t, folder):
    """One run is timed first and traced then."""
    begins, fails = "begun = step; switch.unlink()", 'switch.unlink(); print("cupti_trace: tracing kernels failed: not permitted")'
    values = argparse.Namespace(warmup=1, steps=5, batch_tokens=512, device="auto", recompute=0, train_fox=folder / "fake")
    real, profile_step.build_tracer = profile_step.build_tracer, lambda folder: folder / "none.so"
    wait, profile_step.BEGIN_SECONDS = profile_step.BEGIN_SECONDS, 0.2
    for device, answer, why in (
        ("cuda", begins, None),
        ("cuda", fails, "cupti_trace: tracing kernels failed: not permitted"),
        ("cuda", "pass", "CUPTI did not begin to trace"),
        ("cpu", "raise SystemExit(1)", None),
    ):
        values.train_fox.write_text(f"#!{sys.executable}\n" + FAKE_RUN.replace("{device}", device).replace("{answer}", answer))
        values.train_fox.chmod(0o755)
        row, found = throughput.time_ours(values, folder, "name", 256, "paper", True)
        what = f"traced run, {device}, {answer}"
        t.equal(found, why, f"{what}: why there is no profile")
        times = [row[key] for key in ("step_ms", "fastest_ms", "slowest_ms", "steps", "memory_bytes", "device")]
        t.equal(times, [3, 1, 5, 5, 6, device], f"{what}: only what was not traced is timed")
        traced = (0.375, {"attention forward": 0.125, "attention dQ": 0.25}, 10, 8) if answer == begins else (None,) * 4
        shares = ("attention_share", "attention_parts", "profile_step_ms", "profile_busy_ms")
        t.equal(tuple(row.get(k) for k in shares), traced, f"{what}: shares")
        t.check(not (folder / "run").exists(), f"{what}: nothing stays")
    values.train_fox.write_text("#!/bin/sh\necho 'needs 90 GiB of GPU memory'; exit 1\n")
    row, found = throughput.time_ours(values, folder, "name", 256, "paper", True)
    t.equal((row.get("out_of_memory"), found), (True, None), "traced run: out of memory")
    profile_step.build_tracer, profile_step.BEGIN_SECONDS = real, wait


def check_start(t, folder):
    """The start of the table has the weights that train_fox starts from, with other gates."""
    import safetensors.numpy

    checkpoint, data = profile_step.write_start("fox-pro-tiny", 1000, folder)
    run = options(T=64, b=1, d=64, x=1, v=0, l=TINY_RATE, warmup_tokens=0, pruning_every=0, device="cpu")
    records = run_ours(ROOT / "train_fox", "fox-pro-tiny", data, folder / "run", *run)
    t.check(records[-1]["kind"] == "checkpoint", "start: a run of one step")
    files = (checkpoint / "model.safetensors", newest_checkpoint(folder / "run") / "model.safetensors")
    found, expected = (safetensors.numpy.load_file(str(path)) for path in files)
    t.equal(sorted(found), sorted(expected), "start: tensors")
    impose_gates(expected, embedding_scale=profile_step.EMBEDDING_SCALE)
    t.equal([name for name in found if (found[name] != expected[name]).any()], [], "start: tensors that differ")


def check_throughput(t, folder):
    script = ["bash", ROOT / "scripts" / "throughput_table.sh", "--device", "cpu", "--batch-tokens", 512, "--steps", 2, "--warmup", 1]
    one, both = folder / "one", folder / "both"
    said = t.run([*script, "--models", "fox-pro-tiny", "-T", 256, "--acp", "off", "paper", "--out", one], "throughput", env=ENVIRONMENT)
    t.check("\nfox-pro-tiny: " in said and "\nin all: " in said, f"throughput: how long it took: {said[-200:]}")
    rows = json.loads(one.with_suffix(".json").read_text())["rows"]
    t.equal(
        [(r["program"], r["model"], r["context"], r["acp"], r["weights"], r["steps"]) for r in rows],
        [("ours", "fox-pro-tiny", 256, acp, "gates", 2) for acp in ("off", "paper")],
        "throughput: rows",
    )
    t.check(rows[0]["saved"] in (0, None) and 0 < rows[1]["saved"] < 0.9, f"throughput: saved {[r['saved'] for r in rows]}")
    t.check(
        all(
            abs(r["tokens_per_s"] - 512e3 / r["step_ms"]) < 1e-6 * r["tokens_per_s"] and r["fastest_ms"] <= r["step_ms"] <= r["slowest_ms"]
            for r in rows
        ),
        "throughput: speeds are tokens over time",
    )
    t.check(abs(rows[0]["loss"] - rows[1]["loss"]) < 1e-3, "throughput: the same weights and tokens with and without pruning")
    is_picture(t, one.with_suffix(".png"), "throughput: picture")

    t.run(
        [ROOT / "make_shards", "-o", folder / "data", "--extensions", "c,h,md", "--val-fraction", "0.1", ROOT / "train", ROOT / "docs"],
        "make_shards",
    )
    trained = options(i=folder / "data", o=folder / "run", e="fox-pro-tiny", T=256, d=512, x=2, v=0, n=0, device="cpu")
    t.run([ROOT / "train_fox", *trained], "a trained checkpoint")
    checkpoint = folder / "run" / "step_00000002"
    given = options(models="fox-pro-tiny", T=512, acp="tight", checkpoint=checkpoint, data=folder / "data")
    given += options(merge=one.with_suffix(".json"), out=both)
    t.run([*script, *given], "throughput of a checkpoint", env=ENVIRONMENT)
    merged = json.loads(both.with_suffix(".json").read_text())["rows"]
    t.equal([r["weights"] for r in merged], ["gates", "gates", f"checkpoint {checkpoint}"], "throughput: merged rows")
    t.equal(merged[:2], rows, "throughput: merged rows are taken over")
    t.check(4 < merged[2]["loss"] < 6, f"throughput: the loss of the checkpoint's data: {merged[2]['loss']}")
    text = both.with_suffix(".txt").read_text()
    t.check(
        f"Weights: checkpoint {checkpoint}" in text and f"{merged[0]['tokens_per_s']:,.0f}" in text and text.count("fox-pro-tiny ") == 2,
        f"throughput: text {text}",
    )
    for given, words in (
        (["--checkpoint", checkpoint], "belong together"),
        (["--official", folder], "no src/forgetting_transformer"),
        (["-T", 300], "multiple of every context"),
        (["--models"], "nothing was measured"),
        (["--checkpoint", folder, "--data", folder], "the folder of one checkpoint"),
    ):
        t.fails([*script, "--models", "fox-pro-tiny", *given, "--out", folder / "no"], words, f"throughput {given}", env=ENVIRONMENT)
    t.fails(script, "Python packages are missing", "throughput without packages", env=dict(ENVIRONMENT, PYTHON="false"))


def check_quality(t, folder):
    out, keep = folder / "quality", folder / "kept"
    environment = dict(
        ENVIRONMENT, OUT=str(out), KEEP=str(keep), TOKENS="2560", RUNS="off paper@2 transformer paper", GPUS="0 1", OMP_NUM_THREADS="1"
    )
    recipe = options(model="fox-pro-tiny", baseline="fox-pro-tiny", T=64, batch_tokens=128, warmup_steps=2, val_every=10)
    recipe += options(val_sequences=8, device="cpu")
    script = ["bash", ROOT / "scripts" / "run_quality_125m.sh", folder / "data", *recipe]
    said = t.run(script, "quality", env=environment)
    result = json.loads(out.with_suffix(".json").read_text())
    t.equal(list(result["runs"]), ["off", "paper", "paper@2", "transformer"], "quality: runs")
    t.check(
        all(len(run["loss"]) == 20 and [step for step, _ in run["validation"]] == [10, 20] for run in result["runs"].values()),
        "quality: steps and validations",
    )
    losses = {name: run["validation"][-1][1] for name, run in result["runs"].items()}
    t.equal(losses["off"], losses["transformer"], "quality: the same model without pruning under two names")
    t.check(abs(losses["off"] - losses["paper"]) < 1e-2 and losses["paper"] != losses["paper@2"], f"quality: {losses}")
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.split(" ")[0] in losses and len(line.split()) > 5}
    for name, run in result["runs"].items():
        t.equal(rows[name][1:4], ["20", f"{statistics.fmean(run['loss']):.4f}", f"{losses[name]:.4f}"], f"quality: the row of {name}")
    difference = abs(losses["paper"] - losses["paper@2"])
    t.check("2 seeds of paper: last validations" in said and f"apart by {difference:.4f}" in said, f"quality: seeds: {said[-600:]}")
    t.check(
        (keep / "paper@2" / "metrics.jsonl").is_file() and (keep / "paper@2" / "step_00000020" / "model.safetensors").is_file(),
        "quality: the runs are kept",
    )
    t.check(out.with_suffix(".txt").read_text() in said, "quality: the table in a file")
    is_picture(t, out.with_suffix(".png"), "quality: picture")
    again = t.run(script, "quality, again", env=environment)
    t.equal(again.count("done already"), 4, "quality: runs are not made again")
    more = t.run(script, "quality, one more", env=dict(environment, RUNS="tight"))
    t.equal(
        [line.split()[0] for line in more.splitlines() if line.split(" ")[0] in (*losses, "tight") and len(line.split()) > 5],
        ["off", "paper", "paper@2", "tight", "transformer"],
        "quality: runs of before stay in the table",
    )
    t.fails(
        [*script, "--lr", "1e-3"],
        f"{out}.off.json: another recipe: lr is 0.0003, not 0.001; remove it or choose another OUT",
        "quality: runs of before that had another rate",
        env=dict(environment, RUNS="off tight"),
    )
    t.equal(json.loads(out.with_suffix(".json").read_text())["settings"]["lr"], 3e-4, "quality: the table stays")
    t.fails(["bash", ROOT / "scripts" / "run_quality_125m.sh", folder / "none"], "no folder there", "quality without data", env=environment)
    no = dict(environment, RUNS="fast quick off", OUT=str(folder / "no"))
    t.fails(script, f"no run of this name; --help lists them; its log: {folder / 'no'}.", "quality of unknown runs", env=no)
    t.check(not list(folder.glob("no.off*")), "quality: no run starts after one that failed")
    tools = folder / "tools"  # without nvidia-smi
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "tr"):
        (tools / name).symlink_to(shutil.which(name))
    t.fails(script[:3], "no NVIDIA GPU here", "quality without a GPU", env=dict(no, PATH=str(tools)))


def check_merge(t, folder):
    """dev/compare_training.py --merge: the results in docs/ stay as they are, two recipes are not put into one table."""
    results, out = ROOT / "docs" / "results", folder / "merged.json"

    def merge(*files):
        return [sys.executable, ROOT / "dev" / "compare_training.py", "--out", out, "--merge", *files]

    for name in ("training_125m", "quality_125m"):
        t.run(merge(results / f"{name}.json"), f"merge {name}")
        t.check(out.read_bytes() == (results / f"{name}.json").read_bytes(), f"merge {name}: the same file")
        t.run([sys.executable, ROOT / "dev" / "plot_training.py", out, folder / f"{name}.png"], f"picture of {name}")
        is_picture(t, folder / f"{name}.png", f"picture of {name}")
    out.unlink()
    one = results / "quality_125m.json"
    whole = json.loads(one.read_text())

    def part(name, run, settings={}, lr=whole["lr"]):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(dict(runs={run: whole["runs"][run]}, settings={**whole["settings"], **settings}, lr=lr)))
        return path

    off, paper = part("off", "off"), part("paper", "paper", dict(device="cuda", hang_timeout=7))
    t.run(merge(off, paper), "merge two parts of a recipe")
    t.equal(json.loads(out.read_text())["runs"], {k: whole["runs"][k] for k in ("off", "paper")}, "merge: runs")
    out.unlink()
    for settings, words in (
        (dict(warmup_tokens=4194304), "warmup_tokens is 4194304, not 16777216"),
        (dict(context=8192, micro_batch=4), "context is 8192, not 16384, micro_batch is 4, not 2"),
        (dict(model="fox-llama-125m"), "model is fox-llama-125m, not fox-pro-125m"),
    ):
        other = part("other", "tight", settings)
        t.fails(merge(off, paper, other), f"{other} cannot be merged with {off}: another recipe: {words}", f"merge {settings}")
    other = part("other", "tight", lr=[1.01 * rate for rate in whole["lr"]])
    t.fails(merge(off, other), "the learning rates of its steps differ", "merge other rates")
    t.fails(merge(one, results / "training_125m.json"), "another recipe: steps is 320, not 763", "merge two of docs/results")
    t.check(not out.exists(), "nothing is written for two recipes")


def main():
    t = Checks()
    with tempfile.TemporaryDirectory(prefix="fox_tables_") as scratch:
        folder = pathlib.Path(scratch)
        check_layout(t)
        check_official_rows(t, folder)
        check_traced_run(t, folder)
        (folder / "start").mkdir()
        check_start(t, folder / "start")
        check_throughput(t, folder)
        check_quality(t, folder)
        check_merge(t, folder)
    t.finish()


if __name__ == "__main__":
    main()
