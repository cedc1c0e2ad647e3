#!/usr/bin/env python3
"""Tests of the scripts that draw, on a small run and on the gates of a trained model: what the axes hold, and the files.

    python3 tests/check_figures.py        needs numpy and matplotlib (scripts/requirements.txt) and a built program

Ends with "N passed, N failed".
"""

import json
import pathlib
import shutil
import struct
import sys
import tempfile

import numpy as np
from checks import Checks

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import figure_blocks  # noqa: E402
import figure_heads  # noqa: E402
import figure_loss  # noqa: E402
import figure_positions  # noqa: E402
import figure_pruned  # noqa: E402
import figure_savings  # noqa: E402
import figures  # noqa: E402

GATES = ROOT / "tests" / "data" / "gates" / "trained_gates_125m.safetensors"
T, STEPS, LAYERS, HEADS = 256, 12, 4, 2


def make_run(t, folder):
    """A few steps of fox-pro-tiny on this project's sources, and an evaluation of their checkpoint."""
    t.run(
        [ROOT / "make_shards", "-o", folder / "data", "--extensions", "c,h,md", "--val-fraction", "0.1", ROOT / "train", ROOT / "docs"],
        "make_shards",
    )
    common = ["-i", folder / "data", "-o", folder / "run", "-T", T, "--device", "cpu", "-b", 2, "--val-batches", 6]
    t.run([ROOT / "train_fox", *common, "-e", "fox-pro-tiny", "-d", 2 * T, "-x", STEPS, "-v", 4, "--pruning-every", 3, "-n", 0], "a run")
    t.run([ROOT / "train_fox", *common, "-e", folder / "run" / f"step_{STEPS:08d}", "--eval"], "its evaluation")
    return folder / "run"


def line_of(axis, label):
    return next(line for line in axis.get_lines() if line.get_label() == label)


def check_loss(t, run):
    steps, checks = figures.of_kind(run, "step"), figures.of_kind(run, "validation")
    figure = figure_loss.draw([f"tiny={run}"], mean=3)
    top, bottom = figure.axes
    line = line_of(top, "tiny")
    t.close(line.get_xdata(), [2 * T * (3 * i + 2) / 1e6 for i in range(4)], "loss: tokens")
    t.close(line.get_ydata(), [sum(s["loss"] for s in steps[i : i + 3]) / 3 for i in range(0, 12, 3)], "loss: means of 3 steps")
    points = line_of(top, "tiny, validation")
    t.close(points.get_xdata(), [2 * T * s / 1e6 for s in (4, 8, 12)], "loss: tokens of validations")
    t.close(points.get_ydata(), [r["loss"] for r in checks], "loss: validations")
    t.close(
        bottom.get_lines()[0].get_ydata(),
        [sorted(s["tokens_per_s"] for s in steps[i : i + 3])[1] for i in range(0, 12, 3)],
        "loss: median speed",
    )
    t.equal((top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()), ("loss", "tokens/s", "training tokens, millions"), "axes")
    t.equal(len(figure_loss.draw([f"a={run}", f"b={run}"]).axes[0].get_lines()), 4, "loss: two runs")


def check_pruned(t, run):
    reports = figures.of_kind(run, "pruning")
    axis = figure_pruned.draw(run).axes[0]
    t.equal(len(axis.get_lines()), LAYERS + 1, "pruned: a line for each layer, and all")
    for layer in range(LAYERS):
        line = line_of(axis, f"layer {layer}")
        t.close(line.get_ydata(), [50 * sum(r["layers"][layer]) for r in reports], f"pruned: layer {layer}")
        t.close(line.get_xdata(), [2 * T * s / 1e6 for s in (3, 6, 9, 12)], f"pruned: tokens, layer {layer}")
    t.close(line_of(axis, "all").get_ydata(), [100 * r["pruned"] for r in reports], "pruned: all")
    t.equal(axis.get_ylim(), (0, 100), "pruned: the axis goes from 0 to 100%")


