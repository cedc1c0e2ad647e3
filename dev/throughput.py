#!/usr/bin/env python3
"""The throughput table: whole training steps at several contexts, with and without pruning. scripts/throughput_table.sh runs it.

Every figure is the median of the steps after warm-up, of a program by itself. A step is --batch-tokens tokens (or one sequence,
where that is longer) in one micro-batch: forward, backward, clipping, AdamW. All runs of a model have the same weights and see
the same tokens; the learning rate is 1e-8, so that they stay as they are.

The weights decide what is pruned, so the table says which they are:
  gates       (default) untrained weights with the gates of dev/impose_gates.py, spread as in a trained model; random tokens
  checkpoint  --checkpoint DIR, with --data: a trained model on real tokens; --models then only names it

Columns. Speed-up: over `off` of the same program. Attention: its share of the time in which the GPU did anything, by
dev/profile_step.py in further steps of the same run, which count in no time; "-" where CUPTI cannot trace. Saved: fraction of
the blocks of causal attention, so of its floating-point operations, that is skipped. Memory: of the GPU. With --official DIR
(a clone of the official repository; needs PyTorch) that program is timed too, after ours, in one process a model;
--profile-official also finds its attention's share, which takes a minute each.

--out PREFIX writes PREFIX.json, PREFIX.txt, PREFIX.png. --merge FILE... takes over earlier results, so that a table can be made in
several calls; rows of the same program, model, context, pruning and weights are replaced.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import machine
import numpy as np
import official
import profile_step

KEY = ("program", "model", "context", "acp", "weights")


# ---- the start that all runs of a model share


def write_start(args, model, folder):
    """FOLDER/checkpoint and FOLDER/random_train.bin; says what they are."""
    longest = max(max(args.context), args.batch_tokens)
    count = (args.warmup + args.steps + 1) * longest + 1
    if args.checkpoint:
        tokens, vocab_size, missing = [], None, count
        for path in official.shard_paths(args.data):
            shard, vocab_size = official.open_shard(path)
            tokens.append(np.array(shard[:missing]))
            missing -= len(tokens[-1])
            if missing == 0:
                break
        official.write_shard(folder / "random_train.bin", np.resize(np.concatenate(tokens), count), vocab_size)
        (folder / "checkpoint").symlink_to(args.checkpoint.resolve())
        return f"checkpoint {args.checkpoint}"
    profile_step.write_start(model, count, folder)
    return "gates"


# ---- ours


def batch_of(args, T):
    """Tokens of a step, and sequences."""
    tokens = max(args.batch_tokens, T)
    if tokens % T != 0:
        raise SystemExit(f"--batch-tokens {args.batch_tokens}: expected a multiple of every context, -T {T} is not")
    return tokens, tokens // T


def options_of(args):
    """train_fox's options that all runs have."""
    return official.options(data_order="file", r=args.recompute, device=args.device)


def time_ours(args, folder, model, T, acp, traced):
    """A row; traced: with attention's share, or the reason why it has none."""
    tokens, sequences = batch_of(args, T)
    row = dict(program="ours", model=model, context=T, acp=acp, batch_tokens=tokens)
    out, count = folder / "run", args.warmup + args.steps
    options = official.timed_options(T, sequences, tokens, count + (profile_step.SPARE_STEPS if traced else 0), acp)
    program = (args.train_fox, folder / "checkpoint", folder / "random_train.bin", out, *options, *options_of(args))
    profile = why = None
    try:
        if traced:
            records, profile, why = profile_step.time_and_trace(official.ours_command(*program), out, count, folder)
        else:
            records = official.run_ours(*program)
    except SystemExit as error:
        if "GiB of GPU memory" not in str(error) and "out of memory" not in str(error):
            raise
        return dict(row, out_of_memory=True), None
    finally:
        shutil.rmtree(out, ignore_errors=True)
    steps = [r for r in records if r["kind"] == "step"][args.warmup : count]  # those after them were traced
    ms = statistics.median(s["step_ms"] for s in steps)
    row.update(
        tokens_per_s=1e3 * tokens / ms,
        step_ms=ms,
        fastest_ms=min(s["step_ms"] for s in steps),
        slowest_ms=max(s["step_ms"] for s in steps),
        steps=len(steps),
        saved=steps[-1]["pruned"],
        memory_bytes=steps[-1]["gpu_mem_bytes"],
        mfu=steps[-1]["mfu"],
        loss=steps[-1]["loss"],
        device=official.device_of(records),
    )
    return dict(row, **(share_of(profile_step.summarize(profile)) if profile else {})), why


