"""Self-supervised training: objective, optimizer, schedules, loop, checkpoints. Importing the package loads no torch."""
