#!/usr/bin/env python3
"""Where the time of a training step goes on the GPU: by kind of kernel, and how long nothing ran.

    python3 dev/profile_step.py --model fox-pro-125m -T 16384 --batch-tokens 32768 --acp off paper tight --out out.json
    python3 dev/profile_step.py --model fox-pro-125m --official DIR --acp paper     # the official program beside it
    python3 dev/profile_step.py --data data --init out/step_00001000 --acp paper    # trained weights, real text
    python3 dev/profile_step.py --trace -- PROGRAM ARGUMENTS                        # any program that trains

train_fox makes some steps under dev/cupti_trace.c, which is compiled first and reports every kernel by CUPTI; the
first steps (--warmup) are left out. Without --init the weights are untrained with the gates of dev/impose_gates.py, as
in every comparison of speed, and the tokens random; the learning rate is too small to change them.

The table: ms a step, share of the span, calls a step. The span goes from the end of one step to the end of another one,
and a moment in which several kernels run counts for the one that began first, so the shares and `idle` add up to 100%.
Tracing itself adds a little time between kernels: tokens/s is for comparison with the program alone.

Where CUPTI does not work (no permission to trace), --ncu times the kernels by Nsight Compute instead: slowly, one by
one, and without idle time.
"""

import argparse
import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import machine
import numpy as np
import official
from impose_gates import impose_gates

VOCAB_SIZE = 50257
EMBEDDING_SCALE = 1000.0  # see impose_gates.py
# A kernel belongs to the first group one of whose words is in its name.
GROUPS = (
    ("attention forward", ("acp_forward", "hopper_forward", "_fwd_kernel.attention")),
    ("attention dQ", ("acp_dq", "hopper_dq", "_bwd_q_kernel")),
    ("attention dK, dV", ("acp_dkdv", "hopper_dkdv", "_bwd_kv_kernel")),
    ("attention ranges, sums", ("acp_", "hopper_", "start_index_kernel", "end_index_kernel", "_bwd_preprocess")),
    ("norms", ("residual_norm", "norm_backward", "sum_partials", "layer_norm_fwd", "layer_norm_bwd")),
    ("shift, QK-norm, gates", ("qkv_", "output_gate_", "shift_fwd", "shift_bwd", "layer_norm_gated", "rotary")),
    ("SwiGLU", ("swiglu",)),
    ("cross entropy", ("cross_entropy", "sum_losses")),
    ("embedding", ("embedding", "indexselect", "index_elementwise", "vectorized_gather")),
    ("gradient norm", ("squares_kernel", "clip_kernel", "lpnorm")),
    ("AdamW", ("adamw", "fusedadam", "convert_kernel")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "cublas", "splitk", "s16816", "xmma")),
    ("copies, fills", ("memcpy", "memset")),
    ("sums over GPUs", ("nccl",)),
    ("PyTorch elementwise", ("at::native", "at6native", "triton_")),
)
# Of a run that is timed first and traced then (time_and_trace): the ends of steps that are left out, steps that are looked at, steps it
# may make beyond those that are timed, and seconds that the tracer may take to begin.
LEFT_OUT, LOOKED_AT, SPARE_STEPS, BEGIN_SECONDS = 2, 4, 200, 30
# ncu has columns of these names with --csv; time in ns.
NCU = ["--csv", "--metrics", "gpu__time_duration.sum", "--print-units", "base"]


def group_of(name):
    # The official attention's kernel has the plainest of names; its norms' kernels end with the same letters.
    lower = "_fwd_kernel.attention" if name == "_fwd_kernel" else name.lower()
    return next((group for group, words in GROUPS if any(word in lower for word in words)), "other")


# ---- the trace


def cuda_root():
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return pathlib.Path(os.environ.get("CUDA_HOME") or pathlib.Path(nvcc).resolve().parent.parent)


