"""What a foundation model builds and a fine-tuner changes: three networks that together answer as SAM does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Promptable(nn.Module):
    """A SAM-like model: image encoder, prompt encoder, mask decoder that returns all its masks; run without prompts.

    input_size: side of the images it takes, where a fine-tuner has changed the foundation model's. classes: how many
    it tells apart, where that is not its number of masks. prompting: makes prompts of what is known of an image, where
    a fine-tuner works with prompts (`cfrbench.prompting`).
    """

    input_size: int | None = None
    classes: int | None = None

    def __init__(self, image_encoder: nn.Module, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder: Any = prompt_encoder  # nn.Module's typing hides `get_dense_pe`
        self.mask_decoder = mask_decoder
        self.prompting: nn.Module | None = None

    def forward(self, images: Tensor, regions: Tensor | None = None) -> Tensor:
        """Map ``(B, 3, S, S)`` normalised images to low-resolution logits ``(B, C, s, s)``.

        Models that see volumes take ``(B, D, 3, S, S)``, all slices of each, and return ``(B D, C, s, s)``. Only
        `prompting` reads ``regions``.
        """
        if self.prompting is not None:
            prompted: Tensor = self.prompting(self, images, regions)
            return prompted
        return self.decode(self.image_encoder(images))

    def decode(self, embedding: Tensor) -> Tensor:
        """The logits of an image embedding ``(B, width, g, g)``, without prompts."""
        return self.ask(embedding)[0]

    def ask(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks ``(B, masks, s, s)`` and their predicted IoU ``(B, masks)``; one prompt for each embedding, or none."""
        # No prompt: an empty sparse embedding and the learned "no mask" dense one, as ShumengLI/CFR does.
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=None)
        masks, iou = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return masks, iou
