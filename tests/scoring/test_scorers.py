"""Published scorers on small models in the published file layouts; analytic scorers by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from lit_align.scoring import (
    Aesthetic,
    CLIPScore,
    Colourfulness,
    Exposure,
    HighContrast,
    HPSv2,
    ImageReward,
    PickScore,
    Sharpness,
    load_scorers,
)
from lit_align.scoring.scorers.analytic import colourfulness
from lit_align.scoring.scorers.hps import clip_state_dict
from tests.support.paths import PIPELINE

TOKENIZER = PIPELINE / "tokenizer"
PROMPTS = ["strawberry", "red apple", "fox", "a very long prompt " * 20]
SIZES = [(40, 57), (64, 64), (91, 33), (28, 30)]  # height, width
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
SIDE = 28


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    smooth = [torch.rand(3, height // 4, width // 4, generator=generator) for height, width in SIZES]
    grown = zip(smooth, SIZES, strict=True)
    return [(nn.functional.interpolate(image[None], size)[0] * 255).to(torch.uint8) for image, size in grown]


def crop(image):
    """Preprocess one image as CLIP does, with PIL and numpy."""
    picture = Image.fromarray(image.numpy().transpose(1, 2, 0))
    width, height = picture.size
    if width <= height:
        picture = picture.resize((SIDE, int(SIDE * height / width)), Image.BICUBIC)
    else:
        picture = picture.resize((int(SIDE * width / height), SIDE), Image.BICUBIC)
    top, left = int(round((picture.height - SIDE) / 2.0)), int(round((picture.width - SIDE) / 2.0))  # noqa: RUF046
    pixels = np.asarray(picture)[top : top + SIDE, left : left + SIDE] / 255
    return torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1).float()


def pad(image):
    """Preprocess one image as HPSv2 does, with PIL's resize of float images."""
    scale = SIDE / max(image.shape[1:])
    height, width = round(image.shape[1] * scale), round(image.shape[2] * scale)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square = np.zeros((SIDE, SIDE, 3))
    for channel in range(3):
        picture = Image.fromarray(image[channel].numpy().astype(np.float32) / 255)
        square[top : top + height, left : left + width, channel] = picture.resize((width, height), Image.BICUBIC)
    return torch.tensor((square - MEAN) / STD).permute(2, 0, 1).float()


