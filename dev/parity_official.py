#!/usr/bin/env python3
"""Shows that this program and the official PyTorch FoX compute the same, on one of our checkpoints or on a fixture.

    python3 dev/parity_official.py --official DIR --checkpoint out/step_00001000 --data 'data/*val*.bin' -T 1024
    python3 dev/parity_official.py --official DIR --checkpoint tests/data/fixtures/fox_pro_d64.safetensors
    python3 dev/parity_official.py --official DIR --truth tests/data/fixtures/*.safetensors --out error.json

Parity. The official model loads the folder with `from_pretrained`, as it is. The first windows of the data (of random
tokens without --data) go into shards of one window each, and `train_fox` makes one step on each with a learning rate
so small that no weight changes: metrics.jsonl then holds the loss and the gradient norm of every window, and a
validation at the end gives the mean loss by the path without gradients. The program shuffles windows, so the two
lists are compared in sorted order; windows of text differ by far more than the tolerance. What is compared, and may
differ by:

    ours on the CPU (float32)  with the official model in float32             loss 1e-4, gradient norm 1e-3 relative
    ours on a GPU (bf16)       with the official model in float32 and bf16    loss 5e-3, gradient norm 2e-2 relative

With the official model in bf16 the gradient norm may differ further by that model's own error, bf16 against float32: two
roundings of one number, each near it, may be twice as far from each other.

--acp prunes on both sides (the paper's threshold, log tolerance -10); the official float32 run never prunes, so there
the bound of pruning is tested too. A fixture's weights are first written as a checkpoint; what is compared is then
the checkpoint that `train_fox` writes after it has loaded them. Exit status 1 when anything is out of its range.

Truth, the yardstick for the bf16 back end. A fixture holds weights, tokens, losses and gradients in float32. The
official model under bf16 autocast runs the same case, and how far it is off is written as JSON: per gradient ||g -
ref|| / ||ref||; for the losses of the tokens the same ratio, the largest difference, and the difference of the mean.
`float32` says how well the official float32 run repeats the fixture. One case is one draw of rounding errors, so it
is drawn again a few times with weights that differ by 1e-3 of themselves, each against its own float32 run: `median`
of these, and `largest` of these and the case itself.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import official

TOLERANCE = {"cpu": dict(loss=1e-4, norm=1e-3), "cuda": dict(loss=5e-3, norm=2e-2)}
REDRAWS = 8


# ---- parity


def ours_on_windows(args, checkpoint, windows, vocab_size, scratch):
    """Loss and gradient norm of each window, both sorted; the mean loss of a validation; the fraction of blocks pruned;
    the device; the folder of the checkpoint written at the end."""
    data, out = scratch / "windows", scratch / "run"
    data.mkdir()
    count, T = len(windows), windows.shape[1] - 1
    for i, window in enumerate(windows):
        official.write_shard(data / f"train_{i:04d}.bin", window, vocab_size)
    options = official.options(
        j=data / "train_*.bin",
        T=T,
        b=1,
        d=T,
        x=count,
        l=official.TINY_RATE,
        warmup_tokens=0,
        v=count,
        val_batches=0,
        pruning_every=0,
        acp="paper" if args.acp else "off",
        device=args.device,
    )
    records = official.run_ours(args.train_fox, checkpoint, data, out, *options)
    steps = [r for r in records if r["kind"] == "step"]
    validation = [r["loss"] for r in records if r["kind"] == "validation"][-1]
    pruned = np.mean([r["pruned"] or 0 for r in steps])
    return (
        np.sort([r["loss"] for r in steps]),
        np.sort([r["grad_norm"] for r in steps]),
        validation,
        pruned,
        official.device_of(records),
        official.newest_checkpoint(out),
    )


def official_on_windows(code, model, windows, precision):
    results = [code.forward_backward(model, w[None, :-1], w[None, 1:], precision) for w in windows]
    losses = np.sort([np.mean(loss, dtype=np.float64) for loss, _ in results])
    return losses, np.sort([official.total_norm(gradients) for _, gradients in results])


def same_weights(a, b):
    """The names of the tensors that differ between two checkpoint folders by more than the tiny rate's update."""
    import safetensors.numpy

    a, b = (safetensors.numpy.load_file(str(pathlib.Path(x) / "model.safetensors")) for x in (a, b))
    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not np.allclose(a[n], b[n], 0, 1e-20)]


