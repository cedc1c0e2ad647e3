#!/usr/bin/env python3
"""Trains the official PyTorch FoX as train_fox would: the same initial weights, windows, learning rates, optimizer.

    python3 dev/train_official.py --official DIR --init out/step_00000001 --acp paper --out official.jsonl -- \\
        -i data -e fox-pro-125m -T 16384 -b 4 -d 65536 -x 640 -l 1e-3 --warmup-tokens 2097152 -v 80 --val-batches 8

What follows `--` are train_fox's own options, read by dev/plan.c with train_fox's code: the windows of every step, its
learning rate, the windows of a validation and the tensors that decay come from there, not from a second description
of them. The rest of the recipe is AdamW (0.9, 0.95), eps 1e-8, gradients clipped at norm 1, float32 weights, bf16
autocast and the official Triton kernels; PyTorch's fused AdamW; a micro-batch of -b sequences at a time. Losses and
norms are read every few steps only, so that the GPU never waits for them.

--out gets the records of a metrics.jsonl: `run`, `step` (step, tokens, loss, lr, grad_norm, step_ms, tokens_per_s) and
`validation`. step_ms is GPU time and leaves validations out. --seconds ends the run early, with what there is.
--dry prints the plan and makes no model.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import official

FLUSH_STEPS = 20  # steps between two looks at the GPU's numbers


class Plan:
    """What train_fox would do with these options."""

    def __init__(self, options):
        with tempfile.TemporaryDirectory(prefix="fox_plan_") as folder:
            program = pathlib.Path(folder, "plan")
            sources = ("dev/plan.c", "train/options.c", "train/config.c", "train/files.c", "train/json.c")
            subprocess.run(
                ["cc", "-O2", "-std=gnu11", "-w", "-pthread", "-o", program, *(official.ROOT / s for s in sources), "-lm"], check=True
            )
            done = subprocess.run([program, *options], stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise SystemExit(done.returncode)
        plan = json.loads(done.stdout)
        self.settings, self.vocab_size, self.decay = plan["settings"], plan["vocab_size"], set(plan["decay"])
        self.steps, self._validation, self.windows = plan["steps"], plan["validation"], plan["windows"]
        self._train = [official.open_shard(path)[0] for path in plan["shards"]]
        self._val = [official.open_shard(path)[0] for path in plan["val_shards"]]
        self.context, self.micro_batch = self.settings["context"], self.settings["micro_batch"]

    def _read(self, shards, windows):
        """[windows, T + 1] tokens."""
        return np.stack([shards[s][first : first + self.context + 1] for s, first in windows]).astype(np.int64)

    def windows_of_step(self, step):
        """Tokens of step 0, 1, ...: [sequences, T + 1]."""
        return self._read(self._train, self.steps[step]["windows"])

    def validation(self):
        """The same for every validation, a micro-batch at a time."""
        for i in range(0, len(self._validation), self.micro_batch):
            yield self._read(self._val, self._validation[i : i + self.micro_batch])

    def parameter_groups(self, named):
        """AdamW's groups of (name, tensor) pairs."""
        named = dict(named)
        decayed = [p for name, p in named.items() if name in self.decay]
        if len(decayed) != len(self.decay):
            raise SystemExit(f"the model lacks {sorted(self.decay - named.keys())}; is -e what --init was made with?")
        others = [p for name, p in named.items() if name not in self.decay]
        return [dict(params=decayed, weight_decay=self.settings["weight_decay"]), dict(params=others, weight_decay=0.0)]


