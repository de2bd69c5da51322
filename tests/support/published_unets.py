"""Configurations of the published UNets, from their `unet/config.json`."""

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}

PUBLISHED = {
    "SD1.5": {**_SD, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "SD2.1": {
        **_SD,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "use_linear_projection": True,
    },
    "SDXL": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
    },
}