def randomise(model):
    """Draw weights so large that scores of different images and prompts differ clearly."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data += name.endswith("norm.weight") or ("norm" in name and "weight" in name)
    return model.eval()


@pytest.fixture(scope="module")
def clip():
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    common = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "hidden_size": 48, "hidden_act": "gelu"}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    vision = {"hidden_size": 64, "image_size": SIDE, "patch_size": 14}
    return randomise(
        CLIPModel(
            CLIPConfig(text_config={**common, **text, **tokens}, vision_config={**common, **vision}, projection_dim=24)
        )
    )


@pytest.fixture(scope="module")
def clip_folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@torch.no_grad()
def cosine(clip, pixels, prompt):
    tokens = CLIPTokenizer.from_pretrained(TOKENIZER)(prompt, truncation=True, max_length=32, return_tensors="pt")
    output = clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels[None])
    return torch.cosine_similarity(output.image_embeds, output.text_embeds)[0]


def check(scorer, images, expected):
    """Check that scores are `expected`, distinct, independent of the batch, and close in half precision."""
    scores = scorer.score(images, PROMPTS)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.stack(list(expected)).float(), atol=1e-5, rtol=1e-5)
    assert scores.sort().values.diff().min() > 1e-3
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    half = scorer.to(torch.float16).score(images, PROMPTS)  # as `prepare` does on CUDA; formulas are in float32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=5e-3, rtol=5e-3)
    assert not torch.equal(half, half.half().float())


def test_clip_score(clip, clip_folder, images):
    expected = [cosine(clip, crop(image), prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    check(CLIPScore(str(clip_folder)), images, expected)


def test_pick_score_reads_its_tokenizer_from_another_folder(clip, images, tmp_path):
    clip.save_pretrained(tmp_path)
    expected = [
        clip.logit_scale.detach().exp() * cosine(clip, crop(image), prompt)
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    check(PickScore(str(tmp_path), processor_repo=str(TOKENIZER)), images, expected)


def open_clip_layout(clip):
    """Invert `clip_state_dict`, layer by layer."""
    state = {"logit_scale": clip.logit_scale.data, "attn_mask": torch.zeros(32, 32)}
    text, vision = clip.text_model, clip.vision_model
    state["token_embedding.weight"] = text.embeddings.token_embedding.weight.data
    state["positional_embedding"] = text.embeddings.position_embedding.weight.data
    state["text_projection"] = clip.text_projection.weight.data.T.clone()
    state["visual.proj"] = clip.visual_projection.weight.data.T.clone()
    state["visual.class_embedding"] = vision.embeddings.class_embedding.data
    state["visual.positional_embedding"] = vision.embeddings.position_embedding.weight.data
    state["visual.conv1.weight"] = vision.embeddings.patch_embedding.weight.data
    modules = {
        "ln_final": text.final_layer_norm,
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
    }
    for prefix, tower in (("", text), ("visual.", vision)):
        for i, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}transformer.resblocks.{i}", layer.self_attn
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            state[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight.data for part in parts])
            state[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias.data for part in parts])
            modules |= {f"{block}.attn.out_proj": attention.out_proj, f"{block}.ln_1": layer.layer_norm1}
            modules |= {f"{block}.ln_2": layer.layer_norm2, f"{block}.mlp.c_fc": layer.mlp.fc1}
            modules[f"{block}.mlp.c_proj"] = layer.mlp.fc2
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight.data, f"{name}.bias": module.bias.data}
    return state


def test_hps(clip, clip_folder, images, tmp_path):
    torch.save({"epoch": 1, "state_dict": open_clip_layout(clip)}, tmp_path / "hps.pt")
    scorer = HPSv2(str(tmp_path), "hps.pt", config_repo=str(clip_folder))
    expected = [cosine(clip, pad(image), prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    check(scorer, images, expected)


def test_clip_state_dict_is_the_inverse_of_its_layout(clip):
    mapped, theirs = clip_state_dict(open_clip_layout(clip)), clip.state_dict()
    assert mapped.keys() == theirs.keys()
    assert all(torch.equal(mapped[name], theirs[name]) for name in theirs)


def head_layers(width, hidden=(8, 4)):
    """Make layers numbered as in the published head, where dropouts count too."""
    widths = [width, *hidden, 1]
    generator = torch.Generator().manual_seed(2)
    numbers = [0, 2, 4][: len(hidden) + 1]
    weights = [torch.randn(b, a, generator=generator) for a, b in pairwise(widths)]
    return {
        n: (weight, torch.randn(len(weight), generator=generator)) for n, weight in zip(numbers, weights, strict=True)
    }


def apply_head(layers, features):
    for weight, bias in layers.values():
        features = weight @ features + bias
    return features[0]


@pytest.mark.parametrize(("filename", "hidden"), [("model.safetensors", (8, 4)), ("pytorch_model.bin", ())])
def test_aesthetic(clip, images, tmp_path, filename, hidden):
    config = clip.config.vision_config
    config.projection_dim = 24
    model = randomise(CLIPVisionModelWithProjection(config))
    layers = head_layers(24, hidden)
    state = {f"vision_model.{name}": value for name, value in model.vision_model.state_dict().items()}
    state["visual_projection.weight"] = model.visual_projection.weight.data
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # saved by older versions of transformers
    for n, (weight, bias) in layers.items():
        state |= {f"layers.{n}.weight": weight, f"layers.{n}.bias": bias}
    config.save_pretrained(tmp_path)
    (save_file if filename.endswith("safetensors") else torch.save)(state, tmp_path / filename)
    expected = []
    for image in images:
        with torch.no_grad():
            embedding = model(crop(image)[None]).image_embeds[0]
        expected.append(apply_head(layers, embedding / embedding.norm()))
    check(Aesthetic(str(tmp_path)), images, expected)


@pytest.fixture(scope="module")
def blip():
    common = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionConfig(**common, image_size=SIDE, patch_size=14, layer_norm_eps=1e-6)
    text = BlipTextConfig(**common, vocab_size=9, encoder_hidden_size=128, max_position_embeddings=40)
    return randomise(BlipVisionModel(vision)), randomise(BlipTextModel(text, add_pooling_layer=False))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox\nred\napple\nlong\n")
    return folder


def image_reward_layout(vision, text, head):
    state = {"blip.visual_encoder.cls_token": vision.embeddings.class_embedding.data}
    state["blip.visual_encoder.pos_embed"] = vision.embeddings.position_embedding.data
    modules = {"patch_embed.proj": vision.embeddings.patch_embedding, "norm": vision.post_layernorm}
    for i, layer in enumerate(vision.encoder.layers):
        modules |= {f"blocks.{i}.attn.qkv": layer.self_attn.qkv, f"blocks.{i}.attn.proj": layer.self_attn.projection}
        modules |= {f"blocks.{i}.norm1": layer.layer_norm1, f"blocks.{i}.norm2": layer.layer_norm2}
        modules |= {f"blocks.{i}.mlp.fc1": layer.mlp.fc1, f"blocks.{i}.mlp.fc2": layer.mlp.fc2}
    for name, module in modules.items():
        state[f"blip.visual_encoder.{name}.weight"] = module.weight.data
        state[f"blip.visual_encoder.{name}.bias"] = module.bias.data
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for n, (weight, bias) in head.items():
        state |= {f"mlp.layers.{n}.weight": weight, f"mlp.layers.{n}.bias": bias}
    unused = ["vision_proj.weight", "text_proj.bias", "visual_encoder_m.norm.weight", "image_queue", "temp"]
    return state | {f"blip.{name}": torch.zeros(1) for name in unused}


def test_image_reward(blip, vocabulary, images, tmp_path):
    vision, text = blip
    head = head_layers(128)
    torch.save(image_reward_layout(vision, text, head), tmp_path / "ImageReward.pt")
    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        with torch.no_grad():
            seen = vision(crop(image)[None]).last_hidden_state
            read = text(
                tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            ).last_hidden_state[0, 0]
        expected.append((apply_head(head, read) - 0.16717362830052426) / 1.0333394966054072)
    check(ImageReward(str(tmp_path), "ImageReward.pt", tokenizer_repo=str(vocabulary)), images, expected)


class Malicious:
    def __reduce__(self):
        return print, ("code from a weight file ran",)


def test_a_pickle_that_runs_code_is_refused(clip_folder, vocabulary, tmp_path, capsys):
    for name in ("x.pt", "pytorch_model.bin"):
        torch.save({"state_dict": Malicious()}, tmp_path / name)
    for build in (
        lambda: HPSv2(str(tmp_path), "x.pt", config_repo=str(clip_folder)),
        lambda: ImageReward(str(tmp_path), "x.pt", tokenizer_repo=str(vocabulary)),
        lambda: Aesthetic(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="holds more than weights, or is damaged; it is not loaded"):
            build()
    assert "code from a weight file ran" not in capsys.readouterr().out


def test_weights_of_another_layout_are_refused(clip, clip_folder, blip, vocabulary, tmp_path):
    def hps(state):
        torch.save({"state_dict": state}, tmp_path / "x.pt")
        return HPSv2(str(tmp_path), "x.pt", config_repo=str(clip_folder))

    state = open_clip_layout(clip)
    with pytest.raises(ValueError, match=r"'text_model\S+' is not a weight of open_clip's CLIP"):
        hps({name: value for name, value in clip.state_dict().items() if name != "logit_scale"})
    with pytest.raises(ValueError, match=r"1 missing weights for CLIPModel, the first is visual_projection\.weight"):
        hps({name: value for name, value in state.items() if name != "visual.proj"})
    with pytest.raises(ValueError, match=r"unexpected weights for CLIPModel, the first is text_model\S+layers\.7"):
        hps(state | {"transformer.resblocks.7.ln_1.weight": torch.ones(48)})
    with pytest.raises(ValueError, match="1 mismatched weights for CLIPModel"):
        hps(state | {"visual.proj": torch.ones(64, 25)})
    torch.save({"state_dict": [1]}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a list instead of named tensors"):
        HPSv2(str(tmp_path), "x.pt", config_repo=str(clip_folder))
    with pytest.raises(FileNotFoundError, match=r"holds no y\.pt\. Check repo, and filename"):
        HPSv2(str(tmp_path), "y.pt", config_repo=str(clip_folder))
    with pytest.raises(FileNotFoundError, match=r"no/such holds no y\.pt in the local cache, and HF_HUB_OFFLINE"):
        HPSv2("no/such", "y.pt", config_repo=str(clip_folder))  # tests are offline

    def image_reward(state):
        torch.save(state, tmp_path / "x.pt")
        return ImageReward(str(tmp_path), "x.pt", tokenizer_repo=str(vocabulary))

    state = image_reward_layout(*blip, head_layers(128))
    image_reward(state)
    for extra, message in [
        ("surprise", "'surprise' is not a weight of ImageReward"),
        ("blip.visual_encoder.blocks.0.norm9.weight", r"blocks\.0\.norm9\.weight is not a weight of BLIP's vision"),
        ("blip.text_encoder.pooler.dense.weight", r"1 unexpected weights for BlipTextModel, the first is pooler"),
        ("mlp.layers.5.gain", r"Head: expected N\.weight and N\.bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            image_reward(state | {extra: torch.ones(2)})
    with pytest.raises(ValueError, match="do not chain to one output"):
        image_reward(state | {"mlp.layers.2.weight": torch.ones(4, 7)})
    with pytest.raises(ValueError, match=r"lacks the weight 'embeddings\.position_embedding'"):
        image_reward({name: value for name, value in state.items() if not name.endswith("pos_embed")})
    with pytest.raises(ValueError, match=r"no weight mlp\.layers\.\*"):
        image_reward({name: value for name, value in state.items() if not name.startswith("mlp")})


def test_fingerprints_depend_on_class_weights_and_settings(clip, clip_folder):
    scorer, twin = CLIPScore(str(clip_folder)), CLIPScore(str(clip_folder))
    assert scorer.fingerprint() == twin.fingerprint() != PickScore(str(clip_folder)).fingerprint()
    before = scorer.fingerprint()
    scorer.model.vision_model.post_layernorm.bias.data[3] += 1e-3
    assert scorer.fingerprint() != before
    twin.model.config.text_config.hidden_act = "quick_gelu"
    assert twin.fingerprint() != before
    assert CLIPScore(str(clip_folder)).prepare("cpu").fingerprint() == before


def test_presets_load_by_name_and_errors_name_the_entry(clip_folder, tmp_path):
    scorers = load_scorers(["sharpness", "colourfulness", "exposure"])
    assert [type(scorer) for scorer in scorers.values()] == [Sharpness, Colourfulness, Exposure]
    assert list(scorers) == ["sharpness", "colourfulness", "exposure"]
    with pytest.raises(ValueError, match=r"'hps' is not in .*\.yaml\. Choose from clip, pickscore, hpsv2, hpsv2\.1"):
        load_scorers(["hps"])
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "mine": {"class_path": "lit_align.scoring.CLIPScore", "init_args": {"repo": str(clip_folder)}},
                "typo": {"class_path": "lit_align.scoring.CLIPScore", "init_args": {"rep": "x"}},
                "stranger": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
                "empty": None,
            }
        )
    )
    assert isinstance(load_scorers(["mine"], path)["mine"], CLIPScore)
    for name in ("typo", "stranger", "empty"):
        with pytest.raises(ValueError, match=rf"scorer: the entry of '{name}' in \S+mine\.yaml does not fit: "):
            load_scorers([name], path)


def test_every_packaged_preset_fits_its_class(monkeypatch):
    """Parse classes and arguments of all ten presets without loading weights."""
    from lit_align.scoring import presets

    names = list(yaml.safe_load(presets.PRESETS.read_text()))
    assert len(names) == 10
    monkeypatch.setattr(presets.ArgumentParser, "instantiate", lambda self, config: config)
    configs = load_scorers(names)
    assert configs["hpsv2.1"].class_path == "lit_align.scoring.HPSv2"
    assert configs["hpsv2.1"].init_args.filename == "HPS_v2.1_compressed.pt"


def flat(colour, height=4, width=6):
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width).clone()


def test_colourfulness_by_hand():
    grey, red_green = flat([90, 90, 90]), flat([255, 0, 0])
    red_green[:, :, 3:] = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1)
    # rg is 255 and -255: standard deviation 255, mean 0; yb is 127.5 everywhere.
    torch.testing.assert_close(colourfulness(torch.stack([grey, red_green])), torch.tensor([0.0, 255 + 0.3 * 127.5]))
    other = flat([255, 0, 0], height=9)
    # rg = 255, yb = 127.5, standard deviation 0: 0.3 sqrt(255² + 127.5²).
    scores = Colourfulness().score([grey, red_green, other], ["", "", ""])
    torch.testing.assert_close(scores, torch.tensor([0.0, 293.25, 0.3 * 285.0986]))


def test_high_contrast_by_hand():
    """Seven of ten columns near black or near white are enough, six are not; neither is grey, nor a colour."""
    black, white, grey, red = flat([63] * 3, 4, 10), flat([192] * 3, 4, 10), flat([128] * 3, 4, 10), flat([255, 0, 0])
    seven, six = white.clone(), white.clone()
    seven[:, :, 7:], six[:, :, 6:] = grey[:, :, 7:], grey[:, :, 6:]
    scores = HighContrast().score([black, white, seven, six, grey, red], [""] * 6)
    assert scores.tolist() == [1, 1, 1, 0, 0, 0]


def test_sharpness_by_hand():
    dot = flat([100, 100, 100], height=5, width=5)
    dot[:, 2, 2] = 110  # Laplacian of the nine inner pixels: -40, four times 10, four times 0
    scores = Sharpness().score([flat([9, 90, 200]), dot], ["", ""])
    torch.testing.assert_close(scores, torch.tensor([0.0, (40**2 + 4 * 10**2) / 9]), atol=1e-3, rtol=1e-4)


def test_exposure_by_hand():
    black, mid = flat([0, 0, 0]), flat([127, 127, 128])
    half = flat([0, 0, 0])
    half[:, :, :3] = torch.tensor([102, 102, 102], dtype=torch.uint8).view(
        3, 1, 1
    )  # 0.4: half a standard deviation off
    scores = Exposure().score([black, mid, half], ["", "", ""])
    dark = np.exp(-3 * 0.25 / 0.08)
    expected = torch.tensor([dark, 1.0, (np.exp(-3 * 0.125) + dark) / 2], dtype=torch.float32)
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
