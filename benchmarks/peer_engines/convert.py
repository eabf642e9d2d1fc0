"""The model in the form that an engine reads, made with the engine's own tools, in the Python that has it:

python convert.py llamacpp SOURCE.gguf TARGET.gguf TYPE     TYPE: bf16, f32, q8_0
python convert.py ctranslate2 DIRECTORY TARGET              float32; other forms are made when it is loaded
"""

from __future__ import annotations

import ctypes
import sys


def llamacpp(source: str, target: str, kind: str) -> None:
    """All tensors but the norms in one type, as in the checkpoint that the other engines read."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
        "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    }[kind]
    params.allow_requantize = True
    params.pure = True
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize gave {failed}")


def ctranslate2(directory: str, target: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(directory).convert(target, quantization="float32")


def main() -> None:
    kind, *settings = sys.argv[1:]
    if kind == "llamacpp":
        llamacpp(*settings)
    else:
        ctranslate2(*settings)


if __name__ == "__main__":
    main()
