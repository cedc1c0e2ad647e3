#!/usr/bin/env python3
"""The same training by several programs: the official PyTorch FoX and this one, with and without pruning.

    python3 dev/compare_training.py --official DIR --data data --out training.json official paper
    python3 dev/compare_training.py --data data --out training_more.json off tight paper@2
    python3 dev/compare_training.py --merge training.json training_more.json --out docs/results/training_125m.json

Runs are `official`, `official-off` (the official program with and without ACP), `paper`, `tight`, `off` (ours) and
`transformer` (ours, the model --baseline, without forget gates); `@2` trains with seed 2 instead of 1, which changes
initial weights and order of the data. All runs of a seed have the
same initial weights (written by train_fox, a function of the seed alone), see the same windows at every step (see
dev/train_official.py), and are validated on the same windows at the same steps. Defaults: FoX (Pro) 125M, T = 16384,
320 steps of 131072 tokens, AdamW with a peak rate of 3e-4, 32 steps of warm-up and a cosine to 0.

--out holds every run's curves; --merge takes over the runs of earlier files, so that parts can be made at different
times. Files of another recipe are refused; --check only looks whether files are of this command line's recipe. The
table: mean training loss of the last 20 steps, the last validation, what they differ by from `official` and from `off`
of the same seed (or from the first run), and the largest difference of the training losses, as means of 20
steps, in the second half; tokens/s of the median step; skipped fraction of the attention blocks at the end. Below it,
how far the last validations of runs are apart that differ by their seed only. --keep FOLDER keeps the folder of each
run of ours, with its last checkpoint.
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

import machine
import official
from train_official import Plan

LAST = 20  # steps that a training loss is averaged over
OF_A_RUN = ("data", "val_data", "vocab", "out", "acp", "seed")  # settings of a run or a place, not of the recipe
INDIFFERENT = ("device", "recompute", "deterministic", "zero", "hang_timeout", "checkpoint_every", "keep")  # to the recipe too


def split_name(name):
    """'paper@2' to ('paper', 2)."""
    kind, _, seed = name.partition("@")
    if kind not in ("official", "official-off", "paper", "tight", "off", "transformer") or not (seed or "1").isdigit():
        raise SystemExit(f"{name}: no run of this name; --help lists them")
    return kind, int(seed or 1)


def recipe(args, seed):
    """train_fox's options of a run, but for the model and the data."""
    steps = int(args.tokens) // args.batch_tokens
    return official.options(
        T=args.context,
        b=args.micro_batch,
        d=args.batch_tokens,
        x=steps,
        l=args.lr,
        warmup_tokens=args.warmup_steps * args.batch_tokens,
        v=args.val_every,
        val_batches=args.val_sequences // args.micro_batch,
        pruning_every=args.val_every,
        seed=seed,
    )


def recipe_of(plan):
    """What all runs of a table share: the settings, and how many windows of data there are."""
    return dict(
        settings={k: v for k, v in plan.settings.items() if k not in OF_A_RUN} | dict(windows=plan.windows),
        lr=[float(f"{s['lr']:.6g}") for s in plan.steps],
    )


def require_same(found, expected, who, advice=""):
    """Ends with one line when two recipes differ. Settings that one of them does not know, being older, count as equal."""
    a, b = found["settings"], expected["settings"]
    different = [k for k in b if k in a and k not in OF_A_RUN + INDIFFERENT and a[k] != b[k]]
    if different:
        raise SystemExit(f"{who}: another recipe: " + ", ".join(f"{k} is {a[k]}, not {b[k]}" for k in different) + advice)
    if found["lr"] != expected["lr"]:
        raise SystemExit(f"{who}: another recipe: the learning rates of its steps differ{advice}")


def initial_weights(args, model, seed, scratch):
    """A checkpoint folder with the weights that train_fox starts from with this seed."""
    out = scratch / f"init_{model}_{seed}"
    if out.exists():
        return official.newest_checkpoint(out)
    return official.fresh_weights(model, args.data, out, seed)


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_ours(args, kind, seed, scratch):
    baseline = kind == "transformer"
    weights = initial_weights(args, args.baseline if baseline else args.model, seed, scratch)
    out = args.keep / f"{kind}@{seed}" if args.keep else scratch / "run"
    shutil.rmtree(out, ignore_errors=True)
    options = official.options(acp="off" if baseline else kind, device=args.device, n=0 if args.keep else -1)
    records = official.run_ours(args.train_fox, weights, args.data, out, *recipe(args, seed), *options)
    if not args.keep:
        shutil.rmtree(out)
    return records


