#!/usr/bin/env python3
"""Heat map of what attention keeps: a cell for each head, a row for each layer.

    python3 scripts/figure_heads.py out -o heads.png                  # the last report of pruning of a run
    python3 scripts/figure_heads.py out/eval.jsonl -o heads.png       # of a checkpoint: train_fox --eval wrote it
    python3 scripts/figure_heads.py tests/data/gates/trained_gates_125m.safetensors -o heads.png

The last of these is a gates file: cumulative gates of a trained model, to which the paper's test is applied with a bound of the
logits (--bound) that the file does not hold.
"""

import figures


def draw(source, bound=8.0, step=None):
    pyplot = figures.pyplot()
    skipped, what = figures.head_fractions(source, bound, step)
    kept = 100 * (1 - skipped)
    figure, axis = pyplot.subplots(figsize=(max(4.5, 1.6 + 0.42 * kept.shape[1]), max(2.5, 1.3 + 0.32 * kept.shape[0])))
    image = axis.imshow(kept, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for layer in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            axis.text(
                head,
                layer,
                f"{kept[layer, head]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if kept[layer, head] > 60 else "white",
            )
    axis.grid(False)
    axis.set_xticks(range(kept.shape[1]))
    axis.set_yticks(range(kept.shape[0]))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(f"blocks kept, %; {what}", fontsize=8)
    figure.colorbar(image, label="blocks kept, %")
    return figure


if __name__ == "__main__":
    figures.main_of_heads(__doc__, draw)
