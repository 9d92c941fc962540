"""FLUX.2 klein without its text encoder."""

from collections.abc import Sequence

from common import DTYPES, arguments, client, sampling
from diffusers import Flux2KleinPipeline


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, "black-forest-labs/FLUX.2-klein-4B", "flux2_klein.png", argv)
    pipe = Flux2KleinPipeline.from_pretrained(
        options.model, text_encoder=None, tokenizer=None, dtype=DTYPES[options.dtype]
    )
    pipe.to(options.device)
    # prompt_embeds (1, 512, 7680), and the negative's unless the model is distilled
    with client(options) as service:
        call = service.for_pipeline(
            pipe, options.prompt, options.negative, height=options.size, width=options.size, **sampling(options)
        )
    pipe(**call).images[0].save(options.output)


if __name__ == "__main__":
    main()