def find_cupti():
    """CUPTI's library: of the toolkit, or one that came with PyTorch."""
    root = cuda_root()
    places = [root / "lib64", root / "lib", root / "extras" / "CUPTI" / "lib64"]
    places += [pathlib.Path(p, "nvidia", sub, "lib") for p in sys.path for sub in ("cu13", "cu12", "cuda_cupti")]
    for place in places:
        found = sorted(place.glob("libcupti.so*"))
        if found:
            return found[0]
    raise SystemExit(f"libcupti.so is not below {root} nor beside PyTorch; --ncu does without it")


def build_tracer(folder):
    library = folder / "cupti_trace.so"
    if library.exists():
        return library
    cupti, root = find_cupti(), cuda_root()
    include = [f"-I{root}/include", f"-I{root}/extras/CUPTI/include", f"-I{cupti.parent.parent}/include"]
    done = subprocess.run(
        [
            "cc",
            "-O2",
            "-shared",
            "-fPIC",
            *include,
            official.ROOT / "dev" / "cupti_trace.c",
            "-o",
            library,
            cupti,
            f"-Wl,-rpath,{cupti.parent}",
            "-lpthread",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"dev/cupti_trace.c does not compile: {done.stderr}")
    return library


def trace_environment(step_kernel, skip, folder):
    """In which a program is traced."""
    out = folder / "trace.json"
    out.unlink(missing_ok=True)
    settings = dict(
        CUDA_INJECTION64_PATH=str(build_tracer(folder)), CUPTI_TRACE_OUT=str(out), CUPTI_TRACE_STEP=step_kernel, CUPTI_TRACE_SKIP=str(skip)
    )
    return {**os.environ, **settings}


def trace(command, step_kernel, skip, folder):
    """Runs a program; what dev/cupti_trace.c writes about it."""
    environment, out = trace_environment(step_kernel, skip, folder), folder / "trace.json"
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0 or not out.exists():
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with {done.returncode}, "
            f"{'with' if out.exists() else 'without'} a trace:\n{done.stdout[-2000:]}"
        )
    return read_trace(out, step_kernel, skip)


def read_trace(out, step_kernel, skip):
    result = json.loads(out.read_text())
    if result["steps"] == 0:
        raise SystemExit(
            f"the trace has no step after the first {skip}: no kernel's name contains {step_kernel}, or the program made no more steps"
        )
    return result


def steps_recorded(metrics):
    return metrics.read_bytes().count(b'{"kind": "step"') if metrics.exists() else 0


def wait_until(reached, run, seconds=float("inf")):
    """Whether that came before the end of the run, and in time."""
    end = time.monotonic() + seconds
    while not reached():
        if run.poll() is not None or time.monotonic() > end:
            return reached()
        time.sleep(0.01)
    return True


def trace_then_stop(run, out, count, switch):
    """Waits for `count` steps in the records below `out`, lets the tracer see some more, and stops the run."""
    metrics = out / "metrics.jsonl"
    wanted = wait_until(lambda: steps_recorded(metrics) >= count, run) and '"device": "cuda"' in metrics.read_text()
    if wanted:
        switch.touch()
        if wait_until(lambda: not switch.exists(), run, BEGIN_SECONDS):
            last = steps_recorded(metrics) + LEFT_OUT + LOOKED_AT  # a step that is under way now may be known in part, or not
            wait_until(lambda: steps_recorded(metrics) >= last, run)
    run.send_signal(signal.SIGTERM)  # train_fox ends after its step
    run.wait()
    return wanted


def time_and_trace(command, out, count, folder):
    """Runs a train_fox that would make SPARE_STEPS more than `count` steps: these by themselves, then some under the tracer. Its records;
    the trace, or None; and why there is none where one was to be had. The tracer does not touch CUPTI before the `count` steps are over,
    so their times are those of a run without it."""
    environment, switch = trace_environment("adamw_kernel", LEFT_OUT, folder), folder / "trace_now"
    environment["CUPTI_TRACE_SWITCH"] = str(switch)
    switch.unlink(missing_ok=True)
    with open(folder / "said", "w+") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            wanted = trace_then_stop(run, out, count, switch)
        finally:
            run.kill()  # where it is still there
            run.wait()
        said.seek(0)
        text = said.read()
    records = official.ours_records(command, out, run.returncode, text)
    if not wanted:
        return records, None, None
    if not (folder / "trace.json").exists():
        told = [line for line in text.splitlines() if line.startswith("cupti_trace:")]
        return records, None, told[-1] if told else "CUPTI did not begin to trace"
    try:
        return records, read_trace(folder / "trace.json", "adamw_kernel", LEFT_OUT), None
    except SystemExit as error:
        return records, None, str(error)