def parity(args, code, given, scratch):
    """One checkpoint folder or fixture; prints its lines and returns whether all was in range."""
    checkpoint, is_fixture = pathlib.Path(given), given.endswith(".safetensors")
    if is_fixture:
        tensors, config = official.read_fixture(given)
        checkpoint = scratch / "fixture"
        official.write_checkpoint(checkpoint, config, official.fixture_weights(tensors))
    model_vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    if args.data:
        windows, vocab_size = official.first_windows(args.data, args.context, args.sequences)
    else:
        vocab_size = model_vocab
        windows = np.random.default_rng(1).integers(0, vocab_size, (args.sequences, args.context + 1))
    losses, norms, validation, pruned, device, written = ours_on_windows(args, checkpoint, windows, vocab_size, scratch)
    changed = same_weights(checkpoint, written)
    model = code.load(written if is_fixture else checkpoint, args.acp)
    allowed, good = TOLERANCE[device], not changed
    print(
        f"{given}: {len(windows)} windows of {args.context} tokens, ours on {device}"
        + (f", acp paper ({100 * pruned:.1f}% of blocks skipped)" if args.acp else ", acp off")
    )
    print(
        "  from_pretrained: no missing, unexpected or mismatched tensor; our program's copy of the weights "
        + (f"DIFFERS: {', '.join(changed)}" if changed else "is the same")
    )
    for precision in ("float32", "bf16"):
        ref_losses, ref_norms = official_on_windows(code, model, windows, precision)
        loss_error = np.abs(losses - ref_losses).max()
        mean_error = abs(validation - ref_losses.mean())
        norm_errors = np.abs(norms / ref_norms - 1)
        if precision == "float32":
            exact_norms = ref_norms
        own_errors = np.abs(ref_norms / exact_norms - 1)
        required = precision == "float32" or device == "cuda"
        passed = max(loss_error, mean_error) <= allowed["loss"] and bool(np.all(norm_errors <= allowed["norm"] + own_errors))
        good = good and (passed or not required)
        verdict = ("FAIL", "PASS")[bool(passed)] if required else "(for information)"
        print(
            f"  official {precision:8} loss {ref_losses.mean():.6f} (ours {losses.mean():.6f}): off by "
            f"{loss_error:.2e}, in validation {mean_error:.2e}; gradient norm {ref_norms.mean():.6f} "
            f"(ours {norms.mean():.6f}): off by {norm_errors.max():.2e}"
            + (f", the official model itself by {own_errors.max():.2e}" if precision == "bf16" else "")
            + f"  {verdict}"
        )
    return good


# ---- truth


def relative(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def errors(losses, gradients, ref_losses, ref_gradients):
    """How far a run is off; gradients: {name: numpy}."""
    return dict(
        loss=relative(losses, ref_losses),
        loss_largest=float(np.abs(losses - ref_losses).max()),
        loss_mean=float(abs(np.mean(losses, dtype=np.float64) - np.mean(ref_losses, dtype=np.float64))),
        gradients={name: relative(gradients[name], ref_gradients[name]) for name in sorted(ref_gradients)},
    )


def summarize(draws, pick):
    """One number of many: pick() over the draws, entry by entry."""
    scalars = {key: float(pick([d[key] for d in draws])) for key in ("loss", "loss_largest", "loss_mean")}
    names = draws[0]["gradients"]
    return dict(scalars, gradients={name: float(pick([d["gradients"][name] for d in draws])) for name in names})


def truth(code, path, acp, scratch):
    tensors, config = official.read_fixture(path)
    official.write_checkpoint(scratch, config, official.fixture_weights(tensors))
    model = code.load(scratch, acp)
    ref_gradients = {n[len("grad.") :]: t for n, t in tensors.items() if n.startswith("grad.")}

    def run(precision):
        losses, gradients = code.forward_backward(model, tensors["input_ids"], tensors["labels"], precision)
        return losses, {name: g.cpu().numpy() for name, g in gradients.items()}

    exact = errors(*run("float32"), tensors["loss"], ref_gradients)
    result = dict(acp=acp, float32=exact, bf16=errors(*run("bf16"), tensors["loss"], ref_gradients))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = code.torch.Generator("cuda").manual_seed(0)
    draws = []
    for _ in range(REDRAWS):
        with code.torch.no_grad():
            for name, p in model.named_parameters():
                noise = code.torch.randn(p.shape, generator=generator, device="cuda")
                p.copy_(start[name] * (1 + 1e-3 * noise))
        draws.append(errors(*run("bf16"), *run("float32")))
    result.update(redraws=REDRAWS, median=summarize(draws, np.median), largest=summarize(draws + [result["bf16"]], np.max))
    worst = max(result["bf16"]["gradients"], key=result["bf16"]["gradients"].get)
    print(
        f"{path}{', acp' if acp else ''}: official float32 off by {exact['loss_largest']:.1e} in the losses, "
        f"{max(exact['gradients'].values()):.1e} in the gradients; official bf16 "
        f"{result['bf16']['loss_largest']:.1e} and up to {result['bf16']['gradients'][worst]:.2e} ({worst})"
    )
    return result


# ---- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, metavar="DIR", help="clone of the official repository")
    parser.add_argument("--checkpoint", nargs="+", default=[], help="checkpoint folders or fixtures, for parity")
    parser.add_argument("--truth", nargs="+", default=[], metavar="FIXTURE", help="fixtures, for the yardstick")
    parser.add_argument("--data", help="shards: folder, glob or file; not given: random tokens")
    parser.add_argument("-T", "--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--acp", action="store_true", help="prune by the paper's threshold")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where ours computes")
    parser.add_argument("--train-fox", default=str(official.ROOT / "train_fox"), metavar="PROGRAM")
    parser.add_argument("--out", help="JSON file for the yardstick")
    args = parser.parse_args()
    if not args.checkpoint and not args.truth:
        parser.error("--checkpoint or --truth: nothing to do without")
    code = official.Official(args.official)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="fox_parity_"))
    good = True
    try:
        cases = {}
        for i, path in enumerate(args.truth):
            cases[pathlib.Path(path).stem] = truth(code, path, args.acp, scratch / f"truth_{i}")
        if cases:
            text = (
                json.dumps(dict(official="bf16 autocast, relative to the fixture's float32", **code.versions(), cases=cases), indent=1)
                + "\n"
            )
            if args.out:
                pathlib.Path(args.out).write_text(text)
            else:
                print(text, end="")
        for i, given in enumerate(args.checkpoint):
            folder = scratch / f"parity_{i}"
            folder.mkdir()
            good = parity(args, code, given, folder) and good
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch)
    if args.checkpoint:
        print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
