"""Small models of transformers with random weights, one per family, for tests of `transformers:DIR`."""

import transformers as t

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SQUARE = {"image_size": 64, "patch_size": 16}
_DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | SQUARE | {"mlp_ratio": 2}
_TEXT = VISION | {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


def clip():
    return t.CLIPModel(t.CLIPConfig(vision_config=VISION | SQUARE, text_config=_TEXT, projection_dim=24))


def clip_vision():
    return t.CLIPVisionModel(t.CLIPVisionConfig(**VISION, **SQUARE))


def clip_projected():
    return t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, **SQUARE, projection_dim=24))


def llava():
    vision = t.CLIPVisionConfig(**VISION, **SQUARE)
    return t.LlavaModel(t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**_TEXT)))


def siglip():
    return t.SiglipModel(t.SiglipConfig(vision_config=VISION | SQUARE, text_config=_TEXT))


def siglip_vision():
    return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION, **SQUARE))


def siglip2():
    vision = VISION | {"num_patches": 16, "patch_size": 16}
    return t.Siglip2Model(t.Siglip2Config(vision_config=vision, text_config=_TEXT))


def vit():
    return t.ViTModel(t.ViTConfig(**VISION, **SQUARE))


def vit_classifier():
    return t.ViTForImageClassification(t.ViTConfig(**VISION, **SQUARE))


def mae():
    return t.ViTMAEForPreTraining(t.ViTMAEConfig(**VISION, **SQUARE, **_DECODER))


def beit_mean():
    positions = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}
    return t.BeitForImageClassification(t.BeitConfig(**VISION, **SQUARE, **positions, use_mean_pooling=True))


def beit_class():
    config = t.BeitConfig(**VISION, **SQUARE, use_absolute_position_embeddings=True, use_mean_pooling=False)
    return t.BeitModel(config)


def data2vec():
    config = t.Data2VecVisionConfig(**VISION, **SQUARE, use_shared_relative_position_bias=True)
    return t.Data2VecVisionModel(config, add_pooling_layer=True)


def deit():
    return t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**VISION, **SQUARE))


def ijepa():
    return t.IJepaModel(t.IJepaConfig(**VISION, **SQUARE))


def dinov2():
    return t.Dinov2Model(t.Dinov2Config(**_DINO))


def dinov2_registers():
    return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3))


def dinov3():
    return t.DINOv3ViTModel(t.DINOv3ViTConfig(**VISION, **SQUARE, num_register_tokens=4))


def dinov3_convnext():
    return t.DINOv3ConvNextModel(t.DINOv3ConvNextConfig(**_STAGES))


def swin():
    config = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return t.SwinModel(t.SwinConfig(image_size=64, patch_size=4, **config))


def convnext():
    return t.ConvNextModel(t.ConvNextConfig(**_STAGES))


def regnet():
    return t.RegNetModel(t.RegNetConfig(embedding_size=8, groups_width=4, **_STAGES))


def resnet():
    return t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, **_STAGES))