def share_of(profile):
    """Attention's share, and that of each part, of the time in which the GPU did anything in a profiled step."""
    busy = profile["step_ms"] - profile["idle_ms"]
    parts = {name: group["ms"] / busy for name, group in profile["groups"].items() if name.startswith("attention")}
    return dict(attention_share=sum(parts.values()), attention_parts=parts, profile_step_ms=profile["step_ms"], profile_busy_ms=busy)


# ---- the official program


def official_command(args, folder, model, contexts, tokens, acp, steps, warmup):
    options = official.options(
        official=args.official, model=model, start=folder, T=contexts, acp=acp, batch_tokens=tokens, steps=steps, warmup=warmup
    )
    command = [sys.executable, official.ROOT / "dev" / "bench_official.py", *options]
    return command + (["--recompute"] if args.recompute == 2 else [])


def time_official(args, folder, model):
    """Rows of one process for all contexts whose step has the same tokens."""
    modes = [acp for acp in args.acp if acp != "tight"]
    for tokens in sorted({batch_of(args, T)[0] for T in args.context}):
        contexts = [T for T in args.context if batch_of(args, T)[0] == tokens]
        out = folder / "official.json"
        command = official_command(args, folder, model, contexts, tokens, modes, args.official_steps, args.official_warmup)
        done = subprocess.run(
            list(map(str, [*command, "--out", out])),
            env={"TRITON_CACHE_AUTOTUNING": "1", **os.environ},  # what it finds fastest for these shapes serves the next model too
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"the official program ended with {done.returncode}:\n{done.stdout[-2000:]}")
        for run in json.loads(out.read_text())["runs"]:
            row = {
                key: run[key]
                for key in (
                    "program",
                    "model",
                    "context",
                    "acp",
                    "tokens_per_s",
                    "step_ms",
                    "fastest_ms",
                    "slowest_ms",
                    "steps",
                    "memory_bytes",
                    "loss",
                    "out_of_memory",
                    "gates",
                )
                if key in run
            }
            yield dict(row, batch_tokens=tokens)


def profile_official(args, folder, model, T, acp):
    tokens = batch_of(args, T)[0]
    command = official_command(args, folder, model, [T], tokens, [acp], 4, 2)
    return share_of(profile_step.summarize(profile_step.trace(command, "FusedAdam", 2, folder)))


# ---- the table


def measure(args, result, save):
    """Adds the rows of all models to result["rows"]; calls save() after each. Returns a line for each model on how long it took."""
    can_trace, facts, lines = not args.no_profile, machine.facts(), []

    def add(row, weights):
        row["weights"] = weights
        result["rows"] = [r for r in result["rows"] if any(r[k] != row[k] for k in KEY)] + [dict(row, **facts)]
        save()
        speed = "out of memory" if row.get("out_of_memory") else f"{row['tokens_per_s']:,.0f} tokens/s"
        share = f", attention {100 * row['attention_share']:.1f}% of the step" if "attention_share" in row else ""
        print(f"{row['program']:8} {row['model']} T = {row['context']:<6} acp {row['acp']:5} {speed}{share}", flush=True)

    def without_profile(why):
        nonlocal can_trace
        can_trace = False
        print(f"no profile, so no shares of attention: {why.splitlines()[0]}", flush=True)

    for model in args.models:
        folder, times = pathlib.Path(tempfile.mkdtemp(prefix="fox_throughput_")), [time.monotonic()]
        try:
            weights = write_start(args, model, folder)
            if can_trace and args.device != "cpu":
                try:
                    profile_step.build_tracer(folder)
                except SystemExit as error:
                    without_profile(str(error))
            times.append(time.monotonic())
            for T in [] if args.only_official else args.context:
                for acp in args.acp:
                    row, why = time_ours(args, folder, model, T, acp, can_trace and args.device != "cpu")
                    add(row, weights)
                    if why:
                        without_profile(why)
            times.append(time.monotonic())
            for row in time_official(args, folder, model) if args.official else []:
                if args.profile_official and can_trace and not row.get("out_of_memory"):
                    try:
                        row.update(profile_official(args, folder, model, row["context"], row["acp"]))
                    except SystemExit as error:
                        print(f"no profile of the official program: {str(error).splitlines()[0]}", flush=True)
                add(row, weights)
            times.append(time.monotonic())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        start, ours, theirs = (b - a for a, b in zip(times, times[1:]))
        lines.append(f"{model}: {times[3] - times[0]:.0f} s (start {start:.0f}, ours {ours:.0f}, official {theirs:.0f})")
    return lines


