"""Refuse pipelines whose models' configs ask for more than the training does, each by its name and value."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserValueError

LATENT_STATISTICS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
TEXT_MODELS = ("clip_text_model", "clip")  # model_type of configs that CLIP's text models load
UNUSED_INPUTS = {  # key of a UNet's config: what the UNet needs beside latents, timestep and prompt
    "time_cond_proj_dim": "a guidance embedding, as UNets of latent consistency models have",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "encoder_hid_dim": "image or text features through a projection of its own, as IP-Adapter's UNets",
    "encoder_hid_dim_type": "image or text features through a projection of its own, as IP-Adapter's UNets",
}
AVERAGE = (  # what diffusers' EMAModel leaves in the config of the UNet that it saves
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
CHANNELS = {5: " (as for depth)", 7: " (as for upscaling)", 8: " (as for editing)", 9: " (as for inpainting)"}


def refuse(where: str, fault: str, remedy: str) -> None:
    """Raise a UserValueError on a config.

    Args:
        where: file or folder.
        fault: key, value and why the training cannot use them.
        remedy: what to choose instead.
    """
    raise UserValueError(f"{where}: {fault}. {remedy}")


def refuse_unknown(where: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keys that no version of the class knows, unless their value switches nothing on."""
    foreign = {key: value for key, value in config.items() if key not in known and not key.startswith("_")}
    for key, value in foreign.items():
        if value not in (None, False) and value != []:
            refuse(where, f"{key} is {value!r}, which lit-align does not know", f"Take {key} out if it has no effect.")


