#!/bin/sh
# `make bench`: training speed of the CPU program in tokens/s, fox-pro-tiny on bytes: median over the steps after the
# first two, as metrics.jsonl has them. STEPS=12 by default, at least 3; everything is below build/bench/. Fails when
# metrics.jsonl lacks a value.
set -e
cd "$(dirname "$0")/.."
steps=${STEPS:-12}
fail() {
    echo "bench_cpu.sh: error: $*" >&2
    exit 1
}
[ "$steps" -ge 3 ] || fail "STEPS=$steps: expected at least 3, the first two are not timed"
rm -rf build/bench
./make_shards -o build/bench/data --extensions .h,.c,.cu,.md --max-bytes 4000000 /usr/include ./*.h train cpu > /dev/null

echo "$(nproc) cores, OMP_NUM_THREADS=${OMP_NUM_THREADS:-not set}; $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
printf '%8s %8s %8s %12s %10s\n' context batch pruning tokens/s pruned
values() { # KEY: its number in the record of every step after the first two
    sed -n '/"kind": "step"/s/.*"'"$1"'": \([0-9][-+.e0-9]*\).*/\1/p' build/bench/run/metrics.jsonl | tail -n +3
}
bench() { # context sequences pruning
    ./train_fox -i build/bench/data -o build/bench/run -e fox-pro-tiny -T "$1" -b "$2" -d $(($1 * $2)) --acp "$3" \
        -x "$steps" -v 0 -n 0 --device cpu > /dev/null
    for key in tokens_per_s pruned; do
        [ "$(values $key | wc -l)" -eq $((steps - 2)) ] || fail "build/bench/run/metrics.jsonl: not $steps steps with $key"
    done
    speed=$(values tokens_per_s | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')
    pruned=$(values pruned | awk 'END { print 100 * $1 }')
    printf '%8s %8s %8s %12.0f %9.1f%%\n' "$1" "$2" "$3" "$speed" "$pruned"
    rm -rf build/bench/run
}
bench 512 16 off
bench 512 16 paper
bench 512 16 tight
bench 4096 2 off
bench 4096 2 paper
bench 4096 2 tight
