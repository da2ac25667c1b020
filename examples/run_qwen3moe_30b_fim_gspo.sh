#!/usr/bin/env bash
# Qwen3-30B-A3B learns to fill in the middle with GSPO on one node of eight GPUs, SGLang as rollout engine.
#
#   MODEL=/models/Qwen3-30B-A3B DATA=train.jsonl OUT=runs/fim bash examples/run_qwen3moe_30b_fim_gspo.sh [more arguments]
#
#   MODEL       folder in Hugging Face format
#   DATA        training problems, JSONL or parquet      EVAL_DATA  held-out problems; without them no evaluation
#   OUT         folder of the run: log, metrics, rollouts, checkpoints
#   PRESET      seed: the parameters of verl's script of this name (default); h200: laid out for eight H200
#   EPOCHS      passes over DATA (default 10); instead: --num-rollout N
#   NPROC       GPUs of this node (default 8)            PYTHON     interpreter (default .venv/bin/python)
#   RANDOM_WEIGHTS=1   without weights: MODEL needs config.json only (examples/qwen3_30b_a3b), and where it has no
#                      tokenizer, that of examples/tiny_fim. Measures, learns nothing.
#
# More arguments are those of pretrain_gspo.py and win: --dry-run shows the configuration and who sits where, and needs
# no GPU; algo.loss=grpo; --sglang-mem-fraction-static 0.4; --lr 2e-6. docs/flagship.md says what has been run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { printf '%s: %s\n' "${BASH_SOURCE[0]##*/}" "$@" >&2; exit 1; }

# The one switch: sglang, or fake (an engine without a model, for debugging the loop).
rollout_engine=sglang

[ -n "${MODEL:-}" ] || fail "MODEL is not set; expected a folder in Hugging Face format: MODEL=/models/Qwen3-30B-A3B"
[ -n "${DATA:-}" ] || fail "DATA is not set; expected a JSONL or parquet file of problems: DATA=train.jsonl"
[ -n "${OUT:-}" ] || fail "OUT is not set; expected a folder for logs and checkpoints: OUT=runs/fim"
[ -f "$MODEL/config.json" ] || fail "MODEL=$MODEL has no config.json; expected a folder in Hugging Face format"
[ -f "$DATA" ] || fail "DATA=$DATA is not a file; expected problems as JSONL or parquet"
[ -z "${EVAL_DATA:-}" ] || [ -f "$EVAL_DATA" ] || fail "EVAL_DATA=$EVAL_DATA is not a file; leave it out or name one"
case ${PRESET:-seed} in
  seed) config=$root/conf/qwen3_30b_fim_gspo.yaml ;;
  h200) config=$root/conf/qwen3_30b_fim_gspo_h200.yaml ;;
  *) fail "PRESET=$PRESET is not known; expected seed or h200" ;;
esac
nproc=${NPROC:-8}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(type -P "$python")" ] || python=python3
dry_run=false
for word in "$@"; do [ "$word" != --dry-run ] || dry_run=true; done

# ---- what the host needs (megatron_sglang/host.py checks it) ----
# As verl's script exports them. Expandable segments break CUDA IPC and the memory saver.
export MEGATRON_CI_DISABLE_EXPANDABLE_SEGMENTS=1
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
export SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK=${SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK:-True}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((nproc - 1)))}
# Before Blackwell, Megatron overlaps communication by the order in which one queue takes kernels.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Transformer Engine must find torch's cuDNN, not the host's: both variables, or the first attention fails.
cudnn=$("$python" -c 'import importlib.metadata as m
for one in list(m.distributions(name="nvidia-cudnn-cu13"))[:1]: print(one.locate_file("nvidia/cudnn"))')
if [ -n "$cudnn" ] && [ -d "$cudnn/lib" ]; then
  export CUDNN_HOME=$cudnn LD_LIBRARY_PATH=$cudnn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
# Left in a shell they contradict --attention-backend, or send ranks to another rendezvous.
unset NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
# What runs on loopback must not go through a proxy.
export no_proxy=${no_proxy:+$no_proxy,}127.0.0.1,localhost

# ---- the model ----
model=(model.hf_path="$MODEL")
if [ "${RANDOM_WEIGHTS:-0}" = 1 ]; then
  model=(model.hf_path="$MODEL" model.random_weights=true)
  if [ ! -f "$MODEL/tokenizer_config.json" ]; then
    # A folder of its own, since engine, trainer and exports read one. Ids above that vocabulary decode to nothing.
    mkdir -p "$OUT/model"
    cp "$MODEL"/*.json "$root"/examples/tiny_fim/model/tokenizer*.json "$OUT/model"
    model=(model.hf_path="$OUT/model" model.random_weights=true)
  fi
fi

# ---- the data ----
data=(data.train="$DATA" data.eval="${EVAL_DATA:-}")
[ -n "${EVAL_DATA:-}" ] || data+=(rollout.eval_interval=0)
case $DATA in
  *.jsonl) rows=$(grep -c '[^[:space:]]' "$DATA" || true) ;;
  *.parquet) rows=$("$python" -c 'import sys, pyarrow.parquet as pq
print(pq.ParquetFile(sys.argv[1]).metadata.num_rows)' "$DATA" 2>/dev/null || true) ;;
  *) rows= ;;
esac
[ -n "$rows" ] || [ -z "${EPOCHS:-}" ] ||
  fail "EPOCHS=$EPOCHS, but the rows of DATA=$DATA cannot be counted; leave EPOCHS out and give --num-rollout N"
if [ -n "$rows" ]; then
  prompts=$(awk '$1 == "prompts_per_batch:" { print $2 }' "$config")
  before=
  for word in "$@"; do
    case $word in
      rollout.prompts_per_batch=* | --rollout-batch-size=*) prompts=${word#*=} ;;
      *) [ "$before" != --rollout-batch-size ] || prompts=$word ;;
    esac
    before=$word
  done
  per_epoch=$((rows / prompts))
  [ "$per_epoch" = 0 ] || data+=(rollout.batches=$((${EPOCHS:-10} * per_epoch)))
fi

command=("$root/pretrain_gspo.py" --rollout-engine "$rollout_engine" --config "$config" "${model[@]}" "${data[@]}"
  log.run_dir="$OUT" --save "$OUT/checkpoints" "$@")
if $dry_run; then # one process stands for the first rank
  RANK=0 WORLD_SIZE=$nproc LOCAL_WORLD_SIZE=$nproc exec "$python" "${command[@]}"
fi
mkdir -p "$OUT"
# Kernels that SGLang and flashinfer compile at their first use are kept in ~/.cache and ~/.triton: keep those too.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" "${command[@]}"
