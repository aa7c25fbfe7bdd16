"""Parameter counts equal those of the originals, method by method."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from cfrbench import registry
from cfrbench.contracts import FoundationModel, Promptable, Published
from cfrbench.errors import UsageError
from cfrbench.parameters import Count, count_model, count_tuner, count_tuners

SAM: Any = registry.load("model", "sam-vit-b")
LORA_1, LORA_8, LORA_13 = 3_793_312, 4_773_760, 5_474_080
PROMPT = 6_220
DECODER = 4_058_340 - 132_612  # the IoU head gets no gradient

#: fine-tuner, options, input, masks -> total, flagged, with gradient; counted on the originals with random weights
TABLE: list[tuple[str, dict[str, Any], int, int, int, int, int]] = [
    ("lora", {}, 1024, 2, 93_602_286, 3_931_374, LORA_1),
    ("lora", {}, 1024, 14, 95_286_138, 5_615_226, LORA_13),
    ("lora", {}, 1024, 9, 94_584_533, 4_913_621, LORA_8),
    ("lora", {}, 1024, 3, 93_742_607, 4_071_695, 3_933_376),
    ("lora", {}, 1024, 4, 93_882_928, 4_212_016, 4_073_440),
    ("lora", {}, 512, 9, 92_192_469, 4_913_621, LORA_8),
    ("lora", {}, 512, 2, 91_210_222, 3_931_374, LORA_1),
    ("lora", {}, 512, 14, 92_894_074, 5_615_226, LORA_13),
    ("decoder-only", {}, 1024, 4, 93_735_472, 4_058_340, DECODER),
    ("decoder-only", {}, 1024, 2, 93_454_830, 3_777_698, 3_645_600),
    ("encoder-decoder", {}, 1024, 4, 93_735_472, 93_729_252, 89_670_912 + DECODER),
    ("encoder-decoder", {}, 1024, 2, 93_454_830, 89_670_912 + 3_777_698, 89_670_912 + 3_645_600),
    # the depth adapters of 2D mode are flagged and never used
    ("msa-adapter", {}, 1024, 4, 104_386_864, 10_651_392 + 4_058_340, 7_100_928 + DECODER),
    ("lora", {"preset": "msa"}, 1024, 4, 90_187_008 + PROMPT + 4_058_340, 516_096 + PROMPT + 4_058_340,
     516_096 + 256 + DECODER),
    ("samus", {"prompt": "box"}, 1024, 4, 133_323_568, 39_653_120, 39_653_120),
    # an attention of the prompt encoder is built and never called
    ("sam3d-adapter", {"clicks": True}, 1024, 2, 114_309_004, 15_209_984 + 3_164_160 + 7_088_256, 25_198_976),
    ("sam3d-adapter", {}, 1024, 2, 111_144_844, 22_298_240, 22_298_240),
    ("sam-med2d-adapter", {}, 256, 4, 271_241_776, 180_504_576 + PROMPT + 4_058_340, 180_504_576 + DECODER + 256),
]  # fmt: skip


@pytest.mark.parametrize(("tuner", "options", "size", "masks", "total", "flagged", "effective"), TABLE)
def test_counts_equal_the_table(
    tuner: str, options: dict[str, Any], size: int, masks: int, total: int, flagged: int, effective: int
) -> None:
    found = count_tuner(SAM, registry.load("tune", tuner), Published("", options, size, masks))
    assert (found.total, found.flagged, found.effective) == (total, flagged, effective)


def test_models_have_their_published_sizes() -> None:
    sizes = {"sam-vit-b": 93_735_472, "medsam": 93_735_472, "sam-vit-l": 312_342_832, "sam-vit-h": 641_090_608}
    for name, expected in sizes.items():
        assert count_model(registry.load("model", name)(), 4) == expected, name
    assert count_model(SAM(SAM.Config(input_size=256)), 4) == 90_737_200
    med2d = registry.load("model", "sam-med2d")
    assert count_model(med2d(), 4) == 271_241_776
    assert count_model(med2d(med2d.Config(adapters=False)), 4) == 90_737_200
    assert count_model(registry.load("model", "lite-medsam")(), 4) == 9_791_300
    # the published file holds a classification head that nothing uses
    assert count_model(registry.load("model", "mobile-sam")(), 4) == 10_130_092 - 321_640


def test_every_fine_tuner_is_counted_in_seconds() -> None:
    began = time.process_time()
    rows = count_tuners("sam-vit-b", ())
    assert time.process_time() - began < 30  # a few seconds where nobody else computes
    assert {row.tuner for row in rows} == set(registry.names("tune"))
    assert all(row.reason or row.effective <= row.flagged <= row.total for row in rows)
    assert len(rows) == len({(row.tuner, row.title) for row in rows})


def test_a_size_or_a_number_of_classes_may_be_asked_for() -> None:
    (row,) = count_tuners("sam-vit-b", ["lora"], input_size=512, num_classes=9)
    assert row == Count("lora", "default options", 512, 9, 92_192_469, 4_913_621, LORA_8)
    (wide,) = count_tuners("sam-vit-b", ["lora"], num_classes=14)
    assert (wide.input_size, wide.total) == (1024, 95_286_138)


def test_fewer_classes_share_the_twin_of_more() -> None:
    together = {row.num_classes: row for row in count_tuners("sam-vit-b", ["lora"]) if row.title.startswith("CFR")}
    assert [together[n].effective for n in (2, 9, 14)] == [LORA_1, LORA_8, LORA_13]


class Shy(SAM):  # type: ignore[misc]
    """Has no small twin: the gradient is followed through shapes."""

    def narrowed(self) -> FoundationModel | None:
        return None


def test_shapes_alone_give_the_same_counts() -> None:
    row, lora = Published("CFR"), registry.load("tune", "lora")
    assert count_tuner(Shy, lora, row) == count_tuner(SAM, lora, row)


def test_a_twin_of_other_names_is_not_used() -> None:
    row, lora = Published("CFR"), registry.load("tune", "lora")
    assert count_tuner(SAM, lora, row, twin={"another": True}) == count_tuner(SAM, lora, row)


def test_a_fine_tuner_that_does_not_fit_says_why() -> None:
    (row,) = count_tuners("lite-medsam", ["samus"])
    assert "tiny-vit" in row.reason
    assert row.total == 0


def test_other_encoders_are_counted_too() -> None:
    (row,) = count_tuners("lite-medsam", ["decoder-only"], num_classes=4)
    assert (row.input_size, row.total, row.flagged, row.effective) == (256, 9_791_300, 4_058_340, DECODER)


def test_a_model_that_needs_its_weights_cannot_be_counted() -> None:
    class Guest(FoundationModel):
        name = "guest"
        title = licence = origin = "none"

        @property
        def input_size(self) -> int:
            return 64

        def build(self, num_classes: int) -> Promptable:
            raise NotImplementedError

        def normalise(self, volumes: Tensor) -> Tensor:
            return volumes

        def identity(self) -> str:
            return "guest"

    with pytest.raises(UsageError, match="has no `architecture`"):
        count_tuner(Guest, registry.load("tune", "lora"), Published("", input_size=64))


def test_counting_leaves_the_random_stream_and_the_threads_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    count_tuners("sam-vit-b", ["decoder-only"])
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads
