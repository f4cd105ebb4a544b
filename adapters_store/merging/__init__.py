"""Several adapters made into one: LoRA-LEGO, PEFT's combinations, and merges in shared subspaces."""