def run_official(args, kind, seed, scratch):
    """In a process of its own, so that its memory is free afterwards. Its records come back even if it ends badly."""
    log = pathlib.Path(args.out).with_suffix(f".{kind}.jsonl")
    options = official.options(
        official=args.official,
        init=initial_weights(args, args.model, seed, scratch),
        acp="off" if kind == "official-off" else "paper",
        out=log,
        seconds=args.official_seconds,
    )
    command = [sys.executable, official.ROOT / "dev" / "train_official.py", *options, "--", "-e", args.model, "-i", args.data]
    command += recipe(args, seed)
    done = subprocess.run(list(map(str, command)))
    if done.returncode != 0:
        print(f"{kind} ended with {done.returncode}", flush=True)
    return records_of(log) if log.exists() else []


def check_rates(plan, steps, name):
    """Both sides must have trained at the rates of the plan."""
    for record, planned in zip(steps, plan.steps):
        if abs(record["lr"] - planned["lr"]) > 1e-6 * planned["lr"]:
            raise SystemExit(f"{name}, step {record['step']}: rate {record['lr']}, the plan has {planned['lr']}")


def summarize(name, records, plan):
    """The entry of a run in the JSON file."""
    steps = [r for r in records if r["kind"] == "step"]
    check_rates(plan, steps, name)
    if any(r["loss"] is None for r in steps):
        raise SystemExit(f"{name}: a loss was not finite")
    settings = next(r for r in records if r["kind"] == "run")["settings"]
    if settings.get("windows", plan.windows) != plan.windows:
        raise SystemExit(f"{name}: {settings['windows']} windows of data, the plan has {plan.windows}")
    kind, seed = split_name(name)
    run = dict(
        program=kind.partition("-")[0] if kind.startswith("official") else "ours",
        seed=seed,
        acp=dict(official="paper", transformer="off").get(kind, kind.removeprefix("official-")),
        computed_on=settings["device"],
        **machine.facts(),
        tokens_per_s=statistics.median(r["tokens_per_s"] for r in steps),
        train_seconds=sum(r["step_ms"] for r in steps) / 1e3,
        loss=[round(r["loss"], 5) for r in steps],
        grad_norm=[round(r["grad_norm"], 5) for r in steps],
        validation=[[r["step"], round(r["loss"], 5)] for r in records if r["kind"] == "validation"],
    )
    if any(r.get("pruned") is not None for r in steps):
        run["pruned"] = [round(r["pruned"], 4) for r in steps]
    return run


def smooth(losses):
    """Means of LAST steps."""
    return [statistics.fmean(losses[i : i + LAST]) for i in range(0, len(losses) - LAST + 1, LAST)]


