"""RT-DETR and what grew out of it, and the two segmenters, with random weights and as small as they come."""

import torch
from integrations.tiny_models import STAGES, Built, find_class, resnet

RT_DETR_OPTIONS = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "hidden_expansion": 0.5,
    "d_model": 16,
    "num_queries": 7,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_n_points": 3,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
    "num_labels": 5,
}


def rt_detr() -> Built:
    backbone = resnet("RTDetrResNetConfig")
    config = find_class("rt_detr", "RTDetrConfig")(backbone_config=backbone, **RT_DETR_OPTIONS)
    return find_class("rt_detr", "RTDetrForObjectDetection")(config), {}


def hgnet(*stages: str) -> object:
    import transformers

    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=list(stages),
    )


def pp_doclayout(version: int, stages: tuple[str, ...], **options: object) -> Built:
    name, prefix = f"pp_doclayout_v{version}", f"PPDocLayoutV{version}"
    config = find_class(name, f"{prefix}Config")(backbone_config=hgnet(*stages), **(RT_DETR_OPTIONS | options))
    return find_class(name, f"{prefix}ForObjectDetection")(config), {}


def pp_doclayout_v2() -> Built:
    order = find_class("pp_doclayout_v2.configuration_pp_doclayout_v2", "PPDocLayoutV2ReadingOrderConfig")(
        hidden_size=24,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        coordinate_size=4,
        shape_size=4,
        num_classes=5,
        max_position_embeddings=16,
        relation_bias_embed_dim=4,
        global_pointer_head_size=8,
    )
    return pp_doclayout(2, STAGES, reading_order_config=order, class_thresholds=[0.0] * 5, class_order=list(range(5)))


def pp_doclayout_v3() -> Built:
    return pp_doclayout(
        3,
        ("stage1", *STAGES),
        x4_feat_dim=8,
        mask_feature_channels=[8, 8],
        num_prototypes=4,
        global_pointer_head_size=8,
        mask_enhanced=False,  # boxes of random masks are empty or the whole image: all points fall together
    )


def rt_detr_v2(method: str = "default") -> Built:
    config = find_class("rt_detr_v2", "RTDetrV2Config")(
        backbone_config=resnet("RTDetrResNetConfig"), **RT_DETR_OPTIONS, decoder_method=method
    )
    return find_class("rt_detr_v2", "RTDetrV2ForObjectDetection")(config), {}


def d_fine(name: str, prefix: str, **options: object) -> Built:
    config = find_class(name, f"{prefix}Config")(
        backbone_config=hgnet(*STAGES),
        **(RT_DETR_OPTIONS | {"num_feature_levels": 3, "max_num_bins": 8, "lqe_hidden_dim": 8} | options),
    )
    return find_class(name, f"{prefix}ForObjectDetection")(config), {}


POINTS_PER_LEVEL = [3, 6, 3]


def swin() -> object:
    import transformers

    return transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


MASK_OPTIONS = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_queries": 7,
    "dropout": 0.0,
}


def mask2former() -> Built:
    config = find_class("mask2former", "Mask2FormerConfig")(
        backbone_config=swin(), **MASK_OPTIONS, feature_size=32, mask_feature_size=16, num_labels=5
    )
    return find_class("mask2former", "Mask2FormerForUniversalSegmentation")(config), {}


def oneformer() -> Built:
    config = find_class("oneformer", "OneFormerConfig")(
        backbone_config=swin(),
        **MASK_OPTIONS,
        conv_dim=32,
        mask_dim=32,
        query_dec_layers=1,
        task_seq_len=4,
        text_encoder_width=16,
        text_encoder_context_length=4,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=20,
        text_encoder_n_ctx=2,
        num_labels=5,
    )
    return find_class("oneformer", "OneFormerForUniversalSegmentation")(config), {
        "task_inputs": torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]),
    }
