#!/bin/sh
# `make demo`: trains a small FoX (Pro) on text that is on every machine that can compile it: the C headers below
# /usr/include, and this project's own sources. Bytes are the vocabulary, so nothing has to be downloaded.
#
#   model    fox-pro-tiny: 1.2M parameters, 4 layers, 2 heads of 64
#   tokens   0.65M (280 + 40 steps of 2,048), about 5e12 floating-point operations
#   time     about 2 minutes on two idle cores. A slower machine is stopped (SIGTERM: the step is finished and saved) and
#            goes on from where it stands for a seventh of the steps that it had, so that building and training stay below 4
#
# Everything is below demo/: data/ the shards, run/ the checkpoints and metrics.jsonl.
set -e
cd "$(dirname "$0")/.."
started=$(date +%s)
rm -rf demo

echo '== 1. Text to tokens'
./make_shards -o demo/data --extensions .h,.c,.cu,.md --max-bytes 20000000 /usr/include ./*.h train cpu scripts docs

# train SECONDS OPTIONS. Threads that wait passively lose little on an idle machine and much less on a busy one.
train() {
    seconds=$1
    shift
    OMP_WAIT_POLICY=passive timeout --preserve-status -s TERM "$seconds" ./train_fox -i demo/data -o demo/run \
        -e fox-pro-tiny -T 512 -b 4 -d 2048 -n 100 -v 70 --val-batches 8 --keep 1 --pruning-every 70 \
        -s 140 --sample-tokens 300 --sample-prompt '/* ' --seed 1 "$@"
}
echo
echo '== 2. Train 280 steps. A loss of 5.55 is guessing among 257 bytes'
train 130 -x 280

done_steps=$(ls demo/run | sed -n 's/^step_0*//p')
more=$(((done_steps + 6) / 7))
echo
echo "== 3. Go on from the checkpoint of step $done_steps for $more steps"
train 60 -x $((done_steps + more)) -y

echo
echo "== Done in $(($(date +%s) - started)) s. demo/run/metrics.jsonl has every step; the official PyTorch model loads"
echo "   $(echo demo/run/step_*)."