def find(rows, **wanted):
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)


def number(row, key, form):
    """A cell: the value, `memory` where the run did not fit, - where it is not known."""
    if row is None:
        return "-"
    if row.get("out_of_memory"):
        return "memory" if key == "tokens_per_s" else "-"
    value = row.get(key)
    return "-" if value is None else form.format(value)


def table(result):
    """The text: for each kind of weights and model a line a context and program."""
    rows, lines = result["rows"], []
    width = {"tokens/s": 27, "speed-up": 13, "attention": 20, "saved": 13, "GB": 6}
    for weights in dict.fromkeys(r["weights"] for r in rows):
        mine = [r for r in rows if r["weights"] == weights]
        what = "gates spread as in a trained model (dev/impose_gates.py)" if weights == "gates" else weights
        about = {key: ", ".join(dict.fromkeys(str(r[key]) for r in mine if r[key])) for key in ("device", "date", "commit")}
        lines += [
            f"Weights: {what}. {about['device'] or 'CPU'}, {about['date']}, commit {about['commit']}",
            "",
            " " * 34 + "".join(f"{name:>{w}}" for name, w in width.items()) + "   ours/official",
            f"{'model':22}{'context':>8}    "
            + f"{'off':>9}{'paper':>9}{'tight':>9}"
            + f"{'paper':>7}{'tight':>6}"
            + f"{'off':>8}{'paper':>6}{'tight':>6}"
            + f"{'paper':>7}{'tight':>6}"
            + f"{'off':>6}"
            + f"{'off':>10}{'paper':>6}",
        ]
        for model in dict.fromkeys(r["model"] for r in mine):
            for T in sorted({r["context"] for r in mine if r["model"] == model}):
                for program in ("ours", "official"):
                    cells = {acp: find(mine, model=model, context=T, program=program, acp=acp) for acp in ("off", "paper", "tight")}
                    if any(cells.values()):
                        lines.append(table_line(model, T, program, cells, find_ratios(mine, model, T) if program == "ours" else {}))
        lines.append("")
    lines += [
        "tokens/s of whole steps; speed-up over off; attention: share of the step's GPU time; saved: part of the blocks of causal",
        "attention that is skipped; GB of GPU memory. `memory`: it did not fit.",
    ]
    return "\n".join(lines) + "\n"


def find_ratios(rows, model, T):
    """Ours over official by pruning, where both are known."""
    found = {}
    for acp in ("off", "paper"):
        pair = [find(rows, model=model, context=T, program=program, acp=acp) for program in ("ours", "official")]
        if all(r and r.get("tokens_per_s") for r in pair):
            found[acp] = pair[0]["tokens_per_s"] / pair[1]["tokens_per_s"]
    return found


def table_line(model, T, program, cells, ratios):
    off = cells["off"].get("tokens_per_s") if cells["off"] else None

    def gain(acp):
        speed = cells[acp].get("tokens_per_s") if cells[acp] else None
        return f"{speed / off:.2f}" if speed and off else "-"

    def percent(acp, key):
        row = cells[acp]
        return f"{100 * row[key]:.0f}%" if row and row.get(key) is not None else "-"

    memory = cells["off"] or cells["paper"] or cells["tight"]
    gigabytes = f"{memory['memory_bytes'] / 1e9:.1f}" if memory.get("memory_bytes") else "-"
    name = model if program == "ours" else "  official PyTorch"
    return (
        f"{name:22}{T:8,}    "
        + "".join(f"{number(cells[acp], 'tokens_per_s', '{:,.0f}'):>9}" for acp in ("off", "paper", "tight"))
        + f"{gain('paper'):>7}{gain('tight'):>6}"
        + f"{percent('off', 'attention_share'):>8}"
        + "".join(f"{percent(acp, 'attention_share'):>6}" for acp in ("paper", "tight"))
        + f"{percent('paper', 'saved'):>7}{percent('tight', 'saved'):>6}"
        + f"{gigabytes:>6}"
        + "".join(f"{ratios[acp]:>{w}.2f}" if acp in ratios else "-".rjust(w) for acp, w in (("off", 10), ("paper", 6)))
    ).rstrip()


