#!/usr/bin/env python3
"""Loss and speed over the tokens of training.

    python3 scripts/figure_loss.py out -o loss.png
    python3 scripts/figure_loss.py paper=runs/1 off=runs/2 --mean 20 -o loss.png

Above: training loss, means of --mean steps (by default a hundredth of the run), and validations as points. Below: tokens/s, of
the median of as many steps. Several runs are laid over one another; NAME=RUN names one.
"""

import figures
import numpy as np


def draw(runs, mean=0):
    """runs: 'RUN' or 'NAME=RUN' each."""
    pyplot = figures.pyplot()
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 2))
    highest = 0
    for text in runs:
        name, run = figures.named(text)
        steps = [s for s in figures.of_kind(run, "step") if s["loss"] is not None]
        if not steps:
            raise SystemExit(f"{run}: no step with a finite loss")
        count = mean or max(1, len(steps) // 100)
        tokens = figures.means([s["tokens"] for s in steps], count) / 1e6
        losses = figures.means([s["loss"] for s in steps], count)
        speeds = [np.median([s["tokens_per_s"] for s in steps[i * count : (i + 1) * count]]) for i in range(len(tokens))]
        (line,) = top.plot(tokens, losses, linewidth=1.2, label=name)
        checks = [r for r in figures.records(run) if r["kind"] == "validation" and r["loss"] is not None]
        if checks:
            top.plot(
                [r["tokens"] / 1e6 for r in checks],
                [r["loss"] for r in checks],
                "o",
                markersize=4,
                color=line.get_color(),
                label=f"{name}, validation",
            )
        bottom.plot(tokens, speeds, linewidth=1.2, color=line.get_color())
        highest = max(highest, losses[min(len(losses) // 20, len(losses) - 1)])
    top.set_ylim(top=highest)  # the first steps fall from ln V and would flatten the rest
    top.set_ylabel("loss")
    top.legend()
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("tokens/s")
    bottom.set_xlabel("training tokens, millions")
    return figure


def main():
    parser = figures.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--mean", type=int, default=0, help="steps in a point; 0: a hundredth of the run")
    args = parser.parse_args()
    figures.save(draw(args.runs, args.mean), args.out)


if __name__ == "__main__":
    main()
