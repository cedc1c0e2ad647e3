#!/usr/bin/env python3
"""Loss by position in the window: how much a model gains from a longer past.

    python3 scripts/figure_positions.py fox=runs/1 transformer=runs/2 -o positions.png
    ./train_fox -i data/ -T 65536 -e runs/1/step_00005000 -o runs/1 --eval
    python3 scripts/figure_positions.py runs/1/eval.jsonl --trained 16384 -o positions.png

Of each run its last validation (--step: of that step). A curve that still falls uses what lies that far back. Vertical lines are
the horizons T, T/2, T/4, ... of the longest window, and with --trained the context of training: beyond it a model extrapolates.
"""

import figures
import numpy as np

HORIZONS = 5


def draw(runs, step=None, trained=0):
    pyplot = figures.pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4))
    longest = 0
    for text in runs:
        name, run = figures.named(text)
        record = figures.at_step(figures.of_kind(run, "validation"), step)
        if "position_loss" not in record:
            raise SystemExit(f"{run}: its validations hold no losses by position")
        edges = np.array(record["position_edges"])
        middle = np.sqrt(np.maximum(edges[:-1], 0.5) * edges[1:])
        losses = [np.nan if loss is None else loss for loss in record["position_loss"]]
        axis.plot(middle, losses, marker=".", markersize=4, linewidth=1.2, label=f"{name}: {record['loss']:.3f} in all")
        longest = max(longest, int(edges[-1]))
    for i in range(HORIZONS):
        axis.axvline(longest / 2**i, color="gray", linestyle=":", linewidth=1)
        axis.annotate(
            "T" if i == 0 else f"T/{2**i}",
            (longest / 2**i, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-2, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color="gray",
        )
    if trained:
        axis.axvline(trained, color="black", linestyle="--", linewidth=1, label=f"trained with T = {trained:,}")
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.5, longest * 1.1)
    axis.set_xlabel(f"position in the window, of T = {longest:,}")
    axis.set_ylabel("validation loss")
    axis.legend()
    return figure


def main():
    parser = figures.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--step", type=int, help="the validation of this step; otherwise the last one")
    parser.add_argument("--trained", type=int, default=0, metavar="T", help="context of training, where it was another one")
    args = parser.parse_args()
    figures.save(draw(args.runs, args.step, args.trained), args.out)


if __name__ == "__main__":
    main()
