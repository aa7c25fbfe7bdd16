"""Prompts: each region of a class in a slice is asked about once, and answers come back to their own pixels."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench.contracts import Promptable
from cfrbench.prompting import ABSENT, FIRST, Prior, Prompting, labels_of, regions_of
from cfrbench.volume import IGNORE
from tests.tune.models import adapted, foundation, tuner_of

CLASSES, SIDE = 4, 16
Kind = Literal["box", "click"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), shape=st.tuples(*[st.integers(1, 6)] * 3), classes=st.integers(2, 255))
def test_regions_know_their_class_and_slice(seed: int, shape: tuple[int, int, int], classes: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, shape, generator=draw, dtype=torch.uint8)
    label[torch.rand(shape, generator=draw) < 0.2] = IGNORE
    regions = regions_of(label, classes)
    assert torch.equal(labels_of(regions, classes), label)
    kept = label != IGNORE
    slices = torch.arange(shape[2]).expand(shape)
    assert torch.equal(((regions - FIRST) // classes)[kept], slices[kept].int())


class EchoPrompts:
    """The prompt encoder of `Echo`: the corners of a box, or of the pixel that was clicked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, points: Any, boxes: Any, masks: None) -> tuple[Tensor, Tensor]:
        corners = boxes if points is None else torch.cat([points[0][:, 0], points[0][:, 0] + 1], dim=1)
        self.asked.append(corners)
        return corners, corners

    def get_dense_pe(self) -> None:
        """Echoes need no positions."""


class Echo:
    """Stands for SAM: a mask that is 1 inside the box (or the pixel) it is given, and -1 elsewhere."""

    def __init__(self) -> None:
        self.prompt_encoder = EchoPrompts()

    ask = Promptable.ask

    def image_encoder(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def mask_decoder(self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor, **_: Any) -> tuple[Any, None]:
        along = torch.arange(image_embeddings.shape[-1])
        left, top, right, bottom = sparse_prompt_embeddings.view(-1, 4, 1, 1).unbind(1)
        x, y = along.view(1, 1, -1), along.view(1, -1, 1)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        return torch.where(inside, 1.0, -1.0).unsqueeze(1), None


def ask(kind: Kind, regions: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and the prompts they answer."""
    echo: Any = Echo()
    prompting = Prompting(kind, CLASSES, jitter=0.25).train(training)
    logits = prompting(echo, torch.zeros(len(regions), 3, SIDE, SIDE), regions)
    return logits, torch.cat(echo.prompt_encoder.asked)


def canvas() -> Tensor:
    """Two images: slices 0 and 1 side by side with three squares, and slice 2 with nothing but background."""
    label = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    label[1:4, 2:5], label[8:12, 1:3], label[2:6, 10:15] = 1, 3, 1
    cells = torch.zeros(SIDE, SIDE, dtype=torch.int32)
    cells[:, SIDE // 2 :] = 1
    first = FIRST + CLASSES * cells + label
    first[-1] = IGNORE
    return torch.stack([first, torch.full_like(first, FIRST + 2 * CLASSES)])


def test_each_region_gets_the_box_around_it() -> None:
    _, asked = ask("box", canvas())
    assert {tuple(box.tolist()) for box in asked} == {(2, 1, 5, 4), (1, 8, 3, 12), (10, 2, 15, 6)}


def test_boxes_only_grow_in_training_and_stay_on_the_image() -> None:
    torch.manual_seed(0)
    _, asked = ask("box", canvas(), training=True)
    _, exact = ask("box", canvas())
    assert bool((asked[:, :2] <= exact[:, :2]).all())
    assert bool((asked[:, 2:] >= exact[:, 2:]).all())
    assert bool(((asked >= 0) & (asked <= SIDE)).all())
    assert not torch.equal(asked, exact)


@pytest.mark.parametrize("training", [True, False])
def test_each_region_gets_a_click_inside_it(training: bool) -> None:
    torch.manual_seed(0)
    regions = canvas()
    _, asked = ask("click", regions, training)
    x, y = asked[:, 0].long(), asked[:, 1].long()
    labels = labels_of(regions, CLASSES)
    assert sorted(labels[0, y, x].tolist()) == [1, 1, 3]
    assert len({int(region) for region in regions[0, y, x]}) == 3


def test_answers_stand_in_their_own_slice_and_class_and_nowhere_else() -> None:
    regions = canvas()
    logits, _ = ask("box", regions)
    expected = torch.full((2, CLASSES, SIDE, SIDE), ABSENT)
    expected[:, 0] = 0.0
    expected[0, 1] = -1.0  # class 1 was asked for in both slices
    expected[0, 3, :, : SIDE // 2] = -1.0  # class 3 in the first alone
    expected[0, 1, 1:4, 2:5], expected[0, 1, 2:6, 10:15], expected[0, 3, 8:12, 1:3] = 1.0, 1.0, 1.0
    # the last row belongs to no slice; it is answered as slice 0 is, and never counted
    assert torch.equal(logits[:, :, :-1], expected[:, :, :-1])


def test_an_image_of_nothing_is_asked_about_by_its_frame() -> None:
    logits, asked = ask("box", canvas()[1:])
    assert asked.tolist() == [[0, 0, SIDE, SIDE]] * (CLASSES - 1)
    assert bool((logits[:, 1:] == 1).all())


def test_the_prior_is_where_a_class_was_at_least_half_as_often_as_anywhere() -> None:
    prior = Prior(3)
    label = torch.zeros(48, 24, 24, dtype=torch.uint8)
    label[:24] = 1
    often = label.clone()
    label[24:, :12] = 2
    for crop in (often, often, often, label):
        prior.observe(crop)
    found = prior.label((48, 24, 24))
    assert torch.equal(found, label)
    assert prior.label((7, 5, 3)).shape == (7, 5, 3)
    assert not Prior(3).label((4, 4, 4)).any()


def both(kind: str) -> tuple[Promptable, Promptable]:
    """The released decoder, and the tuner's model that asks it."""
    tuner, model = tuner_of("none", prompt=kind), foundation("tiny")
    return adapted(tuner, model, 2).eval(), model.build(4).eval()


@torch.no_grad()
def test_one_box_is_answered_as_by_sam_itself() -> None:
    network, sam = both("box")
    image = torch.rand(1, 3, 64, 64)
    regions = torch.full((1, 64, 64), FIRST, dtype=torch.int32)
    regions[0, 10:30, 20:50] += 1
    sparse, dense = sam.prompt_encoder(points=None, boxes=torch.tensor([[20.0, 10.0, 50.0, 30.0]]), masks=None)
    masks, _ = sam.mask_decoder(
        image_embeddings=sam.image_encoder(image),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    logits = network(image, regions)
    torch.testing.assert_close(logits[:, 1], masks[:, 0], rtol=0, atol=1e-5)
    assert not logits[:, 0].any()
