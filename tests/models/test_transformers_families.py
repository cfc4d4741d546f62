"""Comparators at their real widths and image sizes (two blocks or the smallest stages), with their own processors on
photographs: what evaluation reads against transformers used as its manual says."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2cli.data.decode import resize_center_crop
from dinov2cli.data.demo_photos import photo_files
from dinov2cli.models.load import load_model

t = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SHALLOW = {"num_hidden_layers": 2}
FAMILIES = {
    "clip-b32": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SHALLOW)),
    "clip-l14-336": lambda: t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(
            **SHALLOW, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=336, patch_size=14
        )
    ),
    "siglip-b16": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SHALLOW)),
    "siglip-so400m-384": lambda: t.SiglipVisionModel(
        t.SiglipVisionConfig(
            **SHALLOW, hidden_size=1152, intermediate_size=4304, num_attention_heads=16, image_size=384, patch_size=14
        )
    ),
    "vit-b16": lambda: t.ViTModel(t.ViTConfig(**SHALLOW)),
    "deit-b16": lambda: t.DeiTModel(t.DeiTConfig(**SHALLOW)),
    "beit-b16": lambda: t.BeitModel(t.BeitConfig(**SHALLOW, use_relative_position_bias=True)),
    "mae-b16": lambda: t.ViTMAEModel(t.ViTMAEConfig(**SHALLOW, mask_ratio=0.0)),
    "dinov2-b14": lambda: t.Dinov2Model(t.Dinov2Config(**SHALLOW, image_size=518, patch_size=14)),
    "swin-t": lambda: t.SwinModel(t.SwinConfig()),
    "convnext-t": lambda: t.ConvNextModel(t.ConvNextConfig()),
    "regnet-y": lambda: t.RegNetModel(t.RegNetConfig(depths=[1, 1, 2, 1])),
    "resnet-50": lambda: t.ResNetModel(t.ResNetConfig()),
}
SPECIAL = {"deit-b16": 2, "siglip-b16": 0, "siglip-so400m-384": 0}
PROCESSORS = {
    "clip-b32": lambda: t.CLIPImageProcessor(),
    "clip-l14-336": lambda: t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    "siglip-b16": lambda: t.SiglipImageProcessor(),
    "siglip-so400m-384": lambda: t.SiglipImageProcessor(size={"height": 384, "width": 384}),
    "deit-b16": lambda: t.DeiTImageProcessor(),
    "beit-b16": lambda: t.BeitImageProcessor(),
    "dinov2-b14": lambda: t.BitImageProcessor(size={"shortest_edge": 256}, crop_size=224),
    "convnext-t": lambda: t.ConvNextImageProcessor(size={"shortest_edge": 224}),
    "regnet-y": lambda: t.ConvNextImageProcessor(size={"shortest_edge": 224}),
    "resnet-50": lambda: t.ConvNextImageProcessor(size={"shortest_edge": 224}),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_of_photographs(tmp_path, name):
    torch.manual_seed(0)
    theirs = FAMILIES[name]().eval()
    processor = PROCESSORS.get(name, t.ViTImageProcessor)()
    theirs.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    loaded = load_model(f"transformers:{tmp_path / name}")

    files = photo_files()
    photos = [Image.open(files[photo]).convert("RGB") for photo in ("astronaut", "coffee")]
    inputs = processor(photos, return_tensors="pt")
    out = theirs(**inputs, **({"noise": torch.arange(196.0).expand(2, -1)} if name.startswith("mae") else {}))
    how = loaded.preprocess
    options = {"square": how.square, "interpolation": how.interpolation}
    crops = torch.stack([resize_center_crop(np.array(p), how.resize, how.crop, **options) for p in photos])
    assert crops.shape[2:] == inputs["pixel_values"].shape[2:]

    last = out.last_hidden_state
    places = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last
    hierarchical = name in ("swin-t", "convnext-t", "regnet-y", "resnet-50")
    places = places[:, 0 if hierarchical else SPECIAL.get(name, 1) :]
    pooled = last[:, 0]
    if name.startswith("clip"):
        pooled, places = out.image_embeds, theirs.vision_model.post_layernorm(places)
    elif hierarchical or name.startswith(("siglip", "beit")):
        pooled = out.pooler_output.flatten(1)

    # On the very same pixels the features are the same; on our own reading of the photographs nearly so.
    seen = loaded.encoder.see(inputs["pixel_values"], [loaded.encoder.depth - 1])
    torch.testing.assert_close(seen.tokens[0][0], places, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.pooled, pooled, atol=1e-4, rtol=1e-4)
    own = loaded.encoder(how.normalize(crops))
    assert torch.nn.functional.cosine_similarity(own, pooled).min() > 0.999
