#!/usr/bin/env bash
# What must hold for training on several GPUs of one machine, part by part. From the repository root, after make:
#
#   dev/check_ranks_gpu.sh                          bandwidth tests curves reshard loss memory stall
#   N=4 dev/check_ranks_gpu.sh curves memory        four GPUs (2), chosen parts
#
#   bandwidth   NCCL's bus bandwidth by size (nccl_bandwidth)
#   tests       test_fox --only cuda_ranks: whole runs of a small model, on two GPUs, which must be there
#   curves      125M, the first $STEPS (100) steps of the papers' recipe (warm-up over 256Mi tokens) in steps of 65,536 tokens, on 1
#               and on N GPUs, -z 1 and -z 0: losses within 2e-3 at every step, last validation within 1e-3. One GPU with other
#               micro-batches shows how far rounding alone carries; that is printed, not judged
#   reshard     125M, 20 steps each on 1, N and 1 GPUs (from four on: N, N / 2 and 1), against 60 on one: the same warm-up, the same
#               bounds
#   loss        125M on N GPUs: a rank killed, a rank stopped, SIGTERM; all end within 60 s, the last checkpoint goes on
#   memory      760M on N GPUs, -z 1 and -z 0: the table against what the runtime says, within 3%
#   stall       760M on N GPUs: a checkpoint during training costs less than 1 s (the next one waits until it is written: 30 steps are
#               enough for a disk of 0.6 GB/s); a kill while one is written leaves the one before
#
# LAUNCH: what starts N ranks (scripts/launch.sh; "mpirun --bind-to none -np"). Output below build/ranks/. Exit code 1 when something failed.
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/scaling_lib.sh
n=${N:-2}
dir=build/ranks
failed=0
mkdir -p $dir

verdict() { # ok? TEXT
    if [ "$1" = 1 ]; then echo "ok      $2"; else echo "FAILED  $2"; failed=1; fi
}

# The processes of train_fox that this script started; without pgrep, which small containers lack.
export FOX_CHECK_RANKS=$$
trainers() {
    local p
    for p in /proc/[0-9]*; do
        [ "$(cat "$p/comm" 2>/dev/null)" != train_fox ] || ! tr '\0' '\n' <"$p/environ" 2>/dev/null | grep -qx "FOX_CHECK_RANKS=$$" ||
            echo "${p#/proc/}"
    done
}

end_trainers() {
    local p
    for p in $(trainers); do
        kill -KILL "$p" 2>/dev/null
    done
}

# guard SECONDS PID: waits for PID; ends its ranks where that takes longer (a hang in NCCL's start has ten minutes of patience)
guard() {
    local dog code
    (sleep "$1" && end_trainers) >/dev/null 2>&1 &
    dog=$!
    wait "$2"
    code=$?
    kill $dog 2>/dev/null
    wait $dog 2>/dev/null
    return $code
}

# train GPUS OUT MODEL OPTIONS...: its output goes to build/ranks/OUT.log. That it ends with 0 is a verdict of its own.
train() {
    local gpus=$1 out=$2 model=$3 code
    shift 3
    launch "$gpus" ./train_fox -i $dir/data -o "$dir/$out" -e "$model" "$@" >"$dir/$out.log" 2>&1 &
    guard "${LIMIT:-150}" $!
    code=$?
    verdict $((! code)) "$out on $gpus GPUs ends with code $code$([ $code = 0 ] || echo "; $(tail -n 2 "$dir/$out.log")")"
    return $code
}

# Largest difference of a key between two runs. Each must have COUNT records with a value, of as many steps, the same in both, or
# there is none: a run that ended early would agree with any other as far as it came.
difference() { # KIND KEY A B COUNT
    local file
    for file in "$3" "$4"; do
        grep "\"kind\": \"$1\"" "$dir/$file/metrics.jsonl" |
            sed -n "s/.*\"step\": \([0-9][0-9]*\),.*\"$2\": \([-+0-9.e]*[0-9]\)[,}].*/\1 \2/p" >"$dir/$file.$1"
    done
    awk -v count="$5" 'FILENAME == ARGV[1] { first++; a[$1] = $2; next }
        { second++; if (!($1 in a) || $1 in seen) next
        seen[$1]; both++; d = a[$1] - $2; d = d < 0 ? -d : d; if (d > worst) worst = d }
        END { if (first == count && second == count && both == count) print worst + 0
        else printf "none: %d and %d records, %d steps in both, expected %d\n", first, second, both, count }' "$dir/$3.$1" "$dir/$4.$1"
}

