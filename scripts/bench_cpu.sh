#!/bin/sh
# `make bench`: training speed of the CPU program in tokens/s, fox-pro-tiny on bytes: median over the steps after the
# first two, as metrics.jsonl has them. STEPS=12 by default; everything is below build/bench/.
set -e
cd "$(dirname "$0")/.."
steps=${STEPS:-12}
rm -rf build/bench
./make_shards -o build/bench/data --extensions .h,.c,.cu,.md --max-bytes 4000000 /usr/include ./*.h train cpu > /dev/null

echo "$(nproc) cores, OMP_NUM_THREADS=${OMP_NUM_THREADS:-not set}; $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
printf '%8s %8s %8s %12s %10s\n' context batch pruning tokens/s pruned
bench() { # context sequences pruning
    ./train_fox -i build/bench/data -o build/bench/run -e fox-pro-tiny -T "$1" -b "$2" -d $(($1 * $2)) --acp "$3" \
        -x "$steps" -v 0 -n 0 > /dev/null
    speed=$(sed -n 's/.*"tokens_per_s": \([0-9.]*\).*/\1/p' build/bench/run/metrics.jsonl | tail -n +3 | sort -n |
        awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')
    pruned=$(sed -n 's/.*"pruned": \([0-9.]*\), "gpu.*/\1/p' build/bench/run/metrics.jsonl | tail -n 1)
    printf '%8s %8s %8s %12.0f %9.1f%%\n' "$1" "$2" "$3" "$speed" "$(echo "$pruned" | awk '{ print 100 * $1 }')"
    rm -rf build/bench/run
}
bench 512 16 off
bench 512 16 paper
bench 512 16 tight
bench 4096 2 off
bench 4096 2 paper
bench 4096 2 tight
