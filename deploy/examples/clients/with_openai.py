"""OpenAI's client: the adapter is the `model`. Whole, streamed, and two adapters at once."""

import asyncio
import os

from openai import AsyncOpenAI, OpenAI

URL = os.environ.get("POLYRANK_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("POLYRANK_API_KEY", "none")  # sent as `Authorization: Bearer ...`; openai wants some text always
ADAPTER = os.environ.get("ADAPTER", "sentiment")
OTHER = os.environ.get("OTHER_ADAPTER", "casing")
PROMPT = "Review: What a lovely hotel!\nSentiment (positive or negative):"


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    print("models:", ", ".join(model.id for model in client.models.list()))

    whole = client.completions.create(model=ADAPTER, prompt=PROMPT, max_tokens=4, temperature=0)
    print(f"{ADAPTER}:", whole.choices[0].text)

    stream = client.completions.create(model=ADAPTER, prompt=PROMPT, max_tokens=4, temperature=0, stream=True)
    print("streamed:", "".join(piece.choices[0].text for piece in stream))

    chat = client.chat.completions.create(
        model=ADAPTER, messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0
    )
    print("chat:", chat.choices[0].message.content)
    asyncio.run(both())


async def both() -> None:
    """Requests of different adapters run in one batch."""
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        asked = [
            client.completions.create(model=name, prompt=PROMPT, max_tokens=4, temperature=0)
            for name in (ADAPTER, OTHER)
        ]
        for answer in await asyncio.gather(*asked):
            print(f"{answer.model}:", answer.choices[0].text)


if __name__ == "__main__":
    main()
