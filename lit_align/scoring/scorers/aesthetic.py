"""LAION's aesthetic predictor: how much people liked such images, whatever the prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lit_align.scoring.base import Scorer
from lit_align.scoring.scorers.preprocessing import centre_crops
from lit_align.scoring.scorers.weights import build, read_state_dict, weight_file
from lit_align.user_errors import UserValueError


class LinearHead(nn.Module):
    """Linear layers one after another, computed in float32 whatever the weights' precision.

    There is no activation between them, and dropout does nothing at scoring: github.com/christophschuhmann/
    improved-aesthetic-predictor, whose head ImageReward took over.

    Args:
        state_dict: `N.weight` and `N.bias` of each layer; N counts dropouts too.

    Raises:
        ValueError: if there is anything else, or if the layers do not fit each other and end in one number.
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
                f"Head: layers of shapes {[tuple(weight.shape) for weight in weights]} are no chain to 1."
            )
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights)
        for layer, n in zip(self.layers, numbers, strict=True):
            layer.load_state_dict({part: state_dict[f"{n}.{part}"] for part in ("weight", "bias")})

    def forward(self, features: Tensor) -> Tensor:
        """(batch,) float32 of features (batch, width)."""
        features = features.float()
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            features = linear(features, layer.weight.float(), layer.bias.float())
        return features.squeeze(-1)


class Aesthetic(Scorer):
    """Aesthetic score, about 1 to 10, of CLIP's normalised image embedding (Schuhmann 2022); prompts play no part.

    Images as CLIP's own: bicubic to the short side, centre crop, CLIP's mean and deviation.

    Args:
        repo: hub id or local folder in the layout of shunk031's aesthetics-predictor-v2: `config.json` of a CLIP vision
            model, and a weight file of it together with `layers`. Its own code is not run.
        revision: branch, tag or commit of `repo`.
    """

    version: ClassVar[int] = 1

    def __init__(self, repo: str, revision: str | None = None) -> None:
        super().__init__()
        state_dict = read_state_dict(_weights_of(repo, revision))
        head = {name.removeprefix("layers."): state_dict.pop(name) for name in list(state_dict) if _in_head(name)}
        config = CLIPVisionConfig.from_pretrained(repo, revision=revision or "main")
        self.model = build(CLIPVisionModelWithProjection, config, state_dict, repo)
        self.head = LinearHead(head)

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        pixels = centre_crops(images, self.model.config.image_size).to(self.device, self.dtype)
        return self.head(normalize(self.model(pixels).image_embeds.float(), dim=-1))

    def settings(self) -> dict[str, Any]:
        config = self.model.config
        return {"image_size": config.image_size, "activation": config.hidden_act, "heads": config.num_attention_heads}


def _in_head(name: str) -> bool:
    return name.startswith("layers.")


def _weights_of(repo: str, revision: str | None) -> Path:
    try:
        return weight_file(repo, "model.safetensors", revision)
    except FileNotFoundError:
        return weight_file(repo, "pytorch_model.bin", revision)
