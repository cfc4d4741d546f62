"""The benchmarks of `dinov2 eval`: one file each, all of the form that `interface` describes."""
