#!/usr/bin/env python3
"""Recomputes the tables of docs/results/*.md and of README.md's "Measured" from the raw data in docs/results/*.json, and the
sentences that state what follows from them: every printed number must be the computed one within its rounding.

    python3 tests/check_results.py       needs no packages

Tables are found by a part of their head, rows by their labels. A table or row that is neither computed nor named in WITHOUT_DATA
fails. Ends with "N passed, N failed".
"""

import json
import pathlib
import re
import statistics

from checks import Checks

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)")  # not the digits of H200 or of a commit

# What cannot be recomputed here: (document, table, rows or None for all of them, why).
WITHOUT_DATA = (
    ("gpu.md", "model trained with", None, "printed by check_mass"),
    ("ranks.md", "all-reduce", None, "nccl_bandwidth prints a table and writes no file"),
    ("cpu.md", "context × sequences", None, "make bench prints a table and writes no file"),
    ("cpu.md", "heads | `paper` | `tight`", None, "printed by ./test_fox --only acp"),
    ("cpu.md", "tiktoken", None, "printed by dev/check_tokenizer.py"),
    ("cpu.md", "gradient norm differs", None, "printed by dev/parity_official.py"),
)


class Table:
    def __init__(self, head, rows):
        self.head, self.rows, self.seen = head, rows, set()


class Document:
    """The tables and the text of a Markdown file, from a heading on."""

    def __init__(self, t, path, heading=""):
        self.t, self.name = t, path.name
        text = path.read_text()
        text = text[text.index(heading) :]
        self.words = re.sub(r"\s+", " ", text)
        self.tables = []
        for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
            head, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines())
            self.tables.append(Table(" | ".join(head), rows))

    def table(self, part):
        found = [table for table in self.tables if part in table.head]
        self.t.equal(len(found), 1, f"{self.name}: tables with '{part}' in their head")
        return found[0] if found else Table(part, [])

    def row(self, part, label, expected, commit=None):
        """The numbers of the row whose first cells are `label`, in order, must be those expected."""
        table, label = self.table(part), (label,) if isinstance(label, str) else label
        what = f"{self.name}, {part}, {', '.join(label)}"
        found = [i for i, cells in enumerate(table.rows) if tuple(cells[: len(label)]) == label]
        if not self.t.equal(len(found), 1, f"{what}: rows"):
            return
        table.seen.add(found[0])
        cells = table.rows[found[0]][len(label) :]
        printed = [number for cell in cells for number in NUMBER.findall(cell)]
        ok = len(printed) == len(expected) and all(map(is_rounded, printed, expected))
        self.t.check(ok, f"{what}: printed {printed}, computed {[float(f'{x:.7g}') for x in expected]}")
        if commit:
            self.t.check(commit in cells, f"{what}: commit {commit}, found {cells[-1]}")

    def says(self, sentence):
        self.t.check(sentence in self.words, f"{self.name} does not say: {sentence}")

    def finish(self):
        """Every row was computed or is known to have no data."""
        for name, part, labels, _ in WITHOUT_DATA:
            if name == self.name:
                table = self.table(part)
                rows = [i for i, cells in enumerate(table.rows) if labels is None or cells[0] in labels]
                self.t.check(rows and not table.seen & set(rows), f"{name}, {part}: rows without data")
                table.seen |= set(rows)
        for table in self.tables:
            missing = [cells[:3] for i, cells in enumerate(table.rows) if i not in table.seen]
            self.t.check(not missing, f"{self.name}, '{table.head[:60]}': rows that were not recomputed: {missing}")


def is_rounded(printed, value):
    decimals = len(printed.partition(".")[2])
    return abs(float(printed.replace(",", "")) - value) <= 0.5001 * 10**-decimals


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def span(values, form):
    """'1.1 to 2.2'."""
    return f"{min(values):{form}} to {max(values):{form}}"


# ---- training.md


def training_row(run, over=None):
    """Training loss, validation, tokens/s, of it how many times another's, percent skipped."""
    row = [statistics.fmean(run["loss"][-20:]), run["validation"][-1][1], run["tokens_per_s"]]
    row += [run["tokens_per_s"] / over["tokens_per_s"]] if over else []
    return row + ([100 * statistics.fmean(run["pruned"][-20:])] if "pruned" in run else [])


