"""Images in: sources, decoding, crops, augmentation, masks, loaders, and the demo images."""
