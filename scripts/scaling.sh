#!/usr/bin/env bash
# How training speed grows with the number of GPUs of this machine. From the repository root, after make:
#
#   scripts/scaling.sh                 GPUS="1 2 4", as far as there are GPUs
#   GPUS="1 2" scripts/scaling.sh      a machine of two
#
#   models   FoX (Pro) 125M and 760M, T = 16,384, new weights
#   weak     131,072 tokens a step for each GPU, -z 1 and -z 0
#   strong   524,288 tokens a step over all GPUs, -z 1 (STRONG=0: not run)
#   time     5 minutes on four H100
#
# A run is $STEPS steps (12 of 125M, 7 of 760M, 5 in the strong series); what counts is the median after the first two. Text of
# this machine becomes tokens below build/scaling/data. Prints a table and writes $OUT (docs/results/scaling_Ngpu.json).
#   exchange   the exchange stream's own time in a step: gradients of this step, parameters of the one before
#   exposed    of it, what the computing stream waited for; bus GB/s: bytes that every GPU sent over the exchange's time
# LAUNCH: what starts N ranks (scripts/launch.sh; "mpirun --bind-to none -np"). B_125, B_760: sequences in a micro-batch (2). EXTRA: more options.
# VOCAB, DATA_BYTES: the vocabulary file and how much text is made into shards. COMMIT: what the result says where there is no git.
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/scaling_lib.sh
fail() {
    echo "scaling.sh: error: $*" >&2
    exit 1
}
[ $# -eq 0 ] || fail 'takes no arguments, but variables: GPUS, STEPS, STRONG, OUT, ...; the first lines of this file tell which'
command -v nvidia-smi >/dev/null || fail 'no NVIDIA GPU here (nvidia-smi is not found)'
[ -x train_fox ] && [ -x make_shards ] || fail 'train_fox or make_shards is missing: run make first'
found=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
gpus=
for n in ${GPUS:-1 2 4}; do
    [ "$n" -gt "$found" ] || gpus="$gpus $n"
done
gpus=${gpus# }
[ -n "$gpus" ] || fail "none of GPUS=\"${GPUS:-1 2 4}\" fits the $found GPUs of this machine"
out=${OUT:-docs/results/scaling_${gpus##* }gpu.json}
make_data build/scaling/data

rows=
# measure SERIES MODEL GPUS ZERO TOKENS STEPS
measure() {
    local series=$1 model=$2 n=$3 zero=$4 tokens=$5 steps=$6 batch run=build/scaling/run row start=$SECONDS
    [ "$model" = fox-pro-125m ] && batch=${B_125:-2} || batch=${B_760:-2}
    rm -rf "$run"
    if ! launch "$n" ./train_fox -i build/scaling/data -o "$run" -e "$model" -T 16384 -b "$batch" -d "$tokens" -x "$steps" -v 0 -n -1 \
        -z "$zero" --warmup-tokens 0 ${EXTRA:-} >"$run.log" 2>&1; then
        echo "$series $model on $n GPUs, -z $zero: failed; the end of $run.log:"
        tail -n 5 "$run.log"
        return
    fi
    row=$(step_medians "$run/metrics.jsonl" 2)
    # shellcheck disable=SC2086
    set -- $row
    base=$(echo "$rows" | awk -F'|' -v s="$series" -v m="$model" '$1 == s && $2 == m && $3 == 1 { print $7; exit }')
    [ "$n" != 1 ] || base=$2
    efficiency=$(awk -v v="$2" -v b="${base:-0}" -v n="$n" 'BEGIN { if (b > 0) printf "%.4f", v / b / n; else print "null" }')
    rows="$rows$series|$model|$n|$zero|$tokens|$1|$2|$efficiency|$3|$4|$5|$6|$7|$8
"
    printf '%-7s %-13s %4s %3s %8s %9.1f %9.0f %6s %9.1f %8.1f %8.2f %8.1f %8.1f  %4d s\n' "$series" "$model" "$n" "$zero" "$tokens" "$1" "$2" \
        "$(awk -v e="$efficiency" 'BEGIN { if (e == "null") print "-"; else printf "%.1f%%", 100 * e }')" "$3" "$4" "$5" "$6" "$7" \
        $((SECONDS - start))
}

printf '%-7s %-13s %4s %3s %8s %9s %9s %6s %9s %8s %8s %8s %8s\n' series model GPUs -z tokens ms tokens/s ratio exchange exposed GB \
    'bus GB/s' 'mem GiB'
for model in fox-pro-125m fox-pro-760m; do
    [ $model = fox-pro-125m ] && steps=${STEPS:-12} || steps=${STEPS:-7}
    for n in $gpus; do
        for zero in 1 0; do
            [ "$n" = 1 ] && [ $zero = 0 ] || measure weak $model "$n" $zero $((131072 * n)) "$steps"
        done
    done
done
if [ "${STRONG:-1}" != 0 ]; then
    for model in fox-pro-125m fox-pro-760m; do
        for n in $gpus; do
            measure strong $model "$n" 1 524288 "${STEPS:-5}"
        done
    done
fi

[ -n "$rows" ] || fail 'no run ended well; nothing is written'
chip=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
mkdir -p "$(dirname "$out")"
{
    printf '{\n  "command": "GPUS=\\"%s\\" scripts/scaling.sh",\n  "chip": "%s",\n  "date": "%s",\n  "commit": "%s",\n  "runs": [\n' "$gpus" "$chip" \
        "$(date -u +%Y-%m-%d)" "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
    echo -n "$rows" | awk -F'|' '{ printf "%s    {\"series\": \"%s\", \"model\": \"%s\", \"gpus\": %s, \"zero\": %s, \"step_tokens\": %s, \"step_ms\": %s, " \
        "\"tokens_per_s\": %s, \"ratio_to_one_gpu\": %s, \"exchange_ms\": %s, \"exposed_ms\": %s, \"sent_gb\": %s, \"bus_gb_per_s\": %s, " \
        "\"memory_gib\": %s, \"pruned\": %s}", (NR > 1 ? ",\n" : ""), $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14 } END { print "" }'
    printf '  ]\n}\n'
} >"$out"
echo "written: $out"
