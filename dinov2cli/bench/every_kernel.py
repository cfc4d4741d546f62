"""One small forward and backward pass through every GPU kernel, for compute-sanitizer to watch (bench_all.sh)."""

import torch

from dinov2cli.kernels.attention import attention
from dinov2cli.kernels.dispatch import summary
from dinov2cli.losses.cross_entropy import crops_cross_entropy
from dinov2cli.losses.sinkhorn import sinkhorn_scalings
from dinov2cli.models.vit import VisionTransformer

LENGTHS = (1, 17, 50, 54, 64, 65, 256, 257, 261, 272)


def main() -> None:
    """Run everything once on the first GPU."""
    device = torch.device("cuda")
    print(summary(device))  # noqa: T201
    for dtype in (torch.bfloat16, torch.float16):
        for tokens in LENGTHS:
            qkv = torch.randn(2 * tokens, 3, 2, 64, device=device, dtype=dtype, requires_grad=True)
            attention(qkv, [(2, tokens)]).float().square().sum().backward()
    for rows, prototypes in ((6, 1000), (33, 4096)):
        targets = sinkhorn_scalings(torch.randn(2 * rows, prototypes, device=device).half(), 0.07)
        logits = torch.randn(3, rows, prototypes, device=device, requires_grad=True)
        crops_cross_entropy(logits * 1.0, targets, 0.1, [[1], [0], [0, 1]]).sum().backward()
    vit = VisionTransformer(img_size=28, embed_dim=128, depth=2, num_heads=2, drop_path=0.5).to(device)
    crops = [torch.randn(4, 3, size, size, device=device) for size in (28, 14)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = vit.forward_crops(crops, generator=torch.Generator().manual_seed(0))
        torch.stack([out.cls.float().square().sum() for out in outputs]).sum().backward()
    torch.cuda.synchronize()
    print("every kernel ran")  # noqa: T201


if __name__ == "__main__":
    main()
