"""Adapters made from a description of a task: a generator (ICM-LoRA, arXiv 2501.17635) and the recipes it expands."""
