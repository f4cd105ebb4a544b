"""LangChain: ChatOpenAI and OpenAI, invoked, streamed, and one batch whose inputs go to different adapters."""

import os

from langchain_core.runnables import ConfigurableField
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

URL = os.environ.get("POLYRANK_URL", "http://127.0.0.1:8000")
KEY = SecretStr(os.environ.get("POLYRANK_API_KEY", "none"))  # sent as `Authorization: Bearer ...`
ADAPTER = os.environ.get("ADAPTER", "sentiment")
OTHER = os.environ.get("OTHER_ADAPTER", "casing")
PROMPT = "Review: What a lovely hotel!\nSentiment (positive or negative):"


def main() -> None:
    text = OpenAI(base_url=f"{URL}/v1", api_key=KEY, model=ADAPTER, max_tokens=4, temperature=0)
    print(f"{ADAPTER}:", text.invoke(PROMPT))
    print("streamed:", "".join(text.stream(PROMPT)))

    chat = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=ADAPTER, max_completion_tokens=4, temperature=0)
    print("chat:", chat.invoke(PROMPT).text)

    named = chat.configurable_fields(model_name=ConfigurableField(id="adapter"))
    answers = named.batch([PROMPT, PROMPT], [{"configurable": {"adapter": name}} for name in (ADAPTER, OTHER)])
    for answer in answers:
        print(f"{answer.response_metadata['model_name']}:", answer.text)


if __name__ == "__main__":
    main()
