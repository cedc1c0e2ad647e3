#!/usr/bin/env python3
"""Shows that --deterministic gives the same bits, and what it costs.

    python3 dev/check_deterministic.py --model fox-pro-125m -T 16384 --batch-tokens 32768 --steps 50 --out same.json

Runs: twice with --deterministic; once more, stopped at half of the steps and resumed from the checkpoint; and twice
without. All print the hash of their parameters, and the first three must print the same. The cost is the ratio of the
tokens/s of the median steps. Exit status 1 when hashes differ that must not. Without --data the shards are made of this
project's sources.
"""

import argparse
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import machine
import official


def own_sources(args, scratch):
    """Shards of the files of this repository, in GPT-2's tokens."""
    data = scratch / "data"
    folders = [official.ROOT / name for name in ("train", "cpu", "cuda", "tests", "dev", "docs", "scripts")]
    vocab, kinds = official.ROOT / "tests/data/gpt2/gpt2.tiktoken", ".h,.c,.cu,.cuh,.md,.py,.sh"
    options = official.options(o=data, vocab=vocab, extensions=kinds, val_fraction=0)
    subprocess.run([args.make_shards, *options, *folders], check=True, stdout=subprocess.DEVNULL)
    return data


def train(args, data, out, *options):
    """The hash of the parameters at the end, and the records of metrics.jsonl."""
    own = official.options(
        i=data,
        o=out,
        e=args.model,
        T=args.context,
        b=args.micro_batch,
        d=args.batch_tokens,
        x=args.steps,
        v=0,
        n=0,
        pruning_every=0,
        acp=args.acp,
        device=args.device,
    )
    command = [args.train_fox, *own, *options]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = re.search(r"parameter hash ([0-9a-f]{16})", done.stdout)
    if done.returncode != 0 or not found:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout[-2000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found.group(1), records


def speed(records):
    return statistics.median([r["tokens_per_s"] for r in records if r["kind"] == "step"][2:])


def resumed(args, data, out):
    """The same run in two halves: the checkpoint of the end is taken away and the run goes on from the middle."""
    train(args, data, out, "--deterministic", "-n", args.steps // 2, "--keep", 0)
    shutil.rmtree(official.newest_checkpoint(out))
    return train(args, data, out, "--deterministic", "-y")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards")
    parser.add_argument("--model", default="fox-pro-125m", help="preset or checkpoint")
    parser.add_argument("-T", "--context", type=int, default=16384)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--acp", default="paper", choices=("off", "paper", "tight"))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--train-fox", default=str(official.ROOT / "train_fox"), metavar="PROGRAM")
    parser.add_argument("--make-shards", default=str(official.ROOT / "make_shards"), metavar="PROGRAM")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="fox_deterministic_"))
    hashes, speeds = {}, {}
    try:
        data = args.data or own_sources(args, scratch)
        for name, options in (("first", ["--deterministic"]), ("second", ["--deterministic"]), ("plain", []), ("plain again", [])):
            hashes[name], records = train(args, data, scratch / "run", *options)
            speeds[name] = speed(records)
            shutil.rmtree(scratch / "run")
            print(f"{name:12} {hashes[name]} {speeds[name]:10,.0f} tokens/s", flush=True)
        hashes["resumed"], records = resumed(args, data, scratch / "run")
        print(f"{'resumed':12} {hashes['resumed']}")
    finally:
        shutil.rmtree(scratch)
    same = hashes["first"] == hashes["second"] == hashes["resumed"]
    cost = speeds["plain"] / max(speeds["first"], speeds["second"]) - 1
    print(
        f"{args.model}, T = {args.context}, {args.steps} steps: --deterministic "
        + ("gives the same bits, stopped and resumed too" if same else "DOES NOT REPEAT")
        + f", and takes {100 * cost:.1f}% more time; without it two runs "
        + ("are the same too" if hashes["plain"] == hashes["plain again"] else "differ")
        + (", and the same as with it" if hashes["plain"] == hashes["first"] else "")
    )
    if args.out:
        pathlib.Path(args.out).write_text(
            json.dumps(
                dict(
                    machine.facts(),
                    computed_on=official.device_of(records),
                    model=args.model,
                    context=args.context,
                    batch_tokens=args.batch_tokens,
                    steps=args.steps,
                    acp=args.acp,
                    hashes=hashes,
                    tokens_per_s=speeds,
                    same=same,
                    cost=cost,
                ),
                indent=1,
            )
            + "\n"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
