"""Training losses of DINOv2: pure functions of tensors and, where ranks must agree, of a process group."""
