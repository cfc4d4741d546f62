"""Images in: the DATA grammar (`spec`), sources (`source`), decoding (`decode`), loaders (`loader`), demo images."""
