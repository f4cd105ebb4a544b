"""The values of `peft_type` that PEFT 0.21.2 writes."""

PEFT_TYPES = frozenset({"LORA"})
