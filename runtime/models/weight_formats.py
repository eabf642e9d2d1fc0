"""How matrices are kept in memory: as numbers of the model's dtype, or as codes of one of GGUF's simple block types."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Quantization = Literal["none", "int8", "int4", "keep"]
BlockFormat = Literal["Q8_0", "Q4_0", "Q4_1"]
BLOCK = 32  # channels of a block, of all three
_BYTES: dict[BlockFormat, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_MADE: dict[Quantization, BlockFormat] = {"int8": "Q8_0", "int4": "Q4_1"}


@dataclass(frozen=True)
class WeightFormats:
    """What the job's setting `quantization` makes of the matrices of a checkpoint.

    stored: by name the type of each of its tensors, see tensor_info.STORED_TYPES; only needed where blocks are kept.
    """

    quantization: Quantization = "none"
    stored: Mapping[str, str] = field(default_factory=dict)

    def of(self, tensors: Iterable[str], *, of_vocabulary: bool) -> BlockFormat | None:
        """The format of a matrix made of these tensors; None: numbers. Parts of different types become numbers.

        of_vocabulary: the embedding or LM head, which are never made into less than 8 bits: that costs much more than in
        other matrices (docs/quantised-weights.md).
        """
        if self.quantization == "int4" and of_vocabulary:
            return "Q8_0"
        if self.quantization != "keep":
            return _MADE.get(self.quantization)
        types = {self.stored.get(name, "") for name in tensors}
        return next((format for format in get_args(BlockFormat) if types == {format}), None)


WIDE = WeightFormats()
"""All matrices as numbers."""


def block_bytes(format: BlockFormat) -> int:
    """Of the codes, the scale and the minimum of 32 channels."""
    return _BYTES[format]
