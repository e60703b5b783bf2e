"""From weights of any kind to codes of 3 or 4 bits: `bitgen quantize`."""

from bitgen.quantize.types import TYPES, DataType
from bitgen.quantize.write import Quantized, Recipe, quantize, squares_of

__all__ = ["TYPES", "DataType", "Quantized", "Recipe", "quantize", "squares_of"]
