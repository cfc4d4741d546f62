"""Fine-tuning end to end."""
