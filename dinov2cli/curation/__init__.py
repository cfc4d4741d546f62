"""Which images to keep: duplicate removal, retrieval from query sets, balanced sampling. Policies on top of search."""