def first_apart(a, b):
    """The first step whose losses differ."""
    return next(step for step, (x, y) in enumerate(zip(a, b), 1) if x != y)


def apart(runs, steps):
    """The largest difference between any two of the runs in a training loss of these steps."""
    return max(max(losses) - min(losses) for losses in list(zip(*(run["loss"] for run in runs.values())))[steps])


def curves_apart(a, b):
    """The largest difference of the means of 20 steps in the second half."""
    means = [[statistics.fmean(run["loss"][i : i + 20]) for i in range(0, len(run["loss"]) - 19, 20)] for run in (a, b)]
    return max(abs(x - y) for x, y in list(zip(*means))[len(means[0]) // 2 :])


def check_again(t, page, runs, again, h200):
    """The earlier run of `paper` that took another path than `off`, the run of `off` that took that one too, and those on H200."""
    off, other = runs["off"], again["paper"]
    steps = len(again["off"]["loss"])
    for what in ("loss", "grad_norm"):
        t.equal(again["off"][what], other[what][:steps], f"training.md: {what} of `off`, begun again")
    for what in ("loss", "grad_norm", "validation"):
        for name in ("paper@2", "transformer", "tight"):
            t.equal(h200[name][what], runs[name][what], f"training.md: {what} of `{name}` on H200")
    page.says(f"its first {steps} losses and gradient norms are those of that run")
    page.says(
        f"`off` took a third, with other losses from step {first_apart(h200['off']['loss'], off['loss'])} on, and ended at "
        f"{h200['off']['validation'][-1][1]:.4f}, with {h200['off']['tokens_per_s']:,.0f} tokens/s"
    )
    t.equal(first_apart(h200["off"]["loss"], other["loss"]), 2, "training.md: the third path is not the second")
    page.says("at {:,.0f}, {:,.0f} and {:,.0f} tokens/s".format(*(h200[name]["tokens_per_s"] for name in ("paper@2", "transformer", "tight"))))
    last = [run["validation"][-1][1] for run in (off, runs["paper"], runs["tight"], other, h200["off"])]
    page.says(f"ended between {min(last):.4f} and {max(last):.4f}")
    norms = [run["grad_norm"][0] for run in (other, off)]
    t.check(norms[0] != norms[1], "training.md: gradient norms of step 1")
    page.says(f"At {other['commit']} `paper` took the other one: the gradient norm of step 1 was {norms[0]:.5f} and not {norms[1]:.5f}")
    page.says(f"losses differed from step {first_apart(off['loss'], other['loss'])} on, and it ended at {other['validation'][-1][1]:.4f}")
    page.says(f"the other path of `paper` ended {off['validation'][-1][1] - other['validation'][-1][1]:.4f} below")
    speeds = [run["tokens_per_s"] for run in (again["off"], off)]
    page.says(f"There `off` made {speeds[0]:,.0f} tokens/s, {100 * speeds[0] / speeds[1] - 100:.0f}% more than in the table")


def check_training(t):
    page = Document(t, RESULTS / "training.md")
    runs = read("quality_125m")["runs"]
    for label, name, over in (
        ("`off`", "off", None),
        ("`paper`", "paper", "off"),
        ("`tight`", "tight", "off"),
        ("`paper`, seed 2", "paper@2", None),
    ):
        page.row("after 128 steps", label, training_row(runs[name], runs.get(over)), runs[name]["commit"])
    page.row("after 128 steps", "Transformer (Pro)", training_row(runs["transformer"])[:-1], runs["transformer"]["commit"])
    off, tight = runs["off"], runs["tight"]
    for what in ("loss", "grad_norm", "validation"):
        t.equal(runs["paper"][what], off[what], f"training.md: {what} of `paper` and of `off`")
    page.says(f"all {len(off['loss'])} losses, gradient norms and validations are the same to the last digit")
    check_again(t, page, runs, read("quality_125m_again")["runs"], read("quality_125m_h200")["runs"])
    page.says(f"its losses are those of `off` up to step {first_apart(off['loss'], tight['loss']) - 1}")
    last = {name: run["validation"][-1][1] for name, run in runs.items()}
    below = {name: last["off"] - last[name] for name in ("paper", "tight", "paper@2", "transformer")}
    t.check(abs(below["tight"]) > 0.002, "training.md: `tight` is not within 0.002 of `off`")
    page.says(f"It ends {below['tight']:.4f} below `off`, more than the 0.002")
    page.says(f"The second seed ends {-below['paper@2']:.4f} above")
    page.says(f"FoX is {-below['transformer']:.2f} below the Transformer")
    largest = max((abs(a - b), step) for (step, a), (_, b) in zip(off["validation"], tight["validation"]))
    page.says(f"validations of `tight` differ from those of `off` by up to {largest[0]:.3f} (at step {largest[1]})")

    runs = read("training_125m")["runs"]
    page.row("320 steps of 131,072", "official PyTorch program, ACP", training_row(runs["official"]))
    for name in ("paper", "tight", "off"):
        page.row("320 steps of 131,072", f"`{name}`", training_row(runs[name]))
    largest = max(curves_apart(a, b) for a in runs.values() for b in runs.values())
    official = max(curves_apart(runs["official"], run) for run in runs.values())
    t.check(0.0036 < largest < 0.0037 and 0.0030 < official < 0.0031, f"training.md: curves apart by {largest}, {official}")
    page.says("are at most 0.0037 apart, those of ours from the official one at most 0.0031")

    runs = read("training_125m_high_rate")["runs"]
    page.row("640 steps of 65,536", "official PyTorch program, ACP", training_row(runs["official"]))
    label = "`paper` (same run of the machine as the official)"
    page.row("640 steps of 65,536", label, training_row(runs["paper"], runs["official"]))
    page.row("640 steps of 65,536", "`tight`", training_row(runs["tight"]))
    near = apart(runs, slice(0, 23)) < 0.001 < apart(runs, slice(23, 24)) and apart(runs, slice(0, 40)) < 0.004
    t.check(near, "training.md: 23 steps within 0.001, 40 within 0.004")
    page.says("for 23 steps all three agree within 0.001, until step 40 within 0.004")
    page.finish()


# ---- ranks.md


def check_ranks(t):
    page, runs = Document(t, RESULTS / "ranks.md"), read("scaling_4gpu")["runs"]
    alone = {(run["series"], run["model"]): run for run in runs if run["gpus"] == 1}
    longer = []
    for run in runs:
        n, one = run["gpus"], alone[run["series"], run["model"]]
        model, zero = run["model"].removeprefix("fox-pro-").replace("m", "M"), str(run["zero"]) if n > 1 else ""
        row = [run["step_ms"], run["tokens_per_s"]]
        if n > 1:
            row += [
                100 * run["tokens_per_s"] / n / one["tokens_per_s"],
                run["exchange_ms"],
                run["exposed_ms"],
                run["sent_gb"],
                run["bus_gb_per_s"],
            ]
        page.row("bus GB/s | memory", (run["series"], model, str(n), zero), [*row, run["memory_gib"]])
        if n > 1 and model == "125M":
            longer.append(run["step_ms"] - one["step_ms"] / (n if run["series"] == "strong" else 1))
    page.says(f"At 125M a step takes {span(longer, '.0f')} ms more")
    several = [run for run in runs if run["gpus"] > 1]
    of_one = [100 * run["ratio_to_one_gpu"] for run in several]
    page.says(f"So {span(of_one, '.1f')}% of n times one GPU")
    exposed = [run["exposed_ms"] for run in several if run["model"] == "fox-pro-125m"]
    page.says(f"of which {span(exposed, '.1f')} are exposed exchange")
    bus = [run["bus_gb_per_s"] for run in several if run["model"] == "fox-pro-760m"]
    page.says(f"Hidden behind 760M's backward the exchange runs at {span(bus, '.0f')} GB/s")
    page.says(f"{span([100 - 100 * run['exposed_ms'] / run['exchange_ms'] for run in several], '.0f')}% of the exchange is hidden")
    page.finish()


# ---- gpu.md


def speeds_of(rows, weights="gates"):
    """{(model, context, 'off' and so on, 'official off' and so on for the official program): row}."""
    start = {"ours": "", "official": "official "}
    rows = [row for row in rows if row["weights"].startswith(weights)]
    return {(row["model"].removeprefix("fox-pro-"), row["context"], start[row["program"]] + row["acp"]): row for row in rows}


def label_of(model):
    """'125m' to '125M', 'fox-llama-125m' to 'LLaMA 125M'."""
    return model.removeprefix("fox-").replace("llama-", "LLaMA ").replace("m", "M")


def rate(row):
    return row["tokens_per_s"]


def against_official(rows, model, context):
    """official, paper, ratio, tight, ratio."""
    official, paper, tight = (rate(rows[model, context, mode]) for mode in ("official paper", "paper", "tight"))
    return [official, paper, paper / official, tight, tight / official]


def gain(rows, model, context, mode):
    """Percent that pruning makes a step faster."""
    return 100 * rate(rows[model, context, mode]) / rate(rows[model, context, "off"]) - 100


def share(rows, model, context, modes=("off", "paper")):
    return [100 * rows[model, context, mode]["attention_share"] for mode in modes]


def saved(rows, model, context):
    return [100 * rows[model, context, mode]["saved"] for mode in ("paper", "tight")]


def check_whole_steps(page):
    rows = speeds_of(read("throughput")["rows"])
    for model, context in {(model, context) for model, context, _ in rows}:
        whole = (model, context, "off") in rows
        official, *ours = against_official(rows, model, context)
        row = [rate(rows[model, context, "official off"]), official, rate(rows[model, context, "off"])] if whole else [official]
        row += ours
        if whole:
            row += [gain(rows, model, context, mode) for mode in ("paper", "tight")] + share(rows, model, context)
        page.row("FoX | context", (label_of(model), f"{context:,}"), row + saved(rows, model, context))
    page.says(f"{span([gain(rows, m, 16384, 'paper') for m in ('125m', '360m', '760m')], '.0f')}% at the same threshold")
    page.says(f"attention is {share(rows, '760m', 16384)[1]:.0f}% of a step at 16,384 with `paper`")
    for model, name in (("760m", "FoX (Pro) 760M, T = 16,384, 32,768 tokens"), ("fox-llama-760m", "FoX (LLaMA) 760M")):
        memory = [rows[model, 16384, who]["memory_bytes"] / 1e9 for who in ("off", "official paper")]
        page.says(f"{name}: {memory[0]:.1f} GB (the official program: {memory[1]:.1f} GB)")
    h200 = speeds_of(read("throughput_h200")["rows"])
    for model, context in {(model, context) for model, context, _ in h200}:
        page.row("model, context", f"{label_of(model)}, {context:,}", against_official(h200, model, context))

    trained = speeds_of(read("throughput")["rows"], "checkpoint")
    check_traced_steps(page, rows, trained)
    off = rows["125m", 4096, "off"]
    page.says(f"with steps from {off['fastest_ms']:.1f} to {off['slowest_ms']:.1f} ms")
    gains = [gain(rows, "125m", 4096, mode) for mode in ("paper", "tight")]
    page.says(f"its gains of {gains[0]:.0f}% and {gains[1]:.0f}% were")
    page.says(f"125M without pruning at 4,096 made {100 - 100 * rate(off) / 414787:.1f}% less than at 4b8c190 (414,787 tokens/s)")
    for context in (4096, 8192, 16384):
        row = [rate(trained["125m", context, "off"])]
        for mode in ("paper", "tight"):
            row += [rate(trained["125m", context, mode]), gain(trained, "125m", context, mode)]
        page.row("context | `off`", f"{context:,}", row + share(trained, "125m", context) + saved(trained, "125m", context))

    more, attention = [], {}
    for label, speeds, model in (
        ("125M", rows, "125m"),
        ("360M", rows, "360m"),
        ("760M", rows, "760m"),
        ("125M, trained", trained, "125m"),
    ):
        search = {}
        for mode in ("off", "paper", "tight"):
            run = speeds[model, 16384, mode]
            ms = [attention_ms(run, part) for part in ("forward", "dQ", "dK, dV", "ranges, sums")]
            page.row("| step | forward", f"{label}, `{mode}`", [run["profile_step_ms"], *ms, 100 * run["attention_share"]])
            whole = run["attention_share"] * run["profile_busy_ms"]
            page.t.check(abs(sum(ms) - whole) < 1e-6, f"gpu.md, {label}, {mode}: no part of attention is left out")
            search[mode], attention[mode] = ms[-1], sum(ms)
        more.append(100 * (search["tight"] - search["paper"]) / sum(ms))
    page.says(f"{span(more[:3], '.1f')}% of attention more than that of `paper`, {more[3]:.1f}% in the trained model")
    fewer = fewer_blocks(*(1 - trained["125m", 16384, mode]["saved"] for mode in ("paper", "tight")))
    less = 100 - 100 * attention["tight"] / attention["paper"]
    page.says(
        f"attention as a whole takes {less:.0f}% less time than with `paper` ({attention['tight']:.2f} against {attention['paper']:.2f} ms), "
        f"for {fewer:.0f}% fewer blocks"
    )

    forward = {key: attention_ms(run, "forward") for key, run in rows.items() if "profile_step_ms" in run}
    less = [100 - 100 * forward[m, T, "tight"] / ms for (m, T, mode), ms in forward.items() if "llama" in m and mode == "paper"]
    page.says(f"forward takes {span(less, '.0f')}% less time with `tight` than with `paper`")


def attention_ms(row, part):
    """Of a traced step."""
    return row["profile_busy_ms"] * row["attention_parts"][f"attention {part}"]


def fewer_blocks(paper, tight):
    """Percent, from the fractions kept."""
    return 100 - 100 * tight / paper


def check_traced_steps(page, rows, trained):
    """Rows whose traced steps took much longer than the timed ones: each is named, with both and for how long nothing ran."""
    found = {(weights, *key): row for weights, some in (("gates", rows), ("trained", trained)) for key, row in some.items()}
    found = {key: row for key, row in found.items() if "profile_step_ms" in row}
    longer = {key for key, row in found.items() if row["profile_step_ms"] > 1.05 * row["step_ms"]}
    named = [("gates", "360m", 8192, "paper"), ("trained", "125m", 4096, "tight")]
    page.t.equal(longer, set(named), "gpu.md: rows whose traced steps took over 5% longer")
    ms = [f"{found[key]['profile_step_ms']:.1f} against {found[key]['step_ms']:.1f} ms" for key in named]
    page.says(f"360M with `paper` at 8,192 ({ms[0]}), the trained model with `tight` at 4,096 ({ms[1]})")
    idle = [found[key]["profile_step_ms"] - found[key]["profile_busy_ms"] for key in named]
    page.says(f"The GPU then waited, {idle[0]:.1f} and {idle[1]:.1f} ms of a step")
    busy = [key for key, row in found.items() if row["profile_busy_ms"] > 1.05 * row["step_ms"]]
    page.t.equal(busy, [], "gpu.md: rows in which the GPU was busy for over 5% longer than a timed step")


def check_attention(page):
    labels = {
        "4k": "D = 64, 4k × 4",
        "8k": "D = 64, 8k × 2",
        "16k": "D = 64, 16k",
        "32k": "D = 64, 32k",
        "64k": "D = 64, 64k",
        "16k-d128": "D = 128, 16k",
        "trained": "gates of a trained 125M, 16k",
    }
    ratios, times = {}, {}
    for shape in read("attention_peers")["shapes"]:
        ms, kept, ratio = shape["ms"], shape["kept"], shape["ratios"]
        row = [ms["official acp"]["both"]]
        for mode in ("paper", "tight"):
            row += [ms[f"ours {mode}"]["both"], 100 * kept[mode], ratio[f"official acp / ours {mode}"]]
        row += [ms[who][way] for who in ("cudnn", "ours off") for way in ("forward", "backward")]
        page.row("shape | official ACP", labels[shape["name"]], row)
        ratios[shape["name"]], times[shape["name"]] = ratio, ms
    shapes = {shape["name"]: shape["ratios"] for shape in read("attention_peers_h200")["shapes"]}
    for mode, form in (("paper", "`paper` {} at 4k to 64k, {} at D = 128, {} on trained gates"), ("tight", "`tight` {}, {} and {}")):
        found = [f"{shapes[name][f'official acp / ours {mode}']:.2f}" for name in labels]
        page.says(form.format(", ".join(found[:5]), *found[5:]))
    for mode, form in (("paper", "with `paper` takes {} times"), ("tight", "`tight` {} times")):
        found = [ratios[name][f"ours {mode} / (off x kept)"] for name in ("16k", "32k", "64k", "16k-d128")]
        page.says(form.format(span(found, ".2f")))
    found = [ratios["trained"][f"ours {mode} / (off x kept)"] for mode in ("paper", "tight")]
    page.says(f"it is {found[0]:.2f} times (`paper`) and {found[1]:.2f} (`tight`)")
    forward, backward = ([1 / ratios[name][f"cudnn / ours off, {way}"] for name in ("16k", "16k-d128")] for way in ("forward", "backward"))
    page.says(
        f"takes {forward[0]:.2f} and {forward[1]:.2f} times its time forward at 16k (D = 64, 128), {backward[0]:.2f} and {backward[1]:.2f} backward"
    )
    ms, flash = times["16k"], times["16k"]["flash"]
    page.says(f"takes {ratios['16k']['flex / ours paper']:.2f} times as long as ours at 16k, D = 64")
    page.says(f"FlashAttention, dense and without a gate, {flash['forward']:.2f} + {flash['backward']:.2f} ms")
    page.says(f"flash-linear-attention without pruning {ms['fla']['both']:.1f}")
    page.says(f"without pruning {ms['official']['both']:.1f} ({ratios['16k']['official / ours off']:.2f} times our `off`)")
    page.says(f"(every chip from sm_80) with `paper` {ms['portable paper']['both']:.2f}")
    spread = [ratio for name, ratio in ratios.items() if name != "trained"]
    return [[ratio[f"official acp / ours {mode}"] for ratio in spread] for mode in ("paper", "tight")], ratios["trained"]


def check_profile(page):
    profiles = [read("profile_760m_16384")["profiles"][name] for name in ("off", "paper", "official-off", "official-paper")]
    left = [{name: group["ms"] for name, group in profile["groups"].items()} | {"nothing runs": profile["idle_ms"]} for profile in profiles]
    attention = [sum(ms for name, ms in groups.items() if name.startswith("attention")) for groups in left]
    for label, *names in (
        ("matrix products",),
        ("attention, forward", "attention forward"),
        ("attention, dQ", "attention dQ"),
        ("attention, dK and dV", "attention dK, dV"),
        ("attention, ranges and sums", "attention ranges, sums"),
        ("norms",),
        ("shift, QK-norm, gates",),
        ("SwiGLU",),
        ("cross entropy",),
        ("PyTorch elementwise",),
        ("AdamW, gradient norm, embedding, copies, other", "AdamW", "gradient norm", "embedding", "copies, fills", "other"),
        ("nothing runs",),
    ):
        parts = [[groups.pop(name) for name in names or [label] if name in groups] for groups in left]
        page.row("ms of a step", label, [sum(part) for part in parts if part])
    page.t.check(not any(left), f"profile: groups that no row has: {left}")
    steps = [profile["step_ms"] for profile in profiles]
    page.row("ms of a step", "step", steps)
    page.row("ms of a step", "attention's share", [100 * ms / step for ms, step in zip(attention, steps)])
    page.says(f"{100 * profiles[1]['pruned']:.0f}% of the blocks skipped")


def check_profile_trained(page):
    profiles = read("profile_trained_125m_16384")["profiles"]
    kernels = [
        [(kernel["name"], kernel["ms"] * 1e3 / 12) for kernel in profiles[mode]["kernels"] if kernel["group"].startswith("attention")]
        for mode in ("paper", "tight")
    ]
    us = {}
    for label, word in (
        ("forward", "hopper_forward_kernel"),
        ("dQ", "hopper_dq_kernel"),
        ("dK and dV", "hopper_dkdv_kernel"),
        ("search (`acp_search`)", "acp_search_kernel"),
        ("sums of gates (`acp_sum_gates`)", "acp_sum_gates_kernel"),
        ("sums for the gates' gradient (`acp_sum_dc`)", "acp_sum_dc_kernel"),
        ("ranges (`acp_ranges`)", "acp_ranges_kernel"),
        ("order (`acp_order`)", "acp_order_kernel"),
    ):
        us[label] = [sum(time for name, time in run if word in name) for run in kernels]
        page.row("µs of a layer", label, [x for x in us[label] if x])
    whole = [sum(column) for column in zip(*us.values())]
    page.row("µs of a layer", "in all", whole)
    for sums, mode in zip(whole, ("paper", "tight")):
        groups = sum(group["ms"] for name, group in profiles[mode]["groups"].items() if name.startswith("attention"))
        page.t.check(abs(sums * 12 / 1e3 - groups) < 1e-6, f"profile of the trained model, {mode}: no kernel of attention is left out")
    fewer = fewer_blocks(*(1 - profiles[mode]["pruned"] for mode in ("paper", "tight")))
    page.says(f"attention as a whole takes {100 - 100 * whole[1] / whole[0]:.1f}% less time with `tight`, for {fewer:.0f}% fewer blocks")
    passes = [sum(us[label][i] for label in ("forward", "dQ", "dK and dV")) for i in (0, 1)]
    shorter = 100 - 100 * passes[1] / passes[0]
    page.says(f"Forward and backward are {shorter:.0f}% shorter ({passes[0] - passes[1]:.0f} µs a layer), not {fewer:.0f}%")
    sums = us["sums of gates (`acp_sum_gates`)"]
    page.says(
        f"the search takes {us['search (`acp_search`)'][1]:.0f} µs, and what the sums of gates do for it, describing heads, {sums[1] - sums[0]:.0f}"
    )
    runs = [profiles[mode] for mode in ("paper", "tight")]
    for run in runs:
        left = run["step_ms"] - run["idle_ms"] - sum(group["ms"] for group in run["groups"].values())
        page.t.check(
            abs(left) < 1e-6, f"profile of the trained model: kernels and the time when nothing runs are the step but for {left} ms"
        )
    idle, steps = ([f"{run[key]:.1f}" for run in runs] for key in ("idle_ms", "step_ms"))
    page.says(f"Kernels and the time when nothing runs ({idle[0]} and {idle[1]} ms) add up to the step, {steps[0]} and {steps[1]} ms")


def check_layers(page):
    layers = read("layers")
    kernels = {kernel["name"]: kernel for kernel in layers["kernels"]}
    for label, names in (
        ("residual + norm, forward / backward", ("residual + norm forward", "norm backward")),
        ("token shift + QK-norm + gate, forward / backward", ("qkv forward", "qkv backward")),
        ("output norm × gate, forward / backward", ("output gate forward", "output gate backward")),
        ("SwiGLU, forward / backward", ("swiglu forward", "swiglu backward")),
        ("cross entropy with gradient, 4096 rows", ("cross entropy, 4096 rows",)),
        ("embedding, forward / backward", ("embedding forward", "embedding backward")),
        ("gradient norm, AdamW, 760M parameters", ("gradient norm, 760M", "AdamW, 760M")),
    ):
        found = [kernels[name] for name in names]
        page.row(
            "GB/s | of the copy", label, [k["us"] for k in found] + [k["gb_per_s"] for k in found] + [100 * k["of_copy"] for k in found]
        )
    page.says(f"moves {layers['copy_gb_per_s']:,.0f} GB/s, a matrix product of 8192³ makes {layers['matmul_tflop_per_s']:.0f} TFLOP/s")
    products = [k["tflop_per_s"] for k in layers["kernels"] if "tflop_per_s" in k and k["name"] != "product, 8192^3"]
    page.says(f"The matrix products of a step of 760M run at {span(products, '.0f')} TFLOP/s")


def check_gpu(t):
    page = Document(t, RESULTS / "gpu.md")
    check_whole_steps(page)
    ratios = check_attention(page)
    check_profile(page)
    check_profile_trained(page)
    check_layers(page)
    run = read("deterministic_125m")
    speed = run["tokens_per_s"]
    t.check(len({run["hashes"][which] for which in ("first", "second", "resumed")}) == 1, "deterministic: the same hash")
    t.check(run["hashes"]["plain"] != run["hashes"]["plain again"], "deterministic: two runs without it")
    page.says("Without it two runs differed")
    best = max(speed["first"], speed["second"])
    page.says(f"It takes {100 * run['cost']:.1f}% more time ({best / 1e3:.0f} against {speed['plain'] / 1e3:.0f} thousand tokens/s)")
    checked = read("check_attention")
    worst = {}
    for entry in checked["worst"]:
        worst[entry["quantity"]] = max(worst.get(entry["quantity"], 0), entry["ratio"])
    page.says(f"{checked['passed']:,} passed, {checked['failed']} failed")
    most, head = max(worst[name] for name in ("o", "dq", "dv")), max(x for name, x in checked["largest"].items() if "a head" in name)
    page.says(
        f"errors of o, dq, dv at most {most:.2f} times the official kernel's, of dk {worst['dk']:.2f}, of d log f {worst['dlog_f']:.2f} "
        f"(largest: {head:.1e} of any head)".replace("e-0", "e-")
    )
    page.finish()
    return ratios


# ---- README.md


def check_readme(t, ratios):
    page = Document(t, ROOT / "README.md", "## Measured")
    rows = speeds_of(read("throughput")["rows"])
    for model, context in sorted({(model, context) for model, context, _ in rows if context != 8192 and "llama" not in model}):
        page.row("FoX (Pro) | official", f"{label_of(model)}, T = {context:,}", against_official(rows, model, context))
    h200 = speeds_of(read("throughput_h200")["rows"])
    ratios_apart = [
        abs(there / here - 1)
        for key in {key[:2] for key in h200}
        for here, there in list(zip(against_official(rows, *key), against_official(h200, *key)))[2::2]
    ]
    t.check(max(ratios_apart) < 0.02, f"README: ratios on an H200 are within {max(ratios_apart)}")
    page.says("are the same within 2%")
    llama = [against_official(rows, model, context) for model, context in {key[:2] for key in rows if "llama" in key[0]}]
    paper, tight = (span([row[column] for row in llama], ".2f") for column in (2, 4))
    page.says(f"FoX (LLaMA) of the same sizes at 4,096 to 16,384: {paper} times with `paper`, {tight} with `tight`")
    (paper, tight), trained = ratios
    page.says(f"is {span(paper, '.1f')} times as fast as the official kernel at the same threshold")
    page.says(
        f"({trained['official acp / ours paper']:.1f} times on the gates of a trained model), {span(tight, '.1f')} times with `tight`"
    )

    runs = read("quality_125m")["runs"]
    for label, name in (
        ("`off`", "off"),
        ("`paper`", "paper"),
        ("`tight`", "tight"),
        ("`paper`, another seed", "paper@2"),
        ("Transformer (Pro)", "transformer"),
    ):
        page.row("125M, 100M tokens", label, [runs[name]["tokens_per_s"], runs[name]["validation"][-1][1]])
    several = [run for run in read("scaling_4gpu")["runs"] if run["gpus"] > 1]
    two, four = ([100 * run["ratio_to_one_gpu"] for run in several if run["gpus"] == n] for n in (2, 4))
    page.says(f"Two H200 train at {span(two, '.1f')}%, four at {span(four, '.1f')}%")
    t.equal(runs["paper"]["loss"], runs["off"]["loss"], "README: losses of `paper` and of `off`")
    page.says("`paper` had the same loss as `off` at every step")
    page.says(f"`tight` ends {runs['off']['validation'][-1][1] - runs['tight']['validation'][-1][1]:.4f} below `off`")
    other = read("quality_125m_again")["runs"]["paper"]
    page.says(f"another run of `paper` ended {runs['off']['validation'][-1][1] - other['validation'][-1][1]:.4f} below")
    page.finish()


def main():
    t = Checks()
    check_training(t)
    check_ranks(t)
    check_readme(t, check_gpu(t))
    Document(t, RESULTS / "cpu.md").finish()
    t.finish()


if __name__ == "__main__":
    main()