def difference(run, other):
    """Of the last training losses, of the last validation, and the largest in the second half, where both got to."""
    n = min(len(run["loss"]), len(other["loss"]))
    a, b = smooth(run["loss"][:n]), smooth(other["loss"][:n])
    last = statistics.fmean(run["loss"][:n][-LAST:]) - statistics.fmean(other["loss"][:n][-LAST:])
    validation, common = None, dict(map(tuple, other["validation"]))
    for step, loss in run["validation"]:
        validation = loss - common[step] if step in common else validation
    curve = max((abs(x - y) for x, y in list(zip(a, b))[len(a) // 2 :]), default=None)
    return dict(train=last, validation=validation, curve=curve)


def show(number, width=9, digits=4, sign=""):
    return " " * (width - 1) + "-" if number is None else f"{number:{sign}{width}.{digits}f}"


def print_table(runs):
    print(f"\n{'run':14} {'steps':>5} {'train':>9} {'valid':>9} {'tokens/s':>9} {'pruned':>7}   differs from     train     valid     curve")
    for name, run in runs.items():
        line = (
            f"{name:14} {len(run['loss']):5} {show(statistics.fmean(run['loss'][-LAST:]))} "
            f"{show(run['validation'][-1][1] if run['validation'] else None)} {run['tokens_per_s']:9,.0f} "
            + (f"{100 * statistics.fmean(run['pruned'][-LAST:]):6.1f}%" if "pruned" in run else "      -")
        )
        suffix = name.partition("@")[1] + name.partition("@")[2]
        others = [o for o in ("official" + suffix, "off" + suffix) if o in runs and o != name]
        for other in others or [o for o in list(runs)[:1] if o != name] or [None]:
            if other is not None:
                d = difference(run, runs[other])
                line += f"   {other:12} {show(d['train'], sign='+')} {show(d['validation'], sign='+')} {show(d['curve'])}"
            print(line)
            line = " " * 58


def print_seeds(runs):
    """How far the last validations are apart of runs that differ by their seed."""
    by_kind = {}
    for name, run in runs.items():
        if run["validation"]:
            by_kind.setdefault(name.partition("@")[0], []).append(run["validation"][-1][1])
    for kind, losses in by_kind.items():
        if len(losses) > 1:
            print(
                f"{len(losses)} seeds of {kind}: last validations {min(losses):.4f} to {max(losses):.4f}, "
                f"apart by {max(losses) - min(losses):.4f}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="what to train")
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--data", help="folder of shards, *train*.bin and *val*.bin")
    parser.add_argument("--out", default=os.path.join(os.environ.get("OUT") or "build", "training.json"), help="JSON file")
    parser.add_argument("--merge", nargs="+", default=[], metavar="FILE", help="earlier results")
    parser.add_argument("--check", nargs="+", default=[], metavar="FILE", help="earlier results that must be of this recipe")
    parser.add_argument("--model", default="fox-pro-125m", help="preset")
    parser.add_argument("--baseline", help="preset of `transformer`; by default the one like --model")
    parser.add_argument("-T", "--context", type=int, default=16384)
    parser.add_argument("--batch-tokens", type=int, default=131072, help="tokens in a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences at a time")
    parser.add_argument("--tokens", type=float, default=42e6, help="of a whole run")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=32)
    parser.add_argument("--val-every", type=int, default=40, help="steps between validations")
    parser.add_argument("--val-sequences", type=int, default=32)
    parser.add_argument("--official-seconds", type=float, default=1e9, help="the official run ends when they are over")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="where the folders of our runs stay")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where ours computes")
    parser.add_argument("--train-fox", default=str(official.ROOT / "train_fox"), metavar="PROGRAM")
    args = parser.parse_args()
    args.baseline = args.baseline or args.model.replace("fox", "transformer", 1)
    names = [(name, *split_name(name)) for name in args.runs]
    if (names or args.check) and not args.data:
        parser.error("--data is needed")
    if any(kind.startswith("official") for _, kind, _ in names) and not args.official:
        parser.error("--official is needed")
    if args.check:
        expected = recipe_of(Plan(["-e", args.model, "-i", args.data, *recipe(args, 1)]))
        for path in args.check:
            require_same(json.loads(pathlib.Path(path).read_text()), expected, path, "; remove it or choose another OUT")
        return 0
    result = dict(runs={})
    for path in args.merge:
        earlier = json.loads(pathlib.Path(path).read_text())
        if result["runs"]:
            require_same(earlier, result, f"{path} cannot be merged with {args.merge[0]}")
        result = {**result, **earlier, "runs": {**result["runs"], **earlier["runs"]}}
    pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="fox_training_"))
    try:
        for name, kind, seed in names:
            plan = Plan(["-e", args.model, "-i", args.data, *recipe(args, seed)])
            if result["runs"]:
                require_same(recipe_of(plan), result, f"{name} cannot be merged with {', '.join(result['runs'])}")
            result.update(recipe_of(plan))
            run = run_official if kind.startswith("official") else run_ours
            records = run(args, kind, seed, scratch)
            if not any(r["kind"] == "step" for r in records):
                raise SystemExit(f"{name}: no step was made")
            result["runs"][name] = summarize(name, records, plan)
            pathlib.Path(args.out).write_text(json.dumps(result) + "\n")
            print(f"{name}: {len(result['lr'])} steps in {result['runs'][name]['train_seconds']:.0f} s", flush=True)
    finally:
        shutil.rmtree(scratch)
    pathlib.Path(args.out).write_text(json.dumps(result) + "\n")
    print_table(result["runs"])
    print_seeds(result["runs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
