"""Self-supervised training: objective, optimizer, schedules, loop, checkpoints. Importing this loads no torch."""
