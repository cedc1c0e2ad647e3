#!/usr/bin/env python3
"""Tokens per second of whole training steps of the official PyTorch FoX, and of this program beside it.

    python3 dev/bench_official.py --official DIR --model fox-pro-125m -T 16384 --batch-tokens 32768 --out speed.json
    python3 dev/bench_official.py --official DIR --model fox-pro-760m -T 4096 16384 --acp paper --ours ./train_fox

A step is forward, backward, clipping at 1.0 and AdamW, as the official configurations have them: float32 weights,
bf16 autocast, weight decay 0.1 on matrices and embeddings only. The official trainer's own loop (Lightning Fabric,
logging, a check of the norm that waits for the GPU) is left out and AdamW is PyTorch's fused one, which both can only
help it.

Both programs start from one checkpoint, written here: the official initial weights with the gates of
dev/impose_gates.py (log f = logsigmoid(x), x ~ N(mu_h, 1), mu from -1 to 8.5 over the heads), and see random tokens
of a vocabulary of 50257. The learning rate is 1e-8, so that the gates stay as they are. Each figure is the median
over the steps after warm-up, timed on the GPU; `gates` says what the logits really were: the largest difference of a
head's mean from mu, and the mean deviation.

--start FOLDER takes FOLDER/checkpoint and FOLDER/random_train.bin as they are, instead of writing such; --model only names them.

--acp: off, paper (log tolerance -10), and for --ours also tight. --recompute: official: gradient checkpointing of
every block, ours: -r 2. --keep FOLDER keeps checkpoint and shard, to run more with them by hand. A configuration that
does not fit in memory is reported as such. The result is one JSON object with a list of runs.
"""

import argparse
import gc
import json
import pathlib
import shutil
import statistics
import sys
import tempfile

import numpy as np
import official
from impose_gates import impose_gates

VOCAB_SIZE = 50257
EMBEDDING_SCALE = 1000.0  # keeps the gates' logits spread in every layer: see impose_gates.py
BYTES_PER_GIB = 2**30


def write_start(code, preset, folder, tokens, seed=0):
    """FOLDER/checkpoint and FOLDER/random_train.bin."""
    code.torch.manual_seed(seed)
    keys = dict(official.PRESETS[preset], vocab_size=VOCAB_SIZE)
    with code.torch.device("cuda"):
        model = code.Model(code.config(keys))
    tensors = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    keys["intermediate_size"] = tensors["model.layers.0.mlp.down_proj.weight"].shape[1]
    del model
    impose_gates(tensors, seed=seed, embedding_scale=EMBEDDING_SCALE)
    official.write_checkpoint(folder / "checkpoint", keys, tensors)
    rng = np.random.default_rng(seed)
    official.write_shard(folder / "random_train.bin", rng.integers(0, VOCAB_SIZE, tokens), VOCAB_SIZE)


def measure_gates(code, model, tokens):
    """Largest |mean of a head's logit - mu| and mean deviation, over layers and heads."""
    logits, hooks = [], []
    for module in model.modules():
        if hasattr(module, "fgate_proj"):
            hooks.append(module.fgate_proj.register_forward_hook(lambda m, i, out: logits.append(out.float())))
    with code.torch.no_grad(), code.precision("bf16"):
        model.model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    mu = code.torch.linspace(-1.0, 8.5, logits[0].shape[-1], device="cuda")
    mean_error = max((x.mean((0, 1)) - mu).abs().max().item() for x in logits)
    return dict(mean_error=mean_error, deviation=statistics.fmean(x.std((0, 1)).mean().item() for x in logits))


def bench_official(code, model, folder, T, batch_tokens, micro_batch, acp, recompute, steps, warmup):
    """Seconds of each step (GPU time), peak memory, and the gates."""
    torch = code.torch
    code.prune(model, acp == "paper")
    model.model.gradient_checkpointing = recompute
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.1), dict(params=others, weight_decay=0.0)],
        lr=float(official.TIMING_RATE),
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    tokens, _ = official.open_shard(folder / "random_train.bin")
    stream = torch.as_tensor(np.array(tokens, dtype=np.int64))
    gates = measure_gates(code, model, stream[: T * micro_batch].view(micro_batch, T).cuda())
    rows, count = batch_tokens // T, batch_tokens // (T * micro_batch)
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + warmup + 1)]
    marks[0].record()
    for step in range(steps + warmup):
        start = step * batch_tokens % (len(stream) - batch_tokens)
        x = stream[start : start + batch_tokens].view(rows, T).cuda(non_blocking=True)
        y = stream[start + 1 : start + 1 + batch_tokens].view(rows, T).cuda(non_blocking=True)
        for i in range(0, rows, micro_batch):
            with code.precision("bf16"):
                loss = model(input_ids=x[i : i + micro_batch], labels=y[i : i + micro_batch], use_cache=False).loss.mean()
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks[step + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])][warmup:]
    return times, torch.cuda.max_memory_allocated(), dict(gates=gates, loss=loss.item())


