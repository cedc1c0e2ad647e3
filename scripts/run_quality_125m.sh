#!/usr/bin/env bash
# Does pruning cost quality? FoX (Pro) 125M at T = 16384 without pruning, with both kinds, and a Transformer (Pro) beside them, on
# the same tokens in the same order from the same initial weights (the Transformer has its own); one setting with two seeds, whose
# difference is the noise.
#
#   scripts/run_quality_125m.sh data/fineweb              all runs, then the table and the picture
#   RUNS="off paper" scripts/run_quality_125m.sh data     these; what is done already is not done again, and must be of this recipe
#   GPUS="0 1" scripts/run_quality_125m.sh data           on these GPUs (all), a run on each, side by side
#
#   model    fox-pro-125m, transformer-pro-125m
#   tokens   $TOKENS (100.1e6) a run: 763 steps of 131,072; about 1e17 floating-point operations each
#   recipe   AdamW, peak rate 3e-4, 128 steps of warm-up, cosine to 0. Where the rate is much larger, or at its peak while the loss
#            leaves its first plateau (32 steps), runs that differ in rounding alone drift apart, at worst as much as seeds do
#   time     tokens / (tokens/s of the machine): an H100 trained at 525,933 tokens/s with `paper`, at 234,394 without pruning
#            (docs/results/training.md), which is 3.2 and 7.1 minutes a run
#
# Needs an NVIDIA GPU, or --device cpu, and a folder of shards of GPT-2's tokens with *train*.bin and *val*.bin, enough for one pass
# (scripts/data_*.sh, .py). Results: $OUT.json, $OUT.txt, $OUT.png (build/quality_125m; $OUT.RUN.json: those that are done). $KEEP
# (build/quality_125m): every run's folder with metrics.jsonl and its last checkpoint, for scripts/figure_*.py and
# `scripts/throughput_table.sh --checkpoint`. Further options go to dev/compare_training.py. When a run fails no other starts, those
# beside it go on to their end, and $OUT.RUN.log holds what it said.
set -u -o pipefail
fail() {
    echo "run_quality_125m.sh: error: $*" >&2
    exit 1
}
[ $# -gt 0 ] || fail 'no data; usage: scripts/run_quality_125m.sh FOLDER_OF_SHARDS [options of dev/compare_training.py]'
# shellcheck source=scripts/scaling_lib.sh
. "$(dirname "$0")/scaling_lib.sh"
data=$(absolute "$1")
shift
OUT=$(absolute "${OUT:-}")
KEEP=$(absolute "${KEEP:-}")
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/quality_125m}
[ -z "${OUT:-}" ] || [ ! -d "$OUT" ] || out=$OUT/quality_125m
mkdir -p "$(dirname "$out")"
keep=${KEEP:-build/quality_125m}
python=${PYTHON:-python3}
[ -d "$data" ] || fail "$data: no folder there; scripts/data_fineweb.sh makes one"
command -v "$python" >/dev/null || fail "$python is missing; PYTHON names another one"
"$python" -c 'import numpy' 2>/dev/null || fail "Python packages are missing: $python -m pip install -r scripts/requirements.txt"
[ -x train_fox ] || fail 'train_fox is missing: run make first'
gpus=${GPUS:-${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ')}}
gpus=$(echo "${gpus:-0}" | tr ',' ' ')

# compare JSON [options or runs]: dev/compare_training.py with what all runs share
compare() {
    local json=$1
    shift
    "$python" dev/compare_training.py --out "$json" --keep "$keep" --data "$data" --model fox-pro-125m -T 16384 --batch-tokens 131072 \
        --micro-batch 2 --tokens "${TOKENS:-100.1e6}" --lr 3e-4 --warmup-steps 128 --val-every 80 "$@"
}
# train PLACE RUN [options]: into $out.RUN.json, on the GPU of this place among $gpus. The first run that fails removes the file
# $going and says so; without it none starts.
train() {
    local gpu run=$2
    [ -e "$going" ] || exit 1
    gpu=$(echo "$gpus" | cut -d' ' -f$(($1 + 1)))
    shift 2
    if ! CUDA_VISIBLE_DEVICES=$gpu compare "$out.$run.json" "$run" "$@" >"$out.$run.log" 2>&1; then
        rm -f "$out.$run.json"
        ! rm "$going" 2>/dev/null || fail "run $run failed: $(grep . "$out.$run.log" | tail -n 1); its log: $out.$run.log"
        exit 1
    fi
    grep "^$run: " "$out.$run.log"
    rm -f "$out.$run.log"
}
export -f fail compare train
export data out keep python gpus

parts_done() { # into parts: the files of the runs that are done, of this call or an earlier one
    local kind part
    parts=()
    for kind in official official-off off paper tight transformer; do
        for part in "$out.$kind.json" "$out.$kind"@*.json; do
            [ ! -e "$part" ] || parts+=("$part")
        done
    done
}
parts_done
if [ ${#parts[@]} -gt 0 ]; then
    said=$(compare "$out.json" --check "${parts[@]}" "$@" 2>&1) || fail "$(echo "$said" | tail -n 1)"
fi

todo=
for run in ${RUNS:-off transformer paper tight paper@2}; do # the long ones first
    if [ -e "$out.$run.json" ]; then
        echo "$run: done already"
    else
        todo="$todo $run"
    fi
done
case " $* " in
*' --device cpu '* | *' --device=cpu '*) ;;
*)
    [ -z "$todo" ] || command -v nvidia-smi >/dev/null ||
        fail 'no NVIDIA GPU here (nvidia-smi is not found); --device cpu is for models that are much smaller'
    ;;
esac
going=$(mktemp) || fail 'no temporary file could be made'
trap 'rm -f "$going"' EXIT
export going
# shellcheck disable=SC2016,SC2086
printf '%s\n' $todo | xargs -r -P "$(echo "$gpus" | wc -w)" -I{} --process-slot-var=place bash -u -c 'train "$place" "$@"' train {} "$@" || exit 1
parts_done
compare "$out.json" --merge "${parts[@]}" "$@" | tee "$out.txt" || fail 'the table could not be made'
"$python" dev/plot_training.py "$out.json" "$out.png" || fail "the picture could not be drawn; $out.json holds all of it"
echo "$out.json $out.txt $out.png; runs: $keep"