def completed(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of a diffusers model's constructor that older stored configs leave out."""
    parameters = inspect.signature(model_class.__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | dict(config)


def check_parts(repo: str, index: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a pipeline whose `model_index.json` names other classes than ours.

    Args:
        repo: hub id or local folder.
        index: content of the file.
        wanted: names of the classes that can be used, by the part's name.
    """
    where = f"{repo}/model_index.json"
    for part, classes in wanted.items():
        found = index.get(part, [None, classes[0]])[1]
        if found not in classes:
            refuse(where, f"{part} is {found}, but must be {' or '.join(classes)}", "Choose another repo.")
    if index.get("requires_aesthetics_score"):
        fault = "requires_aesthetics_score is true: its UNet takes an aesthetic score instead of the target size"
        refuse(where, fault, "SDXL's refiner cannot be trained; choose a base model as repo.")


def check_vae(location: ModelLocation, own: ModelLocation | None, per_channel: bool) -> dict[str, Any]:
    """Read the config of the VAE in use, with its defaults.

    Args:
        location: of the VAE.
        own: of the pipeline's VAE where another one replaces it.
        per_channel: whether the pipeline's class applies a mean and a deviation per channel to latents.

    Raises:
        UserValueError: if the training would take its latents otherwise than the model expects.
    """
    where, config = f"{location}/config.json", read_vae_config(location)
    shift, mean, std = (config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
    channels = config["latent_channels"]
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        refuse(where, f"in_channels is {config['in_channels']}, but images have 3", "Choose another VAE.")
    if shift:
        refuse(where, f"shift_factor is {shift}, which Stable Diffusion's models do not use", "Choose another VAE.")
    if (mean is None) != (std is None) or (mean is not None and not len(mean) == len(std or ()) == channels):
        fault = f"latents_mean is {mean} and latents_std is {std}; both must have {channels} values, or none"
        refuse(where, fault, "Correct the config or choose another VAE.")
    if mean is not None and not per_channel:
        refuse(where, "latents_mean and latents_std are set, which this kind of pipeline ignores", "Set both to null.")
    if own is not None:
        _compare_vaes(where, config, own)
    refuse_unknown(where, config, inspect.signature(AutoencoderKL.__init__).parameters)
    return config


def read_vae_config(location: ModelLocation) -> dict[str, Any]:
    """Read a VAE's config, with the defaults that older files leave out."""
    stored = AutoencoderKL.load_config(location.repo, **location.load_options)
    found = stored.get("_class_name", "AutoencoderKL")
    if found != "AutoencoderKL":
        refuse(f"{location}/config.json", f"the VAE is {found}, but must be AutoencoderKL", "Choose another VAE.")
    return completed(AutoencoderKL, stored)


def _compare_vaes(where: str, config: Mapping[str, Any], own: ModelLocation) -> None:
    """Refuse a VAE whose latents are not scaled as those that the UNet was trained on."""
    try:
        usual = read_vae_config(own)
    except OSError:
        return  # a pipeline without a VAE of its own
    for name in LATENT_STATISTICS:
        if (config.get(name) or None) != (usual.get(name) or None):  # no shift is a shift of 0
            fault = f"{name} is {config.get(name)}, but {usual.get(name)} in {own}: the UNet knows only such latents"
            refuse(where, fault, "Choose a model.backbone.vae_repo of the same latents, or none.")


def check_text_encoder(location: ModelLocation) -> CLIPTextConfig:
    """Read the config of a CLIP text encoder.

    Raises:
        UserValueError: if it is of another kind.
    """
    stored, _ = CLIPTextConfig.get_config_dict(location.repo, **location.load_options)
    kind, where = stored.get("model_type"), f"{location}/config.json"
    if kind not in TEXT_MODELS:
        refuse(where, f"model_type is {kind!r}, but must be {TEXT_MODELS[0]!r}", "Choose another repo.")
    if stored.get("quantization_config"):
        refuse(where, "quantization_config is set; quantized weights are not supported", "Choose another repo.")
    return CLIPTextConfig.from_pretrained(location.repo, **location.load_options)


def check_tokenizer(tokenizer: Any, location: ModelLocation, config: CLIPTextConfig) -> None:
    """Refuse a tokenizer whose tokens its text encoder has no place for."""
    length, most = tokenizer.model_max_length, config.max_position_embeddings
    if length > most:
        fault = f"model_max_length is {length}, but the text encoder has {most} positions"
        refuse(f"{location}/tokenizer_config.json", fault, f"Set model_max_length to {most}.")
    if len(tokenizer) > config.vocab_size:
        fault = f"it has {len(tokenizer)} tokens, but the text encoder knows {config.vocab_size}"
        refuse(str(location), fault, "Choose the tokenizer and the text encoder of one model.")


def check_unet(
    where: str, stored: Mapping[str, Any], latent_channels: int, text_width: int, pooled_width: int | None
) -> None:
    """Refuse a UNet that takes other inputs than the training gives it.

    Args:
        where: file or folder of its config.
        stored: content of the config.
        latent_channels: channels of the VAE's latents.
        text_width: features of each token of the encoded prompt.
        pooled_width: features of the pooled prompt; None where the UNet takes neither it nor sizes.

    Raises:
        UserValueError: naming the key and its value.
    """
    config, other = completed(UNet2DConditionModel, stored), "Choose the UNet of a text-to-image base model."
    if (found := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        refuse(where, f"the denoiser is {found}, but must be UNet2DConditionModel", other)
    for key, need in UNUSED_INPUTS.items():
        if config[key] is not None:
            refuse(where, f"{key} is {config[key]!r}: the UNet takes {need}, and training gives none", other)
    channels = latent_channels, ": the VAE's latent_channels"
    wanted = {
        "in_channels": channels,
        "out_channels": channels,
        "attention_type": ("default", ""),
        "dual_cross_attention": (False, ""),
        "cross_attention_dim": (text_width, ": the width of the text encoders' output"),
        "addition_embed_type": (None if pooled_width is None else "text_time", ""),
    }
    if pooled_width is not None:
        added = 6 * (config["addition_time_embed_dim"] or 0) + pooled_width
        wanted["projection_class_embeddings_input_dim"] = (added, ": six sizes and the pooled prompt")
    for key, (value, why) in wanted.items():
        found = config[key]
        if found != value and not (isinstance(found, list | tuple) and set(found) == {value}):
            known_as = CHANNELS.get(found, "") if key == "in_channels" else ""
            refuse(where, f"{key} is {found!r}{known_as}, but must be {value!r} here{why}", other)
    refuse_unknown(where, config, [*inspect.signature(UNet2DConditionModel.__init__).parameters, *AVERAGE])
