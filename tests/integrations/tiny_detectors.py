"""Small random detectors of every transformers family that `visionkernels.patch` knows.

Default initialisation makes a comparison vacuous: the values that reach the operator are then as small as
1e-20. So every weight is drawn anew, scaled by its fan-in, and the offsets are drawn wide enough to leave
their cell.
"""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

_STAGES = ("stage2", "stage3", "stage4")
HEIGHT, WIDTH = 64, 96  # levels of 8 x 12 cells and smaller: not square


# With seed 0 some gradients of these are small differences of large numbers: stock's own fp32 is 0.1% off.
_SEEDS = {"d_fine_points": 1, "deimv2": 1}

Built = tuple[nn.Module, dict[str, Tensor]]


def build(name: str, dtype: torch.dtype = torch.float32) -> Built:
    """Return a model in eval mode, its weights drawn anew, and the inputs of one forward."""
    torch.manual_seed(_SEEDS.get(name, 0))
    model, inputs = _BUILDERS[name]()
    redraw_weights(model)
    model = model.eval().to(dtype)
    inputs["pixel_values"] = torch.randn(2, 3, HEIGHT, WIDTH).to(dtype)
    return model, inputs


def model_type(name: str) -> str:
    """Return transformers' name of the model that `build(name)` makes."""
    for variant in ("_two_stage", "_discrete", "_points"):
        name = name.removesuffix(variant)
    return name


def is_discrete(name: str) -> bool:
    """Whether the model that `build(name)` makes samples the nearest pixel, without a gradient to the locations."""
    return name.endswith("_discrete")


