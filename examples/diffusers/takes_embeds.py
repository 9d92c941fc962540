"""Any pipeline of diffusers that takes embeds: Krea 2, Ovis-Image, Bria Fibo 2, Qwen-Image-2.1 and so on.

The pipeline's class stands in its checkpoint, and the client knows what each class takes.
"""

from collections.abc import Sequence

from common import DTYPES, arguments, client, sampling
from diffusers import DiffusionPipeline

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "processor")
KEPT = {"QwenImage21Pipeline": ("processor",)}  # which it cannot be built without
GUIDANCE = {"QwenImage21Pipeline": "true_cfg_scale"}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, None, "picture.png", argv)
    config = DiffusionPipeline.load_config(options.model)
    pipeline = config["_class_name"]
    absent = [name for name in TEXT_COMPONENTS if name in config and name not in KEPT.get(pipeline, ())]
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=DTYPES[options.dtype], **dict.fromkeys(absent))
    pipe.to(options.device)
    with client(options) as service:
        how = sampling(options, GUIDANCE.get(pipeline, "guidance_scale"))
        call = service.for_pipeline(
            pipe, options.prompt, options.negative, height=options.size, width=options.size, **how
        )
    pipe(**call).images[0].save(options.output)


if __name__ == "__main__":
    main()