class Training:
    """The official model on its way through a plan. Records go to `out`, an open file."""

    def __init__(self, code, plan, init, acp, out):
        torch = code.torch
        self.code, self.torch, self.plan, self.out = code, torch, plan, out
        self.model = code.load(init, acp)
        self.optimizer = torch.optim.AdamW(
            plan.parameter_groups(self.model.named_parameters()), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        self.waiting = []  # of each step since the last flush: (number, rate, loss, norm, start and end events)
        settings = dict(code.versions(), options=plan.settings, device="cuda", acp="paper" if acp else "off")
        self.record(kind="run", step=0, settings=settings)

    def record(self, **fields):
        self.out.write(json.dumps(fields) + "\n")
        self.out.flush()

    def micro_batches(self, windows):
        tokens = self.torch.from_numpy(windows).pin_memory().cuda(non_blocking=True)
        for i in range(0, len(windows), self.plan.micro_batch):
            part = tokens[i : i + self.plan.micro_batch]
            yield part[:, :-1].contiguous(), part[:, 1:].contiguous()

    def loss(self, x, y):
        with self.code.precision("bf16"):
            return self.model(input_ids=x, labels=y, use_cache=False).loss.mean()

    def step(self, number):
        torch, rate = self.torch, self.plan.steps[number]["lr"]
        windows = self.plan.windows_of_step(number)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device="cuda")
        count = len(windows) / self.plan.micro_batch
        for x, y in self.micro_batches(windows):
            loss = self.loss(x, y) / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.settings["grad_clip"], foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end.record()
        self.waiting.append((number + 1, rate, total, norm, start, end))

    def flush(self):
        """Writes the records of the steps that wait, and returns the last loss."""
        self.torch.cuda.synchronize()
        batch_tokens = self.plan.settings["batch_tokens"]
        for number, rate, loss, norm, start, end in self.waiting:
            ms = start.elapsed_time(end)
            self.record(
                kind="step",
                step=number,
                tokens=number * batch_tokens,
                loss=loss.item(),
                lr=rate,
                grad_norm=norm.item(),
                step_ms=ms,
                tokens_per_s=1e3 * batch_tokens / ms,
            )
        last = self.waiting[-1][2].item() if self.waiting else None
        self.waiting.clear()
        return last

    def validate(self, step):
        total, sequences = 0.0, 0
        with self.torch.no_grad():
            for windows in self.plan.validation():
                for x, y in self.micro_batches(windows):
                    total += self.loss(x, y).item() * len(x)
                    sequences += len(x)
        loss = total / sequences
        self.record(kind="validation", step=step, tokens=step * self.plan.settings["batch_tokens"], loss=loss)
        return loss

    def run(self, seconds):
        """All steps, or as many as fit into `seconds`."""
        steps, every, started = len(self.plan.steps), self.plan.settings["val_every"], time.monotonic()
        for number in range(steps):
            self.step(number)
            done = number + 1
            if done % FLUSH_STEPS == 0 or done == steps:
                loss = self.flush()
                if done % (5 * FLUSH_STEPS) == 0 or done == steps:
                    took = time.monotonic() - started
                    print(f"official step {done}/{steps} loss {loss:.4f} {took:.0f} s", flush=True)
            late = time.monotonic() - started > seconds
            if every and (done % every == 0 or done == steps or late):
                self.flush()
                loss = self.validate(done)
                print(f"official step {done}: validation loss {loss:.4f}", flush=True)
            if late and done < steps:
                print(f"official: {seconds:.0f} s are over, it ends at step {done} of {steps}", flush=True)
                break
        self.flush()


def main():
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--init", help="checkpoint folder with the initial weights")
    parser.add_argument("--acp", default="paper", choices=("off", "paper"))
    parser.add_argument("--out", help="jsonl file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after the step in which they are over")
    parser.add_argument("--dry", action="store_true", help="print the plan only")
    args = parser.parse_args(arguments[:cut])
    plan = Plan(arguments[cut + 1 :])
    if args.dry:
        print(json.dumps(plan.settings))
        print(
            f"{len(plan.steps)} steps, {len(plan.decay)} tensors that decay, vocabulary {plan.vocab_size}; "
            f"first step: {plan.windows_of_step(0)[:, :6].tolist()} ..."
        )
        return 0
    if not (args.official and args.init and args.out):
        parser.error("--official, --init and --out are needed")
    code = official.Official(args.official, tuned=True)
    with open(args.out, "w") as out:
        Training(code, plan, args.init, args.acp == "paper", out).run(args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
