"""Hugging Face's InferenceClient: `adapter_id` in text_generation, `model` in chat_completion."""

import os

from huggingface_hub import InferenceClient

URL = os.environ.get("POLYRANK_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("POLYRANK_API_KEY", "none")  # sent as `Authorization: Bearer ...`
ADAPTER = os.environ.get("ADAPTER", "sentiment")
PROMPT = "Review: What a lovely hotel!\nSentiment (positive or negative):"


def main() -> None:
    text = InferenceClient(model=URL, token=KEY)
    print("base:", text.text_generation(PROMPT, max_new_tokens=4))
    print(f"{ADAPTER}:", text.text_generation(PROMPT, max_new_tokens=4, adapter_id=ADAPTER))
    pieces = text.text_generation(PROMPT, max_new_tokens=4, adapter_id=ADAPTER, stream=True)
    print("streamed:", "".join(pieces))

    chat = InferenceClient(base_url=URL, api_key=KEY)
    messages = [{"role": "user", "content": PROMPT}]
    answer = chat.chat_completion(messages, model=ADAPTER, max_tokens=4, temperature=0)
    print("chat:", answer.choices[0].message.content)


if __name__ == "__main__":
    main()
