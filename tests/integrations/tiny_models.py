"""Models of transformers with random weights, as small as they come, and the inputs they need beside the image."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

STAGES = ("stage2", "stage3", "stage4")

Built = tuple[nn.Module, dict[str, Tensor]]


def find_class(name: str, attribute: str) -> Callable[..., nn.Module]:
    return getattr(importlib.import_module(f"transformers.models.{name}"), attribute)


def resnet(kind: str = "ResNetConfig") -> object:
    import transformers

    return getattr(transformers, kind)(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(STAGES),
    )


DETR_OPTIONS = {
    "d_model": 32,  # the group norm's 32 groups
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_n_points": 3,
    "decoder_n_points": 2,
    "num_queries": 7,
}


def deformable_detr(**options: object) -> Built:
    config = find_class("deformable_detr", "DeformableDetrConfig")(
        backbone_config=resnet(),
        **DETR_OPTIONS,
        two_stage_num_proposals=7,
        num_feature_levels=4,
        dropout=0.0,
        num_labels=5,
        **options,
    )
    return find_class("deformable_detr", "DeformableDetrForObjectDetection")(config), {}


def text_config() -> object:
    import transformers

    return transformers.BertConfig(
        vocab_size=1100,  # the special tokens that split phrases are 101, 102, 1010, 1012, 1029
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )


def grounding_dino(name: str, prefix: str) -> Built:
    config = find_class(name, f"{prefix}Config")(
        backbone_config=resnet(), text_config=text_config(), **DETR_OPTIONS, max_text_len=16
    )
    tokens = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]]).expand(2, -1).contiguous()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return find_class(name, f"{prefix}ForObjectDetection")(config), inputs


VIT_OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
}
LW_DETR_OPTIONS = {
    "c2f_num_blocks": 1,
    "d_model": 16,
    "decoder_ffn_dim": 16,
    "decoder_n_points": 3,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 4,
    "num_queries": 7,
    "group_detr": 2,
    "num_labels": 5,
}


def lw_detr() -> Built:
    backbone = find_class("lw_detr", "LwDetrViTConfig")(
        **VIT_OPTIONS,
        pretrain_image_size=64,
        window_block_indices=[0, 2],
        out_indices=[1, 3],
        num_windows=4,
    )
    config = find_class("lw_detr", "LwDetrConfig")(
        backbone_config=backbone,
        projector_scale_factors=[2.0, 0.5],
        **LW_DETR_OPTIONS,
    )
    return find_class("lw_detr", "LwDetrForObjectDetection")(config), {}


def rf_detr() -> Built:
    backbone = find_class("rf_detr", "RfDetrDinov2Config")(
        **VIT_OPTIONS,
        out_features=["stage1", "stage3"],
        num_windows=2,
    )
    config = find_class("rf_detr", "RfDetrConfig")(
        backbone_config=backbone,
        **LW_DETR_OPTIONS,
    )
    return find_class("rf_detr", "RfDetrForObjectDetection")(config), {}


def omdet_turbo() -> Built:
    import transformers

    text = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = find_class("omdet_turbo", "OmDetTurboConfig")(
        text_config=text,
        backbone_config=resnet(),
        apply_layernorm_after_vision_backbone=False,
        use_timm_backbone=False,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=16,
        class_embed_dim=24,
        num_queries=7,
        encoder_hidden_dim=16,
        vision_features_channels=[16, 16, 16],
        encoder_in_channels=[8, 16, 16],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=16,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
        decoder_num_points=3,
    )
    tokens = torch.tensor([[0, 5, 1], [0, 6, 1], [0, 7, 1], [0, 8, 1]])
    return find_class("omdet_turbo", "OmDetTurboForObjectDetection")(config), {
        "classes_input_ids": tokens,
        "classes_attention_mask": torch.ones_like(tokens),
        "tasks_input_ids": tokens[:2],
        "tasks_attention_mask": torch.ones_like(tokens[:2]),
        "classes_structure": torch.tensor([2, 2]),
    }
