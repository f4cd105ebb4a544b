"""Example tasks, their training and their evaluation."""
