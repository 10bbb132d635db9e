"""One whole A-CLIP step against the release: EMA update, scores, masks, losses, gradients.

The stored weights have timm's and OpenAI's layouts; they are loaded into our towers, whose modules are
those of transformers' CLIP. The release's tower differs from CLIP's in four ways, set in `build_towers`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from models.ema import make_teacher, update_teacher_
from models.estimators import InfoNCE, symmetric
from models.heads import Predictor, Projector, SimCLRProjector, byol_loss, simclr_loss
from models.token_scores import class_attention_scores, map_scores_to_view_exact
from models.token_selection import is_kept, keep_attentive
from models.towers import TextTower, VisionTower
from tests.golden_files import assert_golden, tensors

TEXT_HEADS = 2
WIDTH, GRID = 24, 14
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Weights:
    stored = tensors("aclip_e2e_tiny")
    return {key: value.double() if key.startswith("w_") else value for key, value in stored.items()}


def vision_state(golden: Weights, prefix: str) -> Weights:
    """timm's names -> transformers' names."""
    source = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    state = {
        "embeddings.class_embedding": source["cls_token"].flatten(),
        "embeddings.position_embedding.weight": source["pos_embed"][0],
        "embeddings.patch_embedding.weight": source["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": source["patch_embed.proj.bias"],
        "post_layernorm.weight": source["norm.weight"],
        "post_layernorm.bias": source["norm.bias"],
    }
    for layer in range(2):
        ours, theirs = f"encoder.layers.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            joined = source[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), joined, strict=True):
                state[f"{ours}.self_attn.{name}.{kind}"] = part
            state[f"{ours}.self_attn.out_proj.{kind}"] = source[f"{theirs}.attn.proj.{kind}"]
            for number in (1, 2):
                state[f"{ours}.layer_norm{number}.{kind}"] = source[f"{theirs}.norm{number}.{kind}"]
                state[f"{ours}.mlp.fc{number}.{kind}"] = source[f"{theirs}.mlp.fc{number}.{kind}"]
    return state


def text_state(golden: Weights) -> Weights:
    """OpenAI's names -> transformers' names."""
    state = {
        "embeddings.token_embedding.weight": golden["w_token_embedding.weight"],
        "embeddings.position_embedding.weight": golden["w_positional_embedding"],
        "final_layer_norm.weight": golden["w_ln_final.weight"],
        "final_layer_norm.bias": golden["w_ln_final.bias"],
    }
    for layer in range(2):
        ours, theirs = f"encoder.layers.{layer}", f"w_transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            joined = golden[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), joined, strict=True):
                state[f"{ours}.self_attn.{name}.{kind}"] = part
            state[f"{ours}.self_attn.out_proj.{kind}"] = golden[f"{theirs}.attn.out_proj.{kind}"]
            for number, name in ((1, "c_fc"), (2, "c_proj")):
                state[f"{ours}.layer_norm{number}.{kind}"] = golden[f"{theirs}.ln_{number}.{kind}"]
                state[f"{ours}.mlp.fc{number}.{kind}"] = golden[f"{theirs}.mlp.{name}.{kind}"]
    return state


def build_vision(golden: Weights, prefix: str) -> VisionTower:
    config = CLIPVisionConfig(
        image_size=56,
        patch_size=4,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="gelu",  # exact, where CLIP has the quick approximation
        layer_norm_eps=1e-6,
    )
    vision = CLIPVisionModel(config).double()
    vision = getattr(vision, "vision_model", vision)
    vision.pre_layrnorm = nn.Identity()
    vision.embeddings.patch_embedding = nn.Conv2d(3, WIDTH, 4, 4, bias=True).double()
    vision.load_state_dict(vision_state(golden, prefix))
    # not frozen here: the release freezes this projection but still averages the teacher's copy of it
    return VisionTower(vision).double()


def build_text(golden: Weights) -> TextTower:
    width = golden["w_ln_final.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=len(golden["w_token_embedding.weight"]),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=len(golden["w_positional_embedding"]),
        bos_token_id=0,
        eos_token_id=0,
    )
    text = CLIPTextModel(config).double()
    text = getattr(text, "text_model", text)
    text.load_state_dict(text_state(golden))
    return TextTower(text)


def load_head(head: Projector, golden: Weights, names: list[str]) -> Projector:
    """`names` are the stored prefixes of the head's layers that have parameters, in order."""
    layers = [layer for layer in head if any(True for _ in layer.parameters())]
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=True):
            for kind, parameter in layer.named_parameters():
                parameter.copy_(golden[f"w_{name}.{kind}"])
    return head