def check_heads(t, run):
    report = figures.of_kind(run, "pruning")[-1]
    image = figure_heads.draw(run).axes[0].get_images()[0]
    kept = 100 * (1 - np.array(report["layers"]))
    t.check(image.get_array().shape == (LAYERS, HEADS) and np.allclose(image.get_array(), kept), "heads: kept fractions")
    first = figures.of_kind(run, "pruning")[0]
    early = figure_heads.draw(run, step=3).axes[0].get_images()[0].get_array()
    t.check(np.allclose(early, 100 * (1 - np.array(first["layers"]))), "heads: the report of step 3")
    evaluated = figure_heads.draw(run / "eval.jsonl").axes[0]
    t.check(f"step {STEPS}" in evaluated.get_title(), "heads: of an evaluation")
    gates = figure_heads.draw(GATES).axes[0]
    t.equal((gates.get_images()[0].get_array().shape, len(gates.texts)), ((12, 12), 144), "heads: of the gates file")
    bars = figure_savings.draw(run).axes[0].patches
    t.equal((len(bars), sum(bar.get_height() for bar in bars)), (20, LAYERS * HEADS), "savings: heads in the bins")
    left, right = figure_savings.draw(GATES).axes
    skipped = 100 - gates.get_images()[0].get_array().ravel()
    for i, bar in enumerate(left.patches):
        inside = (skipped >= 5 * i) & ((skipped < 5 * i + 5) | (i == 19))
        t.equal(bar.get_height(), inside.sum(), f"savings: heads that skip {5 * i}% to {5 * i + 5}%")
    t.close(right.get_lines()[0].get_ydata(), sorted(skipped, reverse=True), "savings: sorted heads")
    t.close(right.get_lines()[1].get_ydata()[0], skipped.mean(), "savings: their mean")


def first_by_definition(c, bound, block):
    """What every query block keeps, pair by pair of blocks."""
    threshold, first = -2 * bound - np.log(len(c)) - 10, []
    for i in range(0, len(c), block):
        j = 0
        while (j + 1) * block - 1 < i and float(c[i]) - float(c[(j + 1) * block - 1]) < threshold:
            j += 1
        first.append(j)
    return first


