#!/usr/bin/env bash
# lm-eval scores an adapter over HTTP, on the task beside this file (reviews.yaml, reviews.jsonl). It is no package of
# Polyrank's own environment, as what it needs takes more than 350 MB: pip install "lm-eval[api]==0.4.13"
set -euo pipefail
cd "$(dirname "$0")"

URL=${POLYRANK_URL:-http://127.0.0.1:8000}
ADAPTER=${ADAPTER:-sentiment}
export OPENAI_API_KEY=${POLYRANK_API_KEY:-none} # sent as `Authorization: Bearer ...`

# The server tokenizes too (GET /tokenizer_info, POST /tokenize), so no tokenizer is named here.
lm_eval run --model local-completions \
  --model_args "model=$ADAPTER,base_url=$URL/v1/completions,auth_token=$OPENAI_API_KEY,num_concurrent=8" \
  --include_path . --tasks reviews "$@"