def trace_with_ncu(command, step_kernel, skip):
    """The same from Nsight Compute, without idle time."""
    done = subprocess.run(["ncu", *NCU, *map(str, command)], stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise SystemExit(f"ncu ended with {done.returncode} and no table:\n{done.stdout[-2000:]}")
    kernels, steps, marked = {}, 0, False
    for row in csv.DictReader(lines[start:]):
        is_mark = step_kernel in row["Kernel Name"]
        steps += marked and not is_mark
        marked = is_mark
        if steps >= skip and not (steps == skip and is_mark and not kernels):
            kernel = kernels.setdefault(row["Kernel Name"], dict(name=row["Kernel Name"], calls=0, ms=0.0, bytes=0))
            kernel["calls"] += 1
            kernel["ms"] += float(row["Metric Value"].replace(",", "")) / 1e6
    return dict(steps=max(steps + marked - skip, 1), span_ms=None, busy_ms=None, dropped=0, kernels=list(kernels.values()))


# ---- the table


def summarize(traced):
    """ms and calls a step by group, and by kernel."""
    steps, groups = traced["steps"], {}
    for kernel in traced["kernels"]:
        group = groups.setdefault(group_of(kernel["name"]), dict(ms=0.0, calls=0.0))
        group["ms"] += kernel["ms"] / steps
        group["calls"] += kernel["calls"] / steps
    ordered = dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))
    kernels = sorted(traced["kernels"], key=lambda kernel: -kernel["ms"])
    result = dict(
        steps=steps,
        groups=ordered,
        dropped=traced["dropped"],
        kernels=[dict(name=k["name"][:160], group=group_of(k["name"]), ms=k["ms"] / steps, calls=k["calls"] / steps) for k in kernels[:40]],
    )
    if traced["span_ms"] is not None:
        result.update(step_ms=traced["span_ms"] / steps, idle_ms=(traced["span_ms"] - traced["busy_ms"]) / steps)
    return result


def print_profile(title, profile, batch_tokens):
    whole = profile.get("step_ms") or sum(group["ms"] for group in profile["groups"].values())
    speed = f", {1e3 * batch_tokens / whole:,.0f} tokens/s" if batch_tokens and "step_ms" in profile else ""
    print(f"\n{title}: {whole:.2f} ms a step{speed}, {profile['steps']} steps")
    for name, group in profile["groups"].items():
        print(f"  {name:24} {group['ms']:9.3f} ms {100 * group['ms'] / whole:6.1f}%  {group['calls']:7.1f} calls")
    if "idle_ms" in profile:
        print(f"  {'idle':24} {profile['idle_ms']:9.3f} ms {100 * profile['idle_ms'] / whole:6.1f}%")
    unknown = [k for k in profile["kernels"] if k["group"] == "other" and k["ms"] > 0.002 * whole]
    for kernel in unknown[:5]:
        print(f"    other: {kernel['ms']:.3f} ms {kernel['name'][:90]}")
    if profile["dropped"]:
        print(f"  {profile['dropped']} records were lost: the table is incomplete")


# ---- what is profiled


