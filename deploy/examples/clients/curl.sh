#!/usr/bin/env bash
# The four ways to name an adapter, the list of models, and a stream, with curl alone.
set -euo pipefail

URL=${POLYRANK_URL:-http://127.0.0.1:8000}
KEY=${POLYRANK_API_KEY:-none}
ADAPTER=${ADAPTER:-sentiment}
PROMPT='Review: What a lovely hotel!\nSentiment (positive or negative):'

ask() { # path, body
  curl --silent --show-error --fail-with-body --no-buffer "$URL$1" \
    -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' --data "$2"
  echo
}

curl --silent --show-error --fail-with-body "$URL/v1/models" -H "Authorization: Bearer $KEY"
echo
ask /v1/completions "{\"model\": \"$ADAPTER\", \"prompt\": \"$PROMPT\", \"max_tokens\": 4, \"temperature\": 0}"
ask /v1/completions "{\"model\": \"base:$ADAPTER\", \"prompt\": \"$PROMPT\", \"max_tokens\": 4, \"stream\": true}"
ask "/generate?adapter=$ADAPTER" "{\"inputs\": \"$PROMPT\", \"parameters\": {\"max_new_tokens\": 4}}"
ask /generate "{\"inputs\": \"$PROMPT\", \"parameters\": {\"adapter_id\": \"$ADAPTER\", \"max_new_tokens\": 4}}"