def check_blocks(t, run):
    c = figures.read_gates(GATES)
    for layer, head in ((3, 5), (10, 6), (0, 0)):
        t.equal(
            figures.first_blocks(c[layer, head], 8.0).tolist(),
            first_by_definition(c[layer, head], 8.0, 128),
            f"blocks: ranges of layer {layer}, head {head}",
        )
    short = c[9, 9, :1000]
    t.equal(figures.first_blocks(short, 1.0, block=64).tolist(), first_by_definition(short, 1.0, 64), "blocks: a last block that is cut")
    t.close(figures.skipped_fraction([0, 0, 1, 2]), 0.3, "blocks: skipped fraction")
    record = figures.of_kind(run / "eval.jsonl", "ranges")[-1]
    report = figures.of_kind(run / "eval.jsonl", "pruning")[-1]
    t.equal((record["context"], record["block"], len(record["first"]), len(record["first"][3][1])), (T, 64, LAYERS, T // 64), "ranges")
    t.check(0 < report["pruned"] < 1, f"the evaluation skips something: {report['pruned']}")
    for source, layer, head in ((run / "eval.jsonl", 2, 1), (GATES, 9, 9)):
        first, block, context, _ = figure_blocks.load(source, layer, head)
        axis = figure_blocks.draw(source, layer, head).axes[0]
        state = np.asarray(axis.collections[0].get_array()).reshape(len(first), len(first))
        n = context // block
        expected = [[0 if j > i else 1 if j < first[i] else 2 for j in range(n)] for i in range(n)]
        t.check(np.array_equal(state, expected), f"blocks: the map of {source.name}")
        causal, pruned = axis.patches
        t.equal(causal.get_data().values.tolist(), [block * (i + 1) for i in range(n)], "blocks: causal edge")
        t.equal(pruned.get_data().values.tolist(), [block * f for f in first], "blocks: pruned edge")
        t.equal((axis.get_xlim(), axis.get_ylim()), ((0, context), (context, 0)), "blocks: axes, the first query above")


def check_positions(t, run):
    checks = figures.of_kind(run, "validation")
    axis = figure_positions.draw([f"tiny={run}", f"again={run / 'eval.jsonl'}"]).axes[0]
    last = checks[-1]
    curve = line_of(axis, f"tiny: {last['loss']:.3f} in all")
    t.close(curve.get_ydata(), last["position_loss"], "positions: losses")
    edges = np.array(last["position_edges"], dtype=float)
    inside = (curve.get_xdata() >= np.maximum(edges[:-1], 0.5)) & (curve.get_xdata() <= edges[1:])
    t.check(inside.all(), "positions: points lie in their bins")
    t.close(line_of(axis, f"again: {last['loss']:.3f} in all").get_ydata(), last["position_loss"], "positions: of the evaluation")
    lines = [line.get_xdata()[0] for line in axis.get_lines() if line.get_linestyle() == ":"]
    t.equal(lines, [T, T / 2, T / 4, T / 8, T / 16], "positions: horizons")
    t.equal((axis.get_xscale(), axis.get_ylabel()), ("log", "validation loss"), "positions: axes")
    early = figure_positions.draw([str(run)], step=4, trained=128).axes[0]
    t.close(early.get_lines()[0].get_ydata(), checks[0]["position_loss"], "positions: the validation of step 4")
    t.equal(early.get_lines()[-1].get_xdata()[0], 128, "positions: the context of training")


def check_scripts(t, run, folder):
    """As a user runs them: a picture of sensible size, or one line that says what is wrong."""
    sources = dict(loss=[run], pruned=[run], heads=[run], savings=[GATES], blocks=[GATES, "--layer", 11, "--head", 11], positions=[run])
    broken = folder / "broken.jsonl"
    broken.write_text('{"kind": "step", "step": 1\n')
    for name, source in sources.items():
        script, out = [sys.executable, ROOT / "scripts" / f"figure_{name}.py"], folder / f"{name}.png"
        t.run([*script, *source, "-o", out], f"figure_{name}.py")
        data = out.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        t.check(
            data[:8] == b"\x89PNG\r\n\x1a\n" and 300 < width < 1200 and 200 < height < 900 and len(data) < 60000,
            f"figure_{name}.py: {width} x {height} pixels, {len(data)} bytes",
        )
        t.fails([*script, folder / "none", "-o", out], "not there" if name != "blocks" else "none", f"figure_{name}.py, no such run")
        t.fails([*script, broken, "-o", out], "line 1 is no record", f"figure_{name}.py, a broken file")
        t.fails([*script, *source, "-o", folder / "no" / "folder.png"], "cannot be written", f"figure_{name}.py, no such folder")
    t.fails(
        [sys.executable, ROOT / "scripts" / "figure_blocks.py", GATES, "--head", 12, "-o", folder / "x.png"],
        "12 layers of 12 heads",
        "no such head",
    )
    t.fails(
        [sys.executable, ROOT / "scripts" / "figure_heads.py", run, "--step", 5, "-o", folder / "x.png"],
        "no record of step 5",
        "no such step",
    )
    t.fails(
        [sys.executable, ROOT / "scripts" / "figure_heads.py", folder / "x.safetensors", "-o", folder / "x.png"],
        "x.safetensors",
        "no gates file",
    )
    for script in sorted((ROOT / "scripts").glob("figure_*.py")):
        t.fails([sys.executable, "-S", script, run, "-o", folder / "x.png"], "numpy is missing", f"{script.name} without packages")
    blocks = [sys.executable, ROOT / "scripts" / "figure_blocks.py"]
    t.fails([*blocks, run, "-o", folder / "x.png"], "no records of kind 'ranges': ./train_fox --eval writes them", "blocks of a training")
    later, twice = figures.of_kind(run / "eval.jsonl", "run")[-1], folder / "twice.jsonl"
    acp = later["settings"]["options"]["acp"]
    later["settings"]["options"].update(acp="off", sample_prompt="a\u2028b")  # an evaluation that writes no ranges
    twice.write_text((run / "eval.jsonl").read_text() + json.dumps(later, ensure_ascii=False) + "\n", encoding="utf-8")
    title = figure_blocks.draw(twice, 2, 1).axes[0].get_title()
    t.check(acp != "off" and title.endswith(f"--acp {acp}"), f"blocks: the options of the evaluation that wrote them: {title}")
    t.fails([*blocks, folder / "data" / "train_000000.bin", "-o", folder / "x.png"], "no records of train_fox", "blocks of a shard")
    only = folder / "only"  # what --eval leaves with an -o of its own
    only.mkdir()
    shutil.copy(run / "eval.jsonl", only)
    t.run([*blocks, only, "-o", folder / "x.png"], "blocks: a folder with eval.jsonl alone")
    loss = [sys.executable, ROOT / "scripts" / "figure_loss.py"]
    t.fails([*loss, only, "-o", folder / "x.png"], "no records of kind 'step': training writes them", "loss of an evaluation")
    cut = folder / "cut.safetensors"
    cut.write_bytes(GATES.read_bytes()[:100000])
    t.fails([sys.executable, ROOT / "scripts" / "figure_savings.py", cut, "-o", folder / "x.png"], "cut.safetensors", "half a gates file")


def main():
    t = Checks()
    with tempfile.TemporaryDirectory(prefix="fox_figures_") as scratch:
        folder = pathlib.Path(scratch)
        run = make_run(t, folder)
        check_loss(t, run)
        check_pruned(t, run)
        check_heads(t, run)
        check_blocks(t, run)
        check_positions(t, run)
        check_scripts(t, run, folder)
    t.finish()


if __name__ == "__main__":
    main()
