#!/usr/bin/env python3
"""Gives a checkpoint the forget gates that every speed comparison is made with.

    python3 dev/impose_gates.py CHECKPOINT OUT [--low -1 --high 8.5] [--seed 0] [--embedding-scale 1000]

Copies config.json and model.safetensors of the folder CHECKPOINT to the folder OUT, with new `fgate_proj` tensors:
the logit x of head h becomes about N(mu_h, 1) over the tokens, mu = linspace(low, high, H), and log f =
logsigmoid(x). Heads thus forget within a few tokens (h = 0) up to thousands of them (h = H - 1), as trained models'
heads do, and pruning has about as much to skip. An untrained model would have f = 1/2 everywhere, which prunes nearly
all of attention.

    bias[h] = mu_h;  weight[h] ~ N(0, 1 / sum_i n_i^2), n the weight of attn_norm

The normed input is n_i times a vector of mean square 1, so the deviation is 1 where its directions are evenly used. In
an untrained model they are not: slow heads average many values, their output norm makes the average as large as any
other output, and from the second layer on the tokens of a sequence share a direction that moves the means by up to 2.
--embedding-scale multiplies the embeddings; with 1000 each token's own part stays the largest in every layer, and the
logits are N(mu_h, 1) throughout. Use it for untrained checkpoints, which are for timing only.
"""

import argparse
import json
import pathlib

import numpy as np
from official import write_checkpoint


def impose_gates(tensors, low=-1.0, high=8.5, seed=0, embedding_scale=1.0):
    """Replaces the gates' tensors in a dictionary {name: float32 array}; returns the number of layers."""
    rng = np.random.default_rng(seed)
    names = sorted(name for name in tensors if name.endswith("attn.fgate_proj.weight"))
    for name in names:
        layer = name[: -len("attn.fgate_proj.weight")]
        norm = np.asarray(tensors[layer + "attn_norm.weight"], dtype=np.float64)
        heads, width = tensors[name].shape
        weight = rng.standard_normal((heads, width)) / np.sqrt(np.square(norm).sum())
        tensors[name] = weight.astype(np.float32)
        tensors[layer + "attn.fgate_proj.bias"] = np.linspace(low, high, heads).astype(np.float32)
    embeddings = "model.embeddings.weight"
    tensors[embeddings] = tensors[embeddings] * np.float32(embedding_scale)
    return len(names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--low", type=float, default=-1.0)
    parser.add_argument("--high", type=float, default=8.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedding-scale", type=float, default=1.0)
    args = parser.parse_args()
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(str(args.checkpoint / "model.safetensors"))
    layers = impose_gates(tensors, args.low, args.high, args.seed, args.embedding_scale)
    if layers == 0:
        raise SystemExit(f"{args.checkpoint}: no layer has a forget gate")
    write_checkpoint(args.out, json.loads((args.checkpoint / "config.json").read_text()), tensors)
    print(f"{args.out}: gates of {layers} layers, logits N(mu, 1), mu from {args.low:g} to {args.high:g}")


if __name__ == "__main__":
    main()
