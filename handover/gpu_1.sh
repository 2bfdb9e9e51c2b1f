#!/bin/bash
# On the H200: gpu_1.sh MAIN_TREE ENGINE_TREE; results under $OUT. First both trees compile side by side, then each runs alone.
export XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_NUM_THREADS=4
main=$(realpath "$1") engine=$(realpath "$2")
bench() { # TREE NAME REPEATS ARGUMENTS...
    (cd "$1" && PYTHONPATH=$PWD timeout 170 python -m gptjax bench --repeats "$3" --json "${@:4}" >"$OUT/$2.json" 2>"$OUT/$2.err")
    echo "$2 rc $? $(grep -o '"decode_tokens_per_second": [0-9.]*\|"prefill_tokens_per_second": [0-9.]*' "$OUT/$2.json" | sed 's/_tokens_per_second//' | tr '\n' ' ')"
}
cases=(
    "gpt2 --random gpt2 --batch 1 8 --prompt-length 512"
    "llama_q4k --random llama-3.1-8b --quantize Q4_K --batch 1 --prompt-length 2048"
    "llama_mxfp4 --random llama-3.1-8b --quantize mxfp4 --batch 1 --prompt-length 2048"
    "llama_bf16 --random llama-3.1-8b --batch 1 --prompt-length 2048"
    "qwen_q4k --random qwen2.5-7b --quantize Q4_K --batch 1 --prompt-length 2048"
    "qwen_mxfp4 --random qwen2.5-7b --quantize mxfp4 --batch 1 --prompt-length 2048"
    "oss --random gpt-oss-20b --batch 1 8 --prompt-length 512"
)
for repeats in 1 4; do
    for each in "${cases[@]}"; do
        set -- $each
        for tree in main engine; do
            if [ $repeats = 1 ]; then bench "${!tree}" "$tree.$1" 1 "${@:2}" >/dev/null & else bench "${!tree}" "$tree.$1" 4 "${@:2}"; fi
        done
    done
    wait
    echo "repeats $repeats done after $SECONDS s"
done