within() { # VALUE BOUND
    awk -v v="$1" -v b="$2" 'BEGIN { print (v ~ /^[0-9][-+0-9.e]*$/ && v + 0 <= b + 0) ? 1 : 0 }'
}

# compare A B STEPS VALIDATIONS BOUND: losses and validations of two runs
compare() {
    local loss val bound=${5:-2e-3}
    loss=$(difference step loss "$1" "$2" "$3")
    val=$(difference validation loss "$1" "$2" "$4")
    verdict "$(within "$loss" "$bound")" "$1 against $2: losses within $loss ($bound)"
    bound=$(awk -v b="$bound" 'BEGIN { print b / 2 }')
    verdict "$(within "$val" "$bound")" "$1 against $2: validations within $val ($bound)"
}

small="-T 4096 -b 4 -d 65536 --val-batches 16 --keep 0"
warm_up="--warmup-tokens 268435456" # at a rate that rises faster, rounding alone carries two runs apart

part_bandwidth() {
    launch "$n" ./nccl_bandwidth
    verdict $((! $?)) 'NCCL gives right sums'
}

part_tests() {
    FOX_REQUIRE_GPU=2 ./test_fox --only cuda_ranks | tail -n 30
    verdict $((! PIPESTATUS[0])) 'test_fox --only cuda_ranks'
}

part_curves() {
    local steps=${STEPS:-100}
    local every=$(((steps + 1) / 2))
    local recipe="$small $warm_up -x $steps -v $every -n -1" validations=$(((steps + every - 1) / every)) run
    rm -rf $dir/one $dir/many* $dir/halves
    train 1 one fox-pro-125m $recipe
    train "$n" many_z1 fox-pro-125m $recipe -z 1
    train "$n" many_z0 fox-pro-125m $recipe -z 0
    train "$n" many_bf16 fox-pro-125m $recipe -z 1 --grad-dtype bf16
    train 1 halves fox-pro-125m $recipe -b 2
    echo "        one GPU with micro-batches of 2 for 4: losses within $(difference step loss one halves "$steps")"
    for run in many_z1 many_z0 many_bf16; do
        compare one $run "$steps" "$validations" "$([ $run = many_bf16 ] && echo 1e-2 || echo 2e-3)"
        echo "        $run: median ms, tokens/s, exchange ms, exposed ms, GB, bus GB/s, GiB, pruned: $(step_medians $dir/$run/metrics.jsonl 3)"
    done
    echo "        one: $(step_medians $dir/one/metrics.jsonl 3)"
}

part_reshard() {
    local counts="1 $n 1" end=0 gpus step
    [ "$n" -le 2 ] || counts="$n $((n / 2)) 1"
    rm -rf $dir/straight $dir/reshard
    train 1 straight fox-pro-125m $small $warm_up -x 60 -v 20 -n -1
    for gpus in $counts; do
        end=$((end + 20))
        train "$gpus" reshard fox-pro-125m $small $warm_up -x 60 -v 20 -n 20 -y
        for step in 40 60; do # the schedule is of 60 steps: drop what came too early
            [ $step -le $end ] || rm -rf $dir/reshard/step_000000$step
        done
    done
    compare straight reshard 60 3
    verdict "$(grep -c '"kind": "run"' $dir/reshard/metrics.jsonl | grep -cx 3)" "three starts, on $counts GPUs"
}