def draw(result):
    """Bars of tokens/s: a panel for each model, a group for each context."""
    sys.path.insert(0, str(official.ROOT / "scripts"))
    import figures

    pyplot = figures.pyplot()
    rows = [r for r in result["rows"] if r.get("tokens_per_s")]
    models = list(dict.fromkeys((r["model"], r["weights"]) for r in rows))
    kinds = [
        ("official", "off", "#bbbbbb", "official"),
        ("official", "paper", "#777777", "official, ACP"),
        ("ours", "off", "#a6cee3", "ours, off"),
        ("ours", "paper", "#1f78b4", "ours, paper"),
        ("ours", "tight", "#33a02c", "ours, tight"),
    ]
    figure, axes = pyplot.subplots(1, len(models), figsize=(2 + 3 * len(models), 3.6), squeeze=False)
    for axis, (model, weights) in zip(axes[0], models):
        mine = [r for r in rows if (r["model"], r["weights"]) == (model, weights)]
        contexts = sorted({r["context"] for r in mine})
        present = [k for k in kinds if any((r["program"], r["acp"]) == k[:2] for r in mine)]
        for i, (program, acp, color, label) in enumerate(present):
            at = [(x, r) for x, T in enumerate(contexts) for r in [find(mine, program=program, acp=acp, context=T)] if r]
            axis.bar(
                [x + (i - (len(present) - 1) / 2) * 0.8 / len(present) for x, _ in at],
                [r["tokens_per_s"] for _, r in at],
                0.8 / len(present),
                color=color,
                label=label,
            )
        axis.set_xticks(range(len(contexts)), [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in contexts])
        axis.set_xlabel("context")
        axis.set_title(f"{model}, {'gate spread' if weights == 'gates' else 'trained'}", fontsize=9)
    axes[0][0].set_ylabel("tokens/s")
    handles = {label: bars for axis in axes[0] for bars, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["fox-pro-125m"], help="presets")
    parser.add_argument("-T", "--context", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--acp", nargs="+", default=["off", "paper", "tight"], choices=("off", "paper", "tight"))
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--recompute", type=int, default=0, choices=(0, 1, 2), help="-r of train_fox; 2: of the official program too")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of ours")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository, to be timed too")
    parser.add_argument("--official-steps", type=int, default=5)
    parser.add_argument("--official-warmup", type=int, default=3)
    parser.add_argument("--only-official", action="store_true", help="leave ours out")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="DIR", help="trained weights")
    parser.add_argument("--data", help="shards for --checkpoint")
    parser.add_argument("--no-profile", action="store_true", help="no shares of attention")
    parser.add_argument("--profile-official", action="store_true", help="shares of the official program's attention too")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where ours computes")
    parser.add_argument("--train-fox", default=str(official.ROOT / "train_fox"), metavar="PROGRAM")
    parser.add_argument("--merge", nargs="+", default=[], metavar="FILE", help="earlier results")
    parser.add_argument("--out", default="build/throughput", metavar="PREFIX", help="of the files")
    args = parser.parse_args()
    if bool(args.checkpoint) != bool(args.data):
        raise SystemExit("--checkpoint and --data belong together")
    if args.checkpoint and (len(args.models) != 1 or not (args.checkpoint / "config.json").is_file()):
        raise SystemExit(f"{args.checkpoint}: expected the folder of one checkpoint, and one name for it with --models")
    if args.official and not (pathlib.Path(args.official) / "src" / "forgetting_transformer").is_dir():
        raise SystemExit(
            f"--official {args.official}: no src/forgetting_transformer there; expected a clone of "
            "github.com/zhixuan-lin/forgetting-transformer"
        )
    if args.models and not pathlib.Path(args.train_fox).is_file():
        raise SystemExit(f"{args.train_fox}: not there; run make first")
    result, out, begun = dict(rows=[]), pathlib.Path(args.out), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in args.merge:
        for row in json.loads(pathlib.Path(path).read_text())["rows"]:
            result["rows"] = [r for r in result["rows"] if any(r[k] != row[k] for k in KEY)] + [row]

    def save():
        pathlib.Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")

    lines = measure(args, result, save)
    if not result["rows"]:
        raise SystemExit("nothing was measured and nothing merged")
    save()
    text = table(result)
    pathlib.Path(f"{out}.txt").write_text(text)
    print("\n" + text, end="")
    try:
        draw(result).savefig(f"{out}.png")
    except SystemExit as error:  # matplotlib is missing: the table stands
        print(f"no picture: {error}")
    print("\n".join(["", *lines, f"in all: {time.monotonic() - begun:.0f} s"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
