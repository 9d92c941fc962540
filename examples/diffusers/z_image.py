"""Z-Image or Z-Image Turbo without its text encoder."""

from collections.abc import Sequence

from common import DTYPES, arguments, client, sampling
from diffusers import ZImagePipeline


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, "Tongyi-MAI/Z-Image-Turbo", "z_image.png", argv)
    if "turbo" in options.model.lower():  # distilled: no guidance, and few steps
        options.guidance = 0.0 if options.guidance is None else options.guidance
        options.steps = 9 if options.steps is None else options.steps
    pipe = ZImagePipeline.from_pretrained(options.model, text_encoder=None, tokenizer=None, dtype=DTYPES[options.dtype])
    pipe.to(options.device)
    # prompt_embeds is a list of (n, 2560), one for each prompt
    with client(options) as service:
        call = service.for_pipeline(
            pipe, options.prompt, options.negative, height=options.size, width=options.size, **sampling(options)
        )
    pipe(**call).images[0].save(options.output)


if __name__ == "__main__":
    main()
