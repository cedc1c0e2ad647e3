#!/bin/sh
# Everything that is checked on a GPU machine, part by part, with a table at the end. From the repository root:
#
#     dev/gpu_check.sh                                            build test bench profile deterministic report
#     dev/gpu_check.sh --official DIR                             parity and speed as well
#     dev/gpu_check.sh --official DIR build test parity truth     chosen parts, in this order
#     dev/gpu_check.sh --sanitize build                           compute-sanitizer on the GPU tests after them
#
#     build          make                                         (MAKEFLAGS of the environment are used: MPI=0, ...)
#     test           make test
#     sanitize       memcheck, racecheck (of our kernels), initcheck on `test_fox --quick --only $SANITIZE_ONLY` (cuda);
#                    sanitize-TOOL: one of them
#     bench          every kernel: attention and layers of scripts/bench.sh
#     profile        where a step's time goes: profile of scripts/bench.sh; with --official of both programs
#     deterministic  dev/check_deterministic.py: the same bits twice, and resumed, and the cost
#     parity         dev/parity_official.py: a fox-pro-tiny trained for 30 steps on these sources, and every fixture, on
#                    $DEVICE (auto); needs --official
#     truth          the official model's bf16 errors, written to $LOGS/official_bf16_error.json; needs --official
#     speed          whole steps of both programs: steps of scripts/bench.sh; needs --official
#     report         dev/report.py: all of it in one file below $RESULTS (docs/results)
#
# Tests that need a GPU, or $FOX_REQUIRE_GPU of them (1), fail where there is none: they are not skipped.
# Each part has $LIMIT seconds (540). Output goes to $LOGS/PART.log (build/gpu_check); shown are the last lines of a
# part that fails, and everything of those that measure. Exit status 1 when a part failed.
cd "$(dirname "$0")/.." || exit 1
official='' sanitize='' parts='' one=''
while [ $# -gt 0 ]; do
    case $1 in
    --official) official=$2; shift ;;
    --one) one=$2; shift ;;
    --sanitize) sanitize=yes ;;
    -*) sed -n '2,28s/^# \{0,1\}//p' "$0"; exit 1 ;;
    *) parts="$parts $1" ;;
    esac
    shift
done
if [ -n "$parts" ]; then
    parts="$parts${sanitize:+ sanitize}"
else
    parts="build test${sanitize:+ sanitize} bench profile deterministic${official:+ parity speed} report"
