#!/usr/bin/env bash
# Everything that is measured of an expert-parallel layer on the GPUs of one host, in one call of under ten minutes:
#
#   benches/peers/hopper/exchange.sh EXPERTILE OUT [RANKS]
#
# EXPERTILE is the command's file, OUT a folder for JSON and logs, RANKS the number of GPUs [2]. Each step has its own
# time limit; what fails is told at the end, and the others still run.
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

for preset in deepseek-v3 qwen3-235b-a22b; do
    step "$preset" 240 "$expertile" bench exchange --device cuda --ranks "$ranks" --preset "$preset" \
        --tokens "$tokens" --routing uniform,zipf --same "${SAME:-50}" --time-limit 20 --json "$out/$preset.json"
done
for fault in bad-id late killed; do
    for link in mapped nccl; do
        step "$fault-$link" 60 "$expertile" bench exchange --device cuda --ranks "$ranks" --preset qwen3-30b-a3b \
            --tokens 8 --link "$link" --fault "$fault" --time-limit 2
    done
done
step torch 120 python3 "$here/torch_exchange.py" --ranks "$ranks" --tokens "$tokens" --out "$out/torch.json"
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
