"""LoRAX's client: one adapter, a stream, and two adapters merged for one request."""

import os

import lorax

URL = os.environ.get("POLYRANK_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("POLYRANK_API_KEY", "none")
ADAPTER = os.environ.get("ADAPTER", "sentiment")
OTHER = os.environ.get("OTHER_ADAPTER", "casing")
PROMPT = "Review: What a lovely hotel!\nSentiment (positive or negative):"


def main() -> None:
    client = lorax.Client(URL, headers={"Authorization": f"Bearer {KEY}"})
    answer = client.generate(PROMPT, adapter_id=ADAPTER, adapter_source="local", max_new_tokens=4)
    print(f"{ADAPTER}:", answer.generated_text)
    events = client.generate_stream(PROMPT, adapter_id=ADAPTER, adapter_source="local", max_new_tokens=4)
    print("streamed:", "".join(event.token.text for event in events if not event.token.special))

    merged = lorax.MergedAdapters(ids=[ADAPTER, OTHER], weights=[0.7, 0.3], merge_strategy="linear", density=0.5)
    both = client.generate(PROMPT, merged_adapters=merged, max_new_tokens=4)
    print(f"{ADAPTER} and {OTHER}:", both.generated_text)


if __name__ == "__main__":
    main()