def write_start(model, tokens, folder):
    """FOLDER/checkpoint and FOLDER/random_train.bin: untrained weights with imposed gates, so many random tokens."""
    checkpoint, data = folder / "checkpoint", folder / "random_train.bin"
    official.write_shard(data, np.random.default_rng(0).integers(0, VOCAB_SIZE, tokens), VOCAB_SIZE)
    official.fresh_weights(model, data, folder / "start").rename(checkpoint)
    mapped = official.map_tensors(checkpoint / "model.safetensors")
    tensors = dict(mapped)
    impose_gates(tensors, embedding_scale=EMBEDDING_SCALE)
    for name, tensor in tensors.items():
        if tensor is not mapped[name]:
            mapped[name][...] = tensor
    return checkpoint, data


def profile_ours(args, checkpoint, data, acp, folder):
    sequences = args.micro_batch or args.batch_tokens // args.context
    options = official.timed_options(args.context, sequences, args.batch_tokens, args.warmup + args.steps, acp)
    command = [args.train_fox, "-i", data, "-e", checkpoint, "-o", folder / "run", *options, *args.extra]
    if args.ncu:
        traced = trace_with_ncu(command, "adamw_kernel", args.warmup)
    else:
        traced = trace(command, "adamw_kernel", args.warmup, folder)
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / "run")
    return dict(summarize(traced), pruned=[s["pruned"] for s in steps if s["kind"] == "step"][-1])


def profile_official(args, acp, folder):
    """The official program in dev/bench_official.py, which makes the same start for itself."""
    options = official.options(
        official=args.official,
        model=args.model,
        T=args.context,
        batch_tokens=args.batch_tokens,
        micro_batch=args.micro_batch,
        acp=acp,
        steps=args.steps,
        warmup=args.warmup,
    )
    command = [sys.executable, official.ROOT / "dev" / "bench_official.py", *options]
    return summarize(trace(command, "FusedAdam", args.warmup, folder))


def main():
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fox-pro-125m", help="preset")
    parser.add_argument("--init", type=pathlib.Path, help="checkpoint folder; then --data is needed too")
    parser.add_argument("--data", help="shards")
    parser.add_argument("-T", "--context", type=int, default=16384)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences at a time; 0: the whole step")
    parser.add_argument("--acp", nargs="+", default=["off", "paper"], choices=("off", "paper", "tight"))
    parser.add_argument("--steps", type=int, default=6, help="steps that are looked at")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository, to be profiled too")
    parser.add_argument("--train-fox", default=str(official.ROOT / "train_fox"), metavar="PROGRAM")
    parser.add_argument("--trace", action="store_true", help="profile the program after --")
    parser.add_argument("--step-kernel", default="adamw_kernel", help="with --trace: a step ends with this kernel")
    parser.add_argument("--ncu", action="store_true", help="Nsight Compute instead of CUPTI")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args(arguments[:cut])
    args.extra = arguments[cut + 1 :]  # with --trace the program, without it more options of train_fox
    if bool(args.init) != bool(args.data):
        parser.error("--init and --data belong together")
    result = dict(machine.facts(), model=args.model, context=args.context, batch_tokens=args.batch_tokens, profiles={})
    profiles = result["profiles"]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fox_profile_"))
    try:
        if args.trace:
            profiles["program"] = summarize(trace(args.extra, args.step_kernel, args.warmup, folder))
            print_profile(" ".join(args.extra)[:80], profiles["program"], 0)
        else:
            checkpoint, data = args.init, args.data
            if not checkpoint:
                checkpoint, data = write_start(args.model, 4 * args.batch_tokens + args.context + 1, folder)
            for acp in args.acp:
                profiles[acp] = profile_ours(args, checkpoint, data, acp, folder)
                skipped = f", {100 * (profiles[acp]['pruned'] or 0):.1f}% of the blocks skipped"
                print_profile(f"{args.model}, T = {args.context}, acp {acp}{skipped}", profiles[acp], args.batch_tokens)
                if args.official and acp != "tight":
                    name = f"official-{acp}"
                    profiles[name] = profile_official(args, acp, folder)
                    print_profile(f"official, acp {acp}", profiles[name], args.batch_tokens)
    finally:
        shutil.rmtree(folder)
        if args.out and profiles:
            pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