class Step:
    """The released step on our parts; attributes are what it stores."""

    def __init__(self, golden: Weights, *, keep_ratio: float = 0.5) -> None:
        self.golden = golden
        self.online = build_vision(golden, "w_visual.")
        self.text = build_text(golden)
        self.image_projection = golden["w_image_projection"].clone().requires_grad_()
        self.text_projection = golden["w_text_projection"].clone().requires_grad_()
        self.log_scale = golden["w_logit_scale"].clone().requires_grad_()
        self.simclr, self.byol, self.predictor, self.teacher_byol = (h.double() for h in self.heads())
        self.teacher = self.updated_teacher()
        self.score()
        self.kept = keep_attentive(torch.cat(self.view_scores), keep_ratio=keep_ratio)
        self.encode()

    def heads(self) -> list[Projector]:
        g = self.golden
        mlp = SimCLRProjector(WIDTH, hidden=32, out=8, norm="batch").double()
        byol, teacher = (Projector(WIDTH, hidden=32, out=8, norm="batch").double() for _ in range(2))
        predictor = Predictor(8, hidden=32, norm="batch").double()
        return [
            load_head(mlp, g, [f"image_mlp.{name}" for name in ("layer1", "bn1", "layer2", "bn2", "layer3")]),
            load_head(byol, g, [f"im_proj_byol.{number}" for number in (0, 1, 3)]),
            load_head(predictor, g, [f"im_pred_byol.{number}" for number in (0, 1, 3)]),
            load_head(teacher, g, [f"im_proj_byol_e.{number}" for number in (0, 1, 3)]),
        ]

    def updated_teacher(self) -> VisionTower:
        """The update comes before the teacher is used."""
        decay = self.golden["momentum"].item()
        teacher = make_teacher(build_vision(self.golden, "w_visual_ema."))
        update_teacher_(teacher, self.online, decay)
        self.teacher_byol = make_teacher(self.teacher_byol).train()  # its BatchNorm uses the teacher's batch
        update_teacher_(self.teacher_byol, self.byol, decay)
        self.teacher_projection = self.golden["w_image_projection_e"] * decay + (
            self.image_projection.detach() * (1 - decay)
        )
        return teacher

    def images(self) -> Tensor:
        """Stored images are normalised already: undo what the tower will do."""
        normalised = self.golden["images_int8"].double() / self.golden["image_divisor"]
        return (normalised * self.online.pixel_std + self.online.pixel_mean) * 255.0

    @torch.no_grad()
    def score(self) -> None:
        tokens = self.teacher(self.images()[6:], with_class_attention=True)
        self.class_rows = torch.stack(tokens.class_attention)
        self.scores = class_attention_scores(tokens.class_attention)
        boxes = self.golden["pos"]
        self.view_scores = [
            map_scores_to_view_exact(self.scores, boxes[:, 2], boxes[:, view]) for view in (0, 1)
        ]
        self.target = self.teacher_byol(tokens.pooled)

    def encode(self) -> None:
        features = self.online(self.images()[:6], kept=self.kept).pooled
        ids = self.golden["text"]
        is_real = torch.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
        self.image_embed = features @ self.image_projection
        self.text_embed = self.text(ids, is_real)[0] @ self.text_projection
        self.ssl_embed = self.simclr(features)
        self.prediction = self.predictor(self.byol(features))

    def losses(self) -> Weights:
        text = F.normalize(self.text_embed, dim=1)
        first, second = (
            symmetric(InfoNCE(), self.log_scale.exp() * F.normalize(view, dim=1) @ text.T)
            for view in self.image_embed.chunk(2)
        )
        ssl = self.ssl_embed[:3]
        simclr = simclr_loss(ssl, ssl)  # as released: view 1 twice
        byol = byol_loss(self.prediction, self.target.repeat(2, 1))
        total = 0.5 * first + 0.5 * second + simclr + 2 * byol
        return {
            "contra_loss_1": first,
            "contra_loss_2": second,
            "simclr_loss": simclr,
            "im_byol_loss": byol,
            "loss": total,
        }


@pytest.fixture(scope="module")
def step(golden) -> Step:
    return Step(golden)


def test_teacher_after_the_update(golden, step):
    layer = step.teacher.vision.encoder.layers[0].self_attn
    qkv = torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)])
    assert_golden(qkv.float(), golden["ema_after_visual_ema.blocks.0.attn.qkv.weight"])
    class_token = step.teacher.vision.embeddings.class_embedding
    assert_golden(class_token.float().view(1, 1, -1), golden["ema_after_visual_ema.cls_token"])
    assert_golden(step.teacher_projection.float(), golden["ema_after_image_projection_e"])


def test_scores_and_masks(golden, step):
    assert_golden(step.class_rows, golden["ema_attn_cls_rows"])
    assert_golden(step.scores, golden["score_ema"])
    assert_golden(step.view_scores[0], golden["score_view1"])
    assert_golden(step.view_scores[1], golden["score_view2"])
    assert torch.equal(~is_kept(step.kept, GRID * GRID), golden["mask_removed"])


def test_outputs(golden, step):
    assert_golden(step.image_embed, golden["out_image_embed"])
    assert_golden(step.text_embed, golden["out_text_embed"])
    assert_golden(step.ssl_embed, golden["out_image_ssl_embed"])
    assert_golden(step.prediction, golden["out_byol_feats"])
    assert_golden(step.target, golden["out_byol_feats_e"])


def test_losses(golden, step):
    for name, value in step.losses().items():
        assert_golden(value, golden[f"L_{name}"])


def test_another_keep_ratio_gives_another_loss(golden):
    assert abs(Step(golden, keep_ratio=0.75).losses()["loss"] - golden["L_loss"]) > 1e-4


def test_gradients(golden):
    step = Step(golden)
    step.losses()["loss"].backward()
    vision = step.online.vision
    attention = vision.encoder.layers[0].self_attn
    found = {
        "gv_cls_token": vision.embeddings.class_embedding.grad.view(1, 1, -1),
        "gv_pos_embed": vision.embeddings.position_embedding.weight.grad[None],
        "gv_blocks.0.attn.qkv.weight": torch.cat(
            [p.weight.grad for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        ),
        "gv_blocks.1.mlp.fc2.bias": vision.encoder.layers[1].mlp.fc2.bias.grad,
        "g_image_projection": step.image_projection.grad,
        "g_text_projection": step.text_projection.grad,
        "g_logit_scale": step.log_scale.grad,
        "g_token_embedding": step.text.text.embeddings.token_embedding.weight.grad,
        "g_im_pred_byol_last": step.predictor[-1].weight.grad,
    }
    for key, gradient in found.items():
        # arrays over 300 elements are stored in float32: compare them rounded the same way
        in_float32 = golden[key].dtype == torch.float32
        assert_golden(gradient, golden[key], atol=2e-7 if in_float32 else 1e-10)
    assert {key for key in golden if key.startswith("g")} == found.keys()
