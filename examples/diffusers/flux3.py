"""FLUX.3, a modular pipeline, without the blocks that read text: its encoder, and the model that rewrites prompts."""

from collections.abc import Sequence

from common import DTYPES, arguments, client, sampling
from diffusers import Flux3AutoBlocks


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, None, "flux3.png", argv)
    blocks = Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline(options.model)
    pipe.load_components(dtype=DTYPES[options.dtype])
    pipe.to(options.device)
    # prompt_embeds (1, n rounded up to a multiple of 80, 20480), and the negative's if the pipeline's guider uses it
    with client(options) as service:
        call = service.for_pipeline(
            pipe, options.prompt, options.negative, height=options.size, width=options.size, **sampling(options)
        )
    pipe(**call, output="images")[0].save(options.output)


if __name__ == "__main__":
    main()
