#!/usr/bin/env bash
# Everything that is measured of an expert-parallel layer on the GPUs of one host, in one call of under ten minutes:
#
#   benches/peers/hopper/exchange.sh EXPERTILE OUT [RANKS]
#
# EXPERTILE is the command's file, OUT a folder for JSON and logs, RANKS the number of GPUs [2]; with one GPU, what can be
# had of it. LINKS may name others than mapped,nccl (nccl-windows), PRESETS, ROUTING, TOKENS and SAME (repeats whose bits
# are compared) less than all; with ONLY_RANKS what one GPU does is left out. Each step has its own time limit; what fails is told
# at the end, and the others still run. Where the Python package is installed its ranks are compared, too; where
# compute-sanitizer is, every rank of a small layer runs under it.
set -uo pipefail
expertile=$1 out=$2 ranks=${3:-2}
here=$(cd "$(dirname "$0")" && pwd)
tokens=${TOKENS:-1,8,64,128,256,1024,4096}
mkdir -p "$out"
failed=()

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || failed+=("$name ($?)")
    tail -n "${LINES_SHOWN:-60}" "$out/$name.log"
    echo "== $name: $((SECONDS - start)) s"
}

bench=("$expertile" bench exchange --device cuda)
small=(--preset qwen3-30b-a3b --experts 16)
if [ "$ranks" -gt 1 ]; then
    for fault in bad-id late killed; do
        for way in "mapped gather" "nccl gather" "nccl routed"; do
            read -r link dispatch <<<"$way"
            step "$fault-$link-$dispatch" 60 "${bench[@]}" --ranks "$ranks" "${small[@]}" --tokens 8 --link "$link" \
                --dispatch "$dispatch" --fault "$fault" --time-limit 2
        done
    done
    if python3 -c 'import expertile.torch' 2>/dev/null; then
        step python 120 python3 "$here/../../../bindings/python/tests/expert_parallel_ranks.py" --ranks "$ranks" \
            --device cuda
    fi
    if command -v compute-sanitizer >/dev/null; then
        # NCCL tries calls of the driver that fail, which is no error of a kernel.
        step memcheck 150 compute-sanitizer --tool memcheck --report-api-errors no --target-processes all \
            --error-exitcode 9 "${bench[@]}" --ranks "$ranks" "${small[@]}" --tokens 1,40 --same 1 --repeat 1
    fi
    step torch 120 python3 "$here/torch_exchange.py" --ranks "$ranks" --tokens "$tokens" --out "$out/torch.json"
    for preset in ${PRESETS:-deepseek-v3 qwen3-235b-a22b}; do
        step "$preset" 240 "${bench[@]}" --ranks "$ranks" --preset "$preset" --tokens "$tokens" \
            --routing "${ROUTING:-uniform,zipf}" --link "${LINKS:-mapped,nccl}" --same "${SAME:-50}" --time-limit 20 \
            --json "$out/$preset.json"
    done
fi
if [ -n "${ONLY_RANKS:-}" ]; then
    echo "failed: ${failed[*]:-none}"
    exit "${#failed[@]}"
fi
# Apart from the wire: two ranks on one GPU; and NCCL with one rank. Experts are few, as they are not what is timed.
for preset in deepseek-v3 qwen3-235b-a22b; do
    step "one-gpu-$preset" 60 "${bench[@]}" --one-gpu --ranks 2 --preset "$preset" --experts 32 --tokens "$tokens" \
        --json "$out/one-gpu-$preset.json"
    step "one-rank-$preset" 60 "${bench[@]}" --ranks 1 --link nccl --preset "$preset" --experts 32 --tokens "$tokens" \
        --json "$out/one-rank-$preset.json"
done
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