def bench_ours(program, folder, T, batch_tokens, micro_batch, acp, recompute, steps, warmup):
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    options = official.timed_options(T, micro_batch, batch_tokens, steps + warmup, acp)
    records = official.run_ours(program, folder / "checkpoint", folder / "random_train.bin", out, *options, "-r", 2 if recompute else 0)
    shutil.rmtree(out)
    done = [r for r in records if r["kind"] == "step"][warmup:]
    last = done[-1]
    extra = dict(device=official.device_of(records), pruned=last["pruned"], mfu=last["mfu"], loss=last["loss"])
    return [r["step_ms"] / 1e3 for r in done], last["gpu_mem_bytes"], extra


def describe(name, args, T, acp, times, memory, extra):
    middle = statistics.median(times)
    run = dict(
        program=name,
        model=args.model,
        context=T,
        batch_tokens=args.batch_tokens,
        acp=acp,
        recompute=args.recompute,
        tokens_per_s=args.batch_tokens / middle,
        step_ms=1e3 * middle,
        fastest_ms=1e3 * min(times),
        slowest_ms=1e3 * max(times),
        steps=len(times),
        memory_bytes=memory,
        **extra,
    )
    print(
        f"{name:8} {args.model} T={T:<6} acp {acp:5} {run['tokens_per_s']:10,.0f} tokens/s  {run['step_ms']:8.1f} ms "
        f"({run['fastest_ms']:.1f} .. {run['slowest_ms']:.1f})"
        + (f"  {memory / BYTES_PER_GIB:.1f} GiB" if memory else "")
        + (f"  {extra}" if extra else ""),
        flush=True,
    )
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, metavar="DIR", help="clone of the official repository")
    parser.add_argument("--model", default="fox-pro-125m", help=f"one of {', '.join(official.PRESETS)}")
    parser.add_argument("-T", "--context", type=int, nargs="+", default=[16384])
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences at a time; 0: the whole step")
    parser.add_argument("--acp", nargs="+", default=["off", "paper"], choices=("off", "paper", "tight"))
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--ours", metavar="PROGRAM", help="train_fox, to be timed too")
    parser.add_argument("--only-ours", action="store_true", help="leave the official program out")
    parser.add_argument("--keep", metavar="FOLDER", type=pathlib.Path, help="where checkpoint and shard stay")
    parser.add_argument("--start", metavar="FOLDER", type=pathlib.Path, help="what to start from, already written")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    if not args.start and args.model not in official.PRESETS:
        parser.error(f"--model {args.model}: expected one of {', '.join(official.PRESETS)}")
    code = official.Official(args.official, tuned=True)
    scratch = args.start or args.keep or pathlib.Path(tempfile.mkdtemp(prefix="fox_bench_"))
    scratch.mkdir(parents=True, exist_ok=True)
    runs, model = [], None
    try:
        if not args.start:
            write_start(code, args.model, scratch, 4 * args.batch_tokens + max(args.context) + 1)
        for T in args.context:
            micro_batch = args.micro_batch or args.batch_tokens // T
            if args.batch_tokens % (T * micro_batch) != 0:
                raise SystemExit(f"--batch-tokens {args.batch_tokens}: expected a multiple of {T} x {micro_batch}")
            shape = (scratch, T, args.batch_tokens, micro_batch)
            for acp in args.acp:
                if acp != "tight" and not args.only_ours:
                    try:
                        if model is None:  # one for all: its weights stay as they are
                            model = code.load(scratch / "checkpoint")
                        measured = bench_official(code, model, *shape, acp, args.recompute, args.steps, args.warmup)
                        runs.append(describe("official", args, T, acp, *measured))
                    except code.torch.cuda.OutOfMemoryError:
                        runs.append(dict(program="official", model=args.model, context=T, acp=acp, out_of_memory=True))
                        print(f"official {args.model} T={T} acp {acp}: out of memory", flush=True)
                        model = None  # with the gradients that it has
                    gc.collect()
                    code.torch.cuda.empty_cache()
                if args.ours:
                    measured = bench_ours(args.ours, *shape, acp, args.recompute, args.steps, args.warmup)
                    runs.append(describe("ours", args, T, acp, *measured))
    finally:
        if not args.keep and not args.start:
            shutil.rmtree(scratch)
    text = json.dumps(dict(**code.versions(), runs=runs), indent=1) + "\n"
    if args.out:
        pathlib.Path(args.out).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
