"""The studies, each a task of its own: geography, people, and the general form."""