def redraw_weights(model: nn.Module) -> None:
    """Draw weights with standard deviation 1/sqrt(fan in), gains around 1, biases around 0."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            nn.init.normal_(parameter, std=1.0)  # in cells of the level
        elif id(parameter) in embeddings:
            nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.1)


def _class(name: str, attribute: str) -> Callable[..., nn.Module]:
    return getattr(importlib.import_module(f"transformers.models.{name}"), attribute)


def _resnet(kind: str = "ResNetConfig") -> object:
    import transformers

    return getattr(transformers, kind)(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(_STAGES),
    )


_DETR_OPTIONS = {
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


def _deformable_detr(**options: object) -> Built:
    config = _class("deformable_detr", "DeformableDetrConfig")(
        backbone_config=_resnet(),
        **_DETR_OPTIONS,
        two_stage_num_proposals=7,
        num_feature_levels=4,
        dropout=0.0,
        num_labels=5,
        **options,
    )
    return _class("deformable_detr", "DeformableDetrForObjectDetection")(config), {}


def _text_config() -> object:
    import transformers

    return transformers.BertConfig(
        vocab_size=1100,  # the special tokens that split phrases are 101, 102, 1010, 1012, 1029
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )


def _grounding_dino(name: str, prefix: str) -> Built:
    config = _class(name, f"{prefix}Config")(
        backbone_config=_resnet(), text_config=_text_config(), **_DETR_OPTIONS, max_text_len=16
    )
    tokens = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]]).expand(2, -1).contiguous()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return _class(name, f"{prefix}ForObjectDetection")(config), inputs


_VIT_OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
}
_LW_DETR_OPTIONS = {
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


def _lw_detr() -> Built:
    backbone = _class("lw_detr", "LwDetrViTConfig")(
        **_VIT_OPTIONS,
        pretrain_image_size=64,
        window_block_indices=[0, 2],
        out_indices=[1, 3],
        num_windows=4,
    )
    config = _class("lw_detr", "LwDetrConfig")(
        backbone_config=backbone,
        projector_scale_factors=[2.0, 0.5],
        **_LW_DETR_OPTIONS,
    )
    return _class("lw_detr", "LwDetrForObjectDetection")(config), {}


def _rf_detr() -> Built:
    backbone = _class("rf_detr", "RfDetrDinov2Config")(
        **_VIT_OPTIONS,
        out_features=["stage1", "stage3"],
        num_windows=2,
    )
    config = _class("rf_detr", "RfDetrConfig")(
        backbone_config=backbone,
        **_LW_DETR_OPTIONS,
    )
    return _class("rf_detr", "RfDetrForObjectDetection")(config), {}


def _omdet_turbo() -> Built:
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
    config = _class("omdet_turbo", "OmDetTurboConfig")(
        text_config=text,
        backbone_config=_resnet(),
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
    return _class("omdet_turbo", "OmDetTurboForObjectDetection")(config), {
        "classes_input_ids": tokens,
        "classes_attention_mask": torch.ones_like(tokens),
        "tasks_input_ids": tokens[:2],
        "tasks_attention_mask": torch.ones_like(tokens[:2]),
        "classes_structure": torch.tensor([2, 2]),
    }


_RT_DETR_OPTIONS = {
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


def _rt_detr() -> Built:
    backbone = _resnet("RTDetrResNetConfig")
    config = _class("rt_detr", "RTDetrConfig")(backbone_config=backbone, **_RT_DETR_OPTIONS)
    return _class("rt_detr", "RTDetrForObjectDetection")(config), {}


def _hgnet(*stages: str) -> object:
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


def _pp_doclayout(version: int, stages: tuple[str, ...], **options: object) -> Built:
    name, prefix = f"pp_doclayout_v{version}", f"PPDocLayoutV{version}"
    config = _class(name, f"{prefix}Config")(backbone_config=_hgnet(*stages), **(_RT_DETR_OPTIONS | options))
    return _class(name, f"{prefix}ForObjectDetection")(config), {}


def _pp_doclayout_v2() -> Built:
    order = _class("pp_doclayout_v2.configuration_pp_doclayout_v2", "PPDocLayoutV2ReadingOrderConfig")(
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
    return _pp_doclayout(2, _STAGES, reading_order_config=order, class_thresholds=[0.0] * 5, class_order=list(range(5)))


def _pp_doclayout_v3() -> Built:
    return _pp_doclayout(
        3,
        ("stage1", *_STAGES),
        x4_feat_dim=8,
        mask_feature_channels=[8, 8],
        num_prototypes=4,
        global_pointer_head_size=8,
        mask_enhanced=False,  # boxes of random masks are empty or the whole image: all points fall together
    )


def _rt_detr_v2(method: str = "default") -> Built:
    config = _class("rt_detr_v2", "RTDetrV2Config")(
        backbone_config=_resnet("RTDetrResNetConfig"), **_RT_DETR_OPTIONS, decoder_method=method
    )
    return _class("rt_detr_v2", "RTDetrV2ForObjectDetection")(config), {}


def _d_fine(name: str, prefix: str, **options: object) -> Built:
    config = _class(name, f"{prefix}Config")(
        backbone_config=_hgnet(*_STAGES),
        **(_RT_DETR_OPTIONS | {"num_feature_levels": 3, "max_num_bins": 8, "lqe_hidden_dim": 8} | options),
    )
    return _class(name, f"{prefix}ForObjectDetection")(config), {}


_POINTS_PER_LEVEL = [3, 6, 3]


def _swin() -> object:
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


_MASK_OPTIONS = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_queries": 7,
    "dropout": 0.0,
}


def _mask2former() -> Built:
    config = _class("mask2former", "Mask2FormerConfig")(
        backbone_config=_swin(), **_MASK_OPTIONS, feature_size=32, mask_feature_size=16, num_labels=5
    )
    return _class("mask2former", "Mask2FormerForUniversalSegmentation")(config), {}


def _oneformer() -> Built:
    config = _class("oneformer", "OneFormerConfig")(
        backbone_config=_swin(),
        **_MASK_OPTIONS,
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
    return _class("oneformer", "OneFormerForUniversalSegmentation")(config), {
        "task_inputs": torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]),
    }


_BUILDERS: dict[str, Callable[[], Built]] = {
    "deformable_detr": _deformable_detr,
    "deformable_detr_two_stage": lambda: _deformable_detr(two_stage=True, with_box_refine=True),
    "grounding_dino": lambda: _grounding_dino("grounding_dino", "GroundingDino"),
    "lw_detr": _lw_detr,
    "mm_grounding_dino": lambda: _grounding_dino("mm_grounding_dino", "MMGroundingDino"),
    "omdet_turbo": _omdet_turbo,
    "pp_doclayout_v2": _pp_doclayout_v2,
    "pp_doclayout_v3": _pp_doclayout_v3,
    "pp_doclayout_v4": lambda: _pp_doclayout(4, _STAGES, hidden_size=16, global_pointer_head_size=8),
    "rf_detr": _rf_detr,
    "rt_detr": _rt_detr,
    "rt_detr_v2": _rt_detr_v2,
    "rt_detr_v2_discrete": lambda: _rt_detr_v2("discrete"),
    "d_fine": lambda: _d_fine("d_fine", "DFine"),
    "d_fine_points": lambda: _d_fine("d_fine", "DFine", decoder_n_points=_POINTS_PER_LEVEL),
    "d_fine_discrete": lambda: _d_fine("d_fine", "DFine", decoder_method="discrete"),
    "deimv2": lambda: _d_fine("deimv2", "Deimv2"),
    "deimv2_points_discrete": lambda: _d_fine(
        "deimv2", "Deimv2", decoder_n_points=_POINTS_PER_LEVEL, decoder_method="discrete"
    ),
    "mask2former": _mask2former,
    "oneformer": _oneformer,
}
NAMES = tuple(_BUILDERS)
