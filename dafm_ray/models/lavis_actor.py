"""The original BLIP-2 class of salesforce-lavis, in a process of its own environment.

That environment does not hold this package: Ray ships this file and `torchvision_ops` by value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dafm_ray.models.torchvision_ops import make_torchvision_importable


class LavisBlip2:
    """`Blip2Qformer` with given sizes and weights; its own constructors would download theirs.

    Args:
        sizes: fields of `QFormerSizes`.
        tensors: published names.
        words: the vocabulary in order, or None for the published one.
        device: torch device.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        tensors: Mapping[str, Any],
        words: Sequence[str] | None,
        device: str,
    ) -> None:
        import tempfile
        from contextlib import nullcontext
        from functools import partial
        from pathlib import Path

        make_torchvision_importable()
        import torch
        import transformers
        from lavis.models.blip2_models import blip2, blip2_qformer
        from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
        from lavis.models.eva_vit import VisionTransformer

        def tower(img_size: int, *unused: object) -> Any:
            return VisionTransformer(
                img_size=img_size,
                patch_size=sizes["patch_size"],
                use_mean_pooling=False,
                embed_dim=sizes["vision_width"],
                depth=sizes["vision_layers"],
                num_heads=sizes["vision_heads"],
                mlp_ratio=(sizes["vision_hidden"] + 0.5) / sizes["vision_width"],  # is rounded down
                qkv_bias=True,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            )

        def tokenizer(cls: type) -> Any:
            if words is None:
                found = transformers.BertTokenizer.from_pretrained("bert-base-uncased")
            else:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder, "vocab.txt")
                    file.write_text("\n".join(words) + "\n", encoding="utf-8")
                    found = transformers.BertTokenizer(str(file))
            found.add_special_tokens({"bos_token": "[DEC]"})
            return found

        def former(cls: type, queries: int, vision_width: int, frequency: int = 2) -> Any:
            config = BertConfig(
                vocab_size=sizes["vocab_size"],
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                intermediate_size=sizes["hidden"],
                max_position_embeddings=sizes["positions"],
            )
            config.encoder_width = vision_width
            config.add_cross_attention = True
            config.cross_attention_freq = frequency
            config.query_length = queries
            return BertLMHeadModel(config), torch.nn.Parameter(
                torch.zeros(1, queries, sizes["width"])
            )

        blip2.create_eva_vit_g = tower
        kind = type(
            "Blip2",
            (blip2_qformer.Blip2Qformer,),
            {
                "init_tokenizer": classmethod(tokenizer),
                "init_Qformer": classmethod(former),
                "maybe_autocast": lambda *unused: nullcontext(),  # fp32 on GPUs too
            },
        )
        self.model = kind(
            img_size=sizes["image_size"],
            vit_precision="fp32",
            num_query_token=sizes["queries"],
            embed_dim=sizes["embed_dim"],
        )
        known = self.model.state_dict()
        missing, _ = self.model.load_state_dict(
            {key: value.float() for key, value in tensors.items() if key in known}, strict=False
        )
        self.missing = [key for key in missing if not key.startswith(("Qformer.cls.", "itm_head."))]
        self.device = device
        self.model.eval().to(self.device)

    def about(self) -> tuple[list[str], int]:
        """Weights that the class needs and the file has not; how many numbers they are in all."""
        return self.missing, sum(parameter.numel() for parameter in self.model.parameters())

    def image(self, images: Any) -> Any:
        """(B, 3, H, W) float32 -> (B, 32, D) float32, each vector L2-normalised."""
        import torch

        sample = {"image": torch.from_numpy(images.copy()).to(self.device)}
        features = self.model.extract_features(sample, mode="image").image_embeds_proj
        return features.float().cpu().numpy()

    def text(self, texts: Sequence[str]) -> Any:
        """B texts -> (B, D) float32, L2-normalised."""
        import torch

        tokens = self.model.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.max_txt_len,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad():
            features = self.model.text_proj(self.model.forward_text(tokens))
        return torch.nn.functional.normalize(features, dim=-1).float().cpu().numpy()