# lose SIGNAL WORDS: a run, one rank of which gets a signal; with WORDS it must fail and name the rank
lose() {
    local start seconds code pid victim
    rm -rf $dir/lost
    launch "$n" ./train_fox -i $dir/data -o $dir/lost -e fox-pro-125m $small -x 100000 -n 20 -v 0 --hang-timeout 10 >$dir/lost.log 2>&1 &
    pid=$!
    for ((i = 0; i < 900; i++)); do
        [ -e $dir/lost/step_00000020 ] && break
        sleep 0.1
    done
    victim=$(for p in $(trainers); do tr '\0' '\n' <"/proc/$p/environ" | grep -qE "^(OMPI_COMM_WORLD_)?RANK=$((n - 1))$" && echo "$p"; done)
    start=$SECONDS
    if [ -z "$victim" ]; then
        verdict 0 "SIG$1: rank $((n - 1)) was not found: $(tail -n 1 $dir/lost.log)"
        end_trainers
        wait $pid
        return
    fi
    kill -s "$1" $victim
    guard 90 $pid
    code=$?
    seconds=$((SECONDS - start))
    if [ -n "$2" ]; then
        verdict "$([ $code != 0 ] && [ $seconds -le 60 ] && grep -q "rank $((n - 1)) (.*$2.* in step" $dir/lost.log && echo 1 || echo 0)" \
            "SIG$1 to rank $((n - 1)): code $code after $seconds s: $(grep 'train_fox: error' $dir/lost.log | head -n 1)"
    else
        verdict "$([ $code = 0 ] && grep -q 'stopped at step' $dir/lost.log && echo 1 || echo 0)" \
            "SIG$1 to rank $((n - 1)): code $code after $seconds s: $(tail -n 1 $dir/lost.log)"
    fi
    sleep 1
    verdict "$([ -z "$(trainers)" ] && echo 1 || echo 0)" 'no process is left'
    local newest
    newest=$(find $dir/lost -name 'step_*' | sed 's/.*step_0*//' | sort -n | tail -n 1)
    train "$n" lost fox-pro-125m $small -x $((newest + 3)) -n -1 -v 0 -y
    verdict "$(grep -c "^resumes .*step_0*$newest at step $newest\$" $dir/lost.log)" "goes on from step $newest"
}

part_loss() {
    lose KILL lost
    lose STOP silent
    lose TERM ''
}

part_memory() {
    local table measured tables='' measures=''
    for zero in 1 0; do
        rm -rf $dir/memory_z$zero
        train "$n" memory_z$zero fox-pro-760m -T 16384 -b 2 -d $((65536 * n)) -x 4 -v 0 -n -1 -z $zero
        table=$(sed -n 's/^ *\([0-9.]*\) MiB   in all.*/\1/p' $dir/memory_z$zero.log)
        measured=$(step_field $dir/memory_z$zero/metrics.jsonl gpu_mem_bytes 2 | median | awk '{ print $1 / 1048576 }')
        grep -E 'MiB' $dir/memory_z$zero.log
        verdict "$(awk -v t="${table:-0}" -v m="$measured" 'BEGIN { d = m / t - 1; print (d < 0.03 && d > -0.03) ? 1 : 0 }' 2>/dev/null)" \
            "-z $zero: the table says $table MiB, the runtime $measured MiB"
        tables="$tables ${table:-0}"
        measures="$measures $measured"
    done
    # what is shared: 8 bytes of moments a parameter, and 4 of master weights beyond vectors and embeddings
    echo "$measures $tables" | awk '{ printf "        -z 1 takes %.1f MiB less than -z 0; by the tables %.1f MiB\n", $2 - $1, $4 - $3 }'
}

part_stall() {
    local stall
    rm -rf $dir/stall
    train "$n" stall fox-pro-760m -T 16384 -b 2 -d $((65536 * n)) -x 62 -v 0 -n 30 --keep 1
    grep '"kind": "checkpoint"' $dir/stall/metrics.jsonl
    # those in the middle of the run: the last one is waited for
    stall=$(grep '"kind": "checkpoint"' $dir/stall/metrics.jsonl | head -n 1 | sed 's/.*"stall_ms": \([0-9.]*\).*/\1/')
    verdict "$(within "${stall:-none}" 1000)" "checkpoint of 760M: training waited $stall ms"
    echo "        step_ms: $(step_field $dir/stall/metrics.jsonl step_ms 0 | tr '\n' ' ')"
    launch "$n" ./train_fox -i $dir/data -o $dir/stall -e fox-pro-760m -T 16384 -b 2 -d $((65536 * n)) -x 1000 -v 0 -n 3 --keep 1 -y \
        >$dir/stall_kill.log 2>&1 &
    local pid=$!
    for ((i = 0; i < 1500; i++)); do
        compgen -G "$dir/stall/tmp_step_*" >/dev/null && break
        sleep 0.05
    done
    sleep 0.3
    local during
    during=$(compgen -G "$dir/stall/tmp_step_*" | wc -l)
    end_trainers
    guard 60 $pid
    verdict "$([ "$during" = 1 ] && [ -e $dir/stall/step_00000062/state.json ] && echo 1 || echo 0)" \
        "killed while a checkpoint was written: $(cd $dir/stall && echo *step_*)"
    rm -rf $dir/stall
}

[ $# -gt 0 ] || set -- bandwidth tests curves reshard loss memory stall
for part in "$@"; do
    case $part in
    bandwidth | tests) ;;
    curves | reshard | loss | memory | stall) make_data $dir/data ;;
    *) echo "no part '$part'; see the head of $0"; exit 1 ;;
    esac
    echo "== $part"
    start=$SECONDS
    "part_$part"
    echo "   $part: $((SECONDS - start)) s"
done
exit $failed
