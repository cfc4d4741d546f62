"""The only readers and writers of the directories `dinov2` leaves on disk: embeddings, selections, runs, results."""
