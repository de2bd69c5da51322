"""LAION's aesthetic predictor: a rating of the image alone, without the prompt."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lit_align.common.hub import ModelLocation
from lit_align.scoring.base import Scorer
from lit_align.scoring.scorers.preprocessing import centre_crops
from lit_align.scoring.scorers.weights import build, read_state_dict
from lit_align.user_errors import UserValueError


class LinearHead(nn.Module):
    """A stack of linear layers without activations, computed in float32 for any precision of the weights.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, whose head ImageReward also uses. Its dropout
    is inactive in scoring.

    Args:
        state_dict: `N.weight` and `N.bias` of each layer; N also counts the dropouts.

    Raises:
        ValueError: for any other name, or if the layers' shapes do not chain to one output.
    """

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        super().__init__()
        numbers = sorted({int(name.split(".")[0]) for name in state_dict if name.split(".")[0].isdigit()})
        if not numbers or set(state_dict) != {f"{n}.{part}" for n in numbers for part in ("weight", "bias")}:
            raise UserValueError(f"Head: expected N.weight and N.bias of linear layers, got {sorted(state_dict)}.")
        weights = [state_dict[f"{n}.weight"] for n in numbers]
        widths = [weight.shape[0] for weight in weights]
        if [weight.shape[1] for weight in weights[1:]] != widths[:-1] or widths[-1] != 1:
            raise UserValueError(
                f"Head: layers of shapes {[tuple(weight.shape) for weight in weights]} do not chain to one output."
            )
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights)
        for layer, n in zip(self.layers, numbers, strict=True):
            layer.load_state_dict({part: state_dict[f"{n}.{part}"] for part in ("weight", "bias")})

    def forward(self, features: Tensor) -> Tensor:
        """Map features (batch, width) to scores (batch,) float32."""
        features = features.float()
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            features = linear(features, layer.weight.float(), layer.bias.float())
        return features.squeeze(-1)


class Aesthetic(Scorer):
    """Aesthetic score, about 1 to 10, of CLIP's normalised image embedding (Schuhmann 2022). Ignores prompts.

    Images are preprocessed as by CLIP: bicubic to the short side, centre crop, CLIP's mean and standard deviation.

    Args:
        repo: hub id or local folder in the layout of shunk031's aesthetics-predictor-v2: `config.json` of a CLIP vision
            model, and one weight file of that model and `layers`. Code in it is not run.
        revision: branch, tag or commit of `repo`.
    """

    version: ClassVar[int] = 1

    def __init__(self, repo: str, revision: str | None = None) -> None:
        super().__init__()
        location = ModelLocation(repo, revision=revision)
        state_dict = read_state_dict(location.find("model.safetensors") or location.require("pytorch_model.bin"))
        in_head = [name for name in state_dict if name.startswith("layers.")]
        head = {name.removeprefix("layers."): state_dict.pop(name) for name in in_head}
        config = CLIPVisionConfig.from_pretrained(repo, revision=revision or "main")
        self.model = build(CLIPVisionModelWithProjection, config, state_dict, repo)
        self.head = LinearHead(head)

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        pixels = centre_crops(images, self.model.config.image_size).to(self.device, self.dtype)
        return self.head(normalize(self.model(pixels).image_embeds.float(), dim=-1))

    def settings(self) -> dict[str, Any]:
        config = self.model.config
        return {"image_size": config.image_size, "activation": config.hidden_act, "heads": config.num_attention_heads}