fi
export FOX_REQUIRE_GPU="${FOX_REQUIRE_GPU:-1}"
logs=${LOGS:-build/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$logs"

need_official() {
    [ -n "$official" ] && return
    echo 'needs --official DIR, a clone of github.com/zhixuan-lin/forgetting-transformer'
    return 1
}

part_build() { make -j "$(nproc)"; }
part_test() { make test; }

part_bench() { scripts/bench.sh --out "$logs" attention layers; }
part_profile() { scripts/bench.sh --out "$logs" ${official:+--official "$official"} profile; }
part_deterministic() { "$python" dev/check_deterministic.py --out "$logs/deterministic.json"; }
part_report() { "$python" dev/report.py "$logs" --out "${RESULTS:-docs/results}"; }

sanitize_with() {
    # A finding is an exit status of 9. Leaks of the CUDA runtime itself are not looked for.
    [ "$1" != racecheck ] || { racecheck; return; }
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 ./test_fox --quick --only "${SANITIZE_ONLY:-cuda}"
}

# Races of cuBLASLt's kernels (nvjet_...), which whole models launch, are not ours to judge. Leaving those kernels out by a filter of the
# sanitizer ends in an illegal access of its own. Programs that tests start (train_fox) are left out: they launch the kernels that the tests
# of layers, attention and models launch, and what the sanitizer says of them is not seen here.
racecheck() {
    compute-sanitizer --tool racecheck --target-processes application-only --print-limit 1000000 ./test_fox --quick --only "${SANITIZE_ONLY:-cuda}" > "$logs/racecheck.txt" 2>&1 ||
        { tail -n 20 "$logs/racecheck.txt"; return 1; }
    races=$(grep -c 'Race reported between' "$logs/racecheck.txt")
    ours=$(grep 'Race reported between' "$logs/racecheck.txt" | grep -vc 'access at nvjet_')
    grep 'Race reported between' "$logs/racecheck.txt" | grep -v 'access at nvjet_' | sort | uniq -c | head -n 20
    grep -E '[0-9]+ passed, [0-9]+ failed' "$logs/racecheck.txt"
    echo "racecheck: $races races, $ours of them not inside kernels of cuBLASLt"
    [ "$ours" = 0 ] && grep -q 'RACECHECK SUMMARY' "$logs/racecheck.txt" && ! grep -q 'Internal Sanitizer Error' "$logs/racecheck.txt"
}

# A small model with trained weights: a start for comparisons that is not random.
tiny_checkpoint() {
    tiny=build/gpu_check/tiny
    if [ ! -e "$tiny/run/metrics.jsonl" ]; then
        rm -rf "$tiny"
        ./make_shards -o "$tiny/data" --extensions .h,.c,.cu,.cuh,.md,.py ./*.h ./*.md train cpu cuda tests dev docs &&
            ./train_fox -i "$tiny/data" -o "$tiny/run" -e fox-pro-tiny -x 30 -v 0 -n 0
    fi
}
part_parity() {
    need_official || return 1
    tiny_checkpoint || return 1
    set -- --official "$official" --device "${DEVICE:-auto}" --data 'build/gpu_check/tiny/data/*.bin'
    tiny=$(ls -d build/gpu_check/tiny/run/step_*) status=0
    "$python" dev/parity_official.py "$@" --checkpoint "$tiny" || status=1
    "$python" dev/parity_official.py "$@" --checkpoint "$tiny" --acp -T 4096 --sequences 2 || status=1
    "$python" dev/parity_official.py --official "$official" --device "${DEVICE:-auto}" -T 333 --sequences 3 \
        --checkpoint tests/data/fixtures/*.safetensors || status=1
    return "$status"
}
part_truth() {
    need_official && "$python" dev/parity_official.py --official "$official" --out "$logs/official_bf16_error.json" \
        --truth tests/data/fixtures/*.safetensors
}
part_speed() { scripts/bench.sh --out "$logs" --official "$official" steps; }

run_part() {
    case $1 in
    sanitize) sanitize_with memcheck && sanitize_with racecheck && sanitize_with initcheck ;;
    sanitize-*) sanitize_with "${1#sanitize-}" ;;
    build) part_build ;;
    test) part_test ;;
    bench) part_bench ;;
    profile) part_profile ;;
    deterministic) part_deterministic ;;
    parity) part_parity ;;
    truth) part_truth ;;
    speed) part_speed ;;
    report) part_report ;;
    *) echo "no part of this name; see the head of $0"; return 1 ;;
    esac
}

if [ -n "$one" ]; then # one part by itself: what a run under the limit is
    run_part "$one"
    exit $?
fi
failed=0
table=''
[ "${parts# }" = report ] || rm -f "$logs/parts.tsv"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo 'no NVIDIA GPU here'
for part in $parts; do
    started=$(date +%s)
    LOGS=$logs timeout "${LIMIT:-540}" sh dev/gpu_check.sh --official "$official" --one "$part" > "$logs/$part.log" 2>&1
    status=$?
    [ $status -ne 124 ] || echo "stopped after ${LIMIT:-540} s" >> "$logs/$part.log"
    took=$(($(date +%s) - started))
    last=$(grep -E '[0-9]+ passed, [0-9]+ failed|^PASS$|^FAIL$|ERROR SUMMARY' "$logs/$part.log" | tail -n 1)
    if [ $status -ne 0 ]; then
        failed=1
        echo "-- $part failed:"
        tail -n 25 "$logs/$part.log"
    else
        case $part in
        bench | profile | deterministic | parity | truth | speed | report) grep -v '^make' "$logs/$part.log" ;;
        esac
    fi
    verdict=$([ $status -eq 0 ] && echo ok || echo FAILED)
    printf '%s\t%s\t%d\t%s\n' "$part" "$verdict" "$took" "$last" >> "$logs/parts.tsv"
    table="$table$(printf '%-20s %-6s %5d s  %s' "$part" "$verdict" "$took" "$last")
"
done
printf '\n%s' "$table"
exit $failed
